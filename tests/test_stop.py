"""Stop strings: found at the token that completes them, across the borders of tokens, characters and drafts."""

from __future__ import annotations

from typing import final

import pytest
from attrs import frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from specflow import (
    CachedPredictor,
    DecodeError,
    DecodeState,
    Dice,
    Fixed,
    GreedyProcessor,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    cli,
    run,
    speculative_step,
    start,
)
from specflow.models import Loaded
from specflow.stages import stop_string
from specflow.state import Reason, Request
from tests.toys import oracle, tiny_llama


@final
@frozen
class Pieces:
    """A tokenizer of bytes: a token may be half a character, a character, several, or nothing."""

    pieces: tuple[bytes, ...]

    def decode(self, token_ids: list[int], /) -> str:
        """What a byte-level tokenizer does."""
        return b"".join([self.pieces[i % len(self.pieces)] for i in token_ids]).decode(errors="replace")


PIECES = Pieces((b"a", b"b", b"ab", b"ba", b"aab", b"\n", b"", "é".encode()[:1], "é".encode()[1:], "€".encode()))
LETTERS = st.text(st.sampled_from("ab\né€"), min_size=1, max_size=6)
A, B, NOTHING, E1, E2, EURO = 0, 1, 6, 7, 8, 9


def first_end(tokenizer: Pieces, tokens: Tokens, strings: list[str]) -> int | None:
    """The honest way: decode everything after each token."""
    texts = (tokenizer.decode(list(tokens[:end])) for end in range(1, len(tokens) + 1))
    return next((i for i, text in enumerate(texts, 1) if any(string in text for string in strings)), None)


def state(output: Tokens, prompt: Tokens = (0,)) -> DecodeState:
    return DecodeState(Request(prompt, 1000), prompt + output)


@given(st.lists(st.integers(0, 9), max_size=60), st.lists(LETTERS, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_it_ends_where_the_whole_text_first_holds_a_string(tokens: list[int], strings: list[str]) -> None:
    ended, output = stop_string(PIECES, *strings), tuple(tokens)
    found = (end for end in range(1, len(output) + 1) if ended(state(output[:end])))
    assert next(found, None) == first_end(PIECES, output, strings)


def occurrences(string: str, text: str) -> int:
    """Overlapping ones too."""
    return sum(text.startswith(string, i) for i in range(len(text)))


@given(st.lists(st.integers(0, 9), max_size=40), LETTERS)
@settings(max_examples=200, deadline=None)
def test_behind_a_stop_string_it_ends_at_the_next_one(tokens: list[int], string: str) -> None:
    """A text that goes on after its stop string does not end again at the same one."""
    ended, output = stop_string(PIECES, string), tuple(tokens)
    for end in range(1, len(output) + 1):
        before, text = (occurrences(string, PIECES.decode(list(output[:i]))) for i in (end - 1, end))
        assert ended(state(output[:end])) is (text > before)


@pytest.mark.parametrize(
    ("tokens", "string"),
    [
        ((A, B) * 9, "abababababababab"),
        ((A, *[NOTHING] * 40, B, *[NOTHING] * 40, A), "aba"),
        ((E1, E2) * 4, "éééé"),
        ((E1, E2, NOTHING, E1, E2, NOTHING, A), "ééa"),
        ((EURO, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, A, B), "€ab"),
    ],
)
def test_a_string_may_be_spread_as_thinly_as_can_be(tokens: Tokens, string: str) -> None:
    ended = stop_string(PIECES, string)
    assert next(end for end in range(1, len(tokens) + 1) if ended(state(tokens[:end]))) == first_end(
        PIECES, tokens, [string]
    )


def falling_back() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2, Mistral and Gemma have it, of bytes alone: what is cut inside a character is no text."""
    ids = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(ids, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


BYTES = falling_back()
SPELT = st.text(st.sampled_from("ab\né€😀🛑"), max_size=20)


@given(SPELT, st.lists(SPELT.filter(bool), min_size=1, max_size=3))
@example("😀\n\n", ["\n\n"])
@example("😀🛑", ["🛑"])
@example("\n\n😀", ["\n\n"])
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_character_yet_hide_no_string_and_show_none_twice(text: str, strings: list[str]) -> None:
    ended, output = stop_string(BYTES, *strings), tuple([byte + 1 for byte in text.encode()])
    ends = {len(text[:end].encode()) for end in range(len(text) + 1) if text[:end].endswith(tuple(strings))}
    assert {end for end in range(1, len(output) + 1) if ended(state(output[:end]))} == ends


def test_the_prompt_is_not_searched() -> None:
    assert not stop_string(PIECES, "ab")(state((1,), prompt=(0,)))
    assert stop_string(PIECES, "ab")(state((0, 1), prompt=(0,)))


def test_a_long_text_costs_no_more_than_a_short_one() -> None:
    asked: list[int] = []

    class Counting:
        def decode(self, token_ids: list[int], /) -> str:
            asked.append(len(token_ids))
            return PIECES.decode(token_ids)

    stop_string(Counting(), "\n\n€")(state((0,) * 5000))
    assert max(asked) < 20


@pytest.mark.parametrize("strings", [(), ("",), ("a", "")])
def test_nothing_to_look_for_is_refused(strings: tuple[str, ...]) -> None:
    with pytest.raises(DecodeError, match="missing or empty"):
        stop_string(PIECES, *strings)


@given(gamma=st.integers(1, 12), string=LETTERS)
@settings(max_examples=30, deadline=None)
def test_a_decoder_with_drafts_ends_at_the_same_token(gamma: int, string: str) -> None:
    model = tiny_llama(0)
    text = tuple(oracle([3, 4, 5], model, 30))
    end = first_end(PIECES, text, [string])
    step = speculative_step(
        SuffixDrafter(), CachedPredictor(model), GreedyProcessor(), Dice(), Fixed(gamma),
        until=stop_string(PIECES, string),
    )  # fmt: skip
    finished = run(step, start([3, 4, 5], 30).unwrap())
    assert finished.state.output == text[:end]
    assert finished.reason is (Reason.LIMIT if end is None else Reason.CONDITION)


def test_a_real_tokenizer(smollm2: Loaded) -> None:
    tokenizer = smollm2.tokenizer
    written = "One two — three.\n\nUser: naïve café 日本語\nAssistant: <|im_end|> 42"
    tokens = tuple(tokenizer(written).input_ids)
    for string in ("two — thr", "\n\nUser", "aïve c", "本", "語\nAss", "<|im_end|>", "im_end", "2", "user"):
        ended = stop_string(tokenizer, string)
        found = [end for end in range(1, len(tokens) + 1) if ended(state(tokens[:end]))]
        texts = [tokenizer.decode(tokens[:end]) for end in range(1, len(tokens) + 1)]
        assert found[:1] == [i for i, text in enumerate(texts, 1) if string in text][:1]


def test_the_command_ends_at_a_text(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "Count: one, two, three, four, five.", "--max-new-tokens", "12"]
    assert cli.main(arguments) == 0
    whole = capsys.readouterr().out.strip()
    string = whole[4:9]
    assert cli.main([*arguments, "--stop", "not in there", "--stop", string]) == 0
    ended = capsys.readouterr().out.strip()
    assert string in ended
    assert whole.startswith(ended)
    assert len(ended) < len(whole)
    assert cli.main([*arguments, "--stop", ""]) == 2
    assert "stop string" in capsys.readouterr().err


def test_autoregressive_decoding_takes_a_condition_too() -> None:
    model = tiny_llama(0)
    text = tuple(oracle([3, 4, 5], model, 30))
    step = autoregressive_step(CachedPredictor(model), GreedyProcessor(), Dice(), until=lambda s: len(s.output) == 4)
    assert run(step, start([3, 4, 5], 30).unwrap()).state.output == text[:4]
