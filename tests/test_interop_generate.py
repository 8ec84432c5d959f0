"""`interop.Generate` and the arguments of `generate`, one by one: honoured, refused by name, or harmless."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from specflow import (
    CachedPredictor,
    DecodeError,
    DecodeState,
    Dice,
    Finished,
    GreedyProcessor,
    PointMass,
    Proposal,
    Tokens,
    speculative_step,
    start,
)
from specflow.drafters import SuffixDrafter, propose_nothing
from specflow.interop import Generate, Stateless, new_tokens, stops, stream
from specflow.interop.arguments import HARMLESS, HINTS, HONOURED, OUTPUTS, REFUSED, refuse_other_inputs
from specflow.models import Loaded
from tests.architectures import built
from tests.test_interop import forked
from tests.toys import oracle, passes_of, tiny_gpt2, tiny_llama

PROMPT, NEW = (5, 9, 5, 9, 7, 3, 5, 9, 7, 3, 5), 20
IDS = torch.tensor([PROMPT])
LLAMA = tiny_llama()
PLAIN: dict[str, object] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXT = tuple(oracle(PROMPT, LLAMA, NEW))


def right(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """Drafts the text of the llama, but for every fourth token."""
    whole = PROMPT + TEXT
    for i in range(len(tokens), len(whole)):
        token = (whole[i] + 1) % 64 if i % 4 == 0 else whole[i]
        yield Proposal(token)


Texts = list[list[int]]


def both(model: PreTrainedModel = LLAMA, ids: Tensor = IDS, /, **settings: object) -> tuple[Texts, Texts]:
    """What `generate` says, and what it says with us."""
    settings = {**PLAIN, **settings}
    ours = model.generate(ids, custom_generate=Generate(right), **settings)
    return model.generate(ids, **settings).tolist(), ours.tolist()


# A setting that changes what comes out, for each field that is honoured: without us and with us it comes out alike.
CHANGES: dict[str, dict[str, object]] = {
    "bad_words_ids": {"bad_words_ids": [[TEXT[0]], [TEXT[1], TEXT[2]]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [TEXT[0]]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[9], 50.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "eos_token_id": {"eos_token_id": [TEXT[3]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0), "eos_token_id": 7},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "max_length": {"max_length": 15, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "max_time": {"max_time": 1e-9},
    "min_length": {"min_length": 25, "eos_token_id": list(range(40))},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(40))},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "sequence_bias": {"sequence_bias": [[[9], 50.0], [[9, 8], 90.0]]},
    "suppress_tokens": {"suppress_tokens": list(range(20))},
    "watermarking_config": {"watermarking_config": {"bias": 20.0, "greenlist_ratio": 0.25}},
    "bos_token_id": {"bos_token_id": 9},
    "remove_invalid_values": {"remove_invalid_values": True, "bad_words_ids": [[i] for i in range(64)]},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.8},
    "use_cache": {"use_cache": False},
    "return_dict_in_generate": {},
    "do_sample": {"do_sample": True, "top_k": 1},
    "pad_token_id": {},
    "stop_strings": {},
    "token_healing": {},
    "temperature": {},
    "top_h": {},
    "top_k": {},
    "top_p": {},
    "min_p": {},
    "typical_p": {},
    "epsilon_cutoff": {},
    "eta_cutoff": {},
}

SAME_TEXT = {
    "bos_token_id",
    "do_sample",
    "num_return_sequences",
    "remove_invalid_values",
    "renormalize_logits",
    "use_cache",
}
"""Settings that change the way to a greedy text, or how many there are, and not the text."""

TRIED_BELOW = {name for name, settings in CHANGES.items() if not settings}


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - TRIED_BELOW))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_honoured_says_what_it_says_without_us(name: str) -> None:
    ids = IDS[:, :1] if name == "forced_bos_token_id" else IDS
    theirs, ours = both(LLAMA, ids, **CHANGES[name])
    assert ours == theirs
    others = {other: value for other, value in CHANGES[name].items() if other != name}
    if name not in SAME_TEXT:
        assert theirs != LLAMA.generate(ids, **{**PLAIN, **others}).tolist()


WARPERS: dict[str, dict[str, object]] = {
    "temperature": {"temperature": 0.5, "top_k": 0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5, "top_k": 0},
    "top_h": {"top_h": 0.4, "top_k": 0},
    "min_p": {"min_p": 0.2, "top_k": 0},
    "typical_p": {"typical_p": 0.3, "top_k": 0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05, "top_k": 0},
    "eta_cutoff": {"eta_cutoff": 0.6, "top_k": 0},
}


@pytest.mark.parametrize("name", WARPERS)
def test_each_warper_draws_from_what_it_leaves(name: str) -> None:
    """The law of one token is softmax(scores), and `generate` tells its scores."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(0.2)
    settings = {**PLAIN, "max_new_tokens": 1, "do_sample": True, **WARPERS[name]}
    told = model.generate(IDS, return_dict_in_generate=True, output_scores=True, **settings)
    (scores,) = told.scores
    law = scores[0].softmax(-1)
    draws = 300
    ids = model.generate(IDS, custom_generate=Generate(), num_return_sequences=draws, **settings)
    counts = torch.bincount(ids[:, -1], minlength=64)
    assert counts[law == 0].sum() == 0
    assert ((counts / draws - law).abs() < 5 * (law * (1 - law) / draws).sqrt() + 2 / draws).all()
    plain = model.generate(
        IDS,
        return_dict_in_generate=True,
        output_scores=True,
        **{**settings, **dict.fromkeys(WARPERS[name]), "top_k": 0},
    )
    assert not torch.allclose(plain.scores[0].softmax(-1), law, atol=1e-3)


def test_every_field_of_the_config_and_every_argument_of_generate_has_its_place() -> None:
    places = [HONOURED, frozenset(REFUSED), OUTPUTS, HINTS, HARMLESS]
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert frozenset[str]().union(*places) == fields
    assert sum(map(len, places)) == len(fields)
    assert CHANGES.keys() == HONOURED
    assert TRIED_BELOW - WARPERS.keys() == {"pad_token_id", "return_dict_in_generate", "stop_strings", "token_healing"}
    page = (Path(__file__).parent.parent / "docs" / "interop.md").read_text()
    for name in fields | set(inspect.signature(LLAMA.generate).parameters):
        assert f"`{name}`" in page, name
    assert set(inspect.signature(LLAMA.generate).parameters) == {
        "inputs",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "synced_gpus",
        "assistant_model",
        "streamer",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
        "custom_generate",
        "kwargs",
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("num_beams", {"num_beams": 3}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
        ("dola_layers", {"dola_layers": "low"}),
        ("force_words_ids", {"force_words_ids": [[5]], "num_beams": 2}),
        ("constraints", {"constraints": ["some"], "num_beams": 2}),
        ("assistant_ensemble_weight", {"assistant_ensemble_weight": 0.5}),
        ("is_assistant", {"is_assistant": True}),
        ("output_scores", {"return_dict_in_generate": True, "output_scores": True}),
        ("output_logits", {"return_dict_in_generate": True, "output_logits": True}),
        ("output_attentions", {"return_dict_in_generate": True, "output_attentions": True}),
        ("output_hidden_states", {"return_dict_in_generate": True, "output_hidden_states": True}),
        ("cache_implementation", {"cache_implementation": "static"}),
        ("compile_config", {"compile_config": tf.CompileConfig()}),
        ("prefill_chunk_size", {"prefill_chunk_size": 4}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("assistant_early_exit", {"assistant_early_exit": 1}),
        ("use_mtp", {"use_mtp": True}),
        ("synced_gpus", {"synced_gpus": True}),
        ("assistant_model", {"assistant_model": tiny_llama(1)}),
        ("inputs_embeds", {"inputs_embeds": torch.zeros(1, 4, 32, dtype=torch.float64)}),
        ("cache", {"cache": DynamicCache(config=LLAMA.config)}),
        ("token_type_ids", {"token_type_ids": torch.ones(1, 4, dtype=torch.long)}),
    ],
)
def test_what_would_not_be_honoured_is_refused_by_name_before_a_pass(name: str, settings: dict[str, object]) -> None:
    model = tiny_gpt2() if name == "token_type_ids" else tiny_llama()
    fed = passes_of(model)
    with pytest.raises(DecodeError) as caught:
        model.generate(torch.tensor([[5, 9, 5, 9]]), custom_generate=Generate(), **{**PLAIN, **settings})
    assert caught.value.parameter in {name, "num_beams"}
    assert fed == []


@pytest.mark.parametrize(
    "carried",
    [
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
        {"num_assistant_tokens": 7, "assistant_confidence_threshold": 0.2},
        {"output_scores": True, "output_attentions": True},
        {"length_penalty": 2.0, "early_stopping": True, "diversity_penalty": 1.0, "low_memory": True},
        {"chat_format": "chatml", "max_window_size": 6144},
        {"temperature": 0.1, "top_p": 0.2},
    ],
    ids=str,
)
def test_what_a_checkpoint_merely_carries_is_harmless(carried: dict[str, object]) -> None:
    model = tiny_llama()
    for name, value in carried.items():
        setattr(model.generation_config, name, value)
    assert model.generate(IDS, custom_generate=Generate(right), **PLAIN).tolist() == [[*PROMPT, *TEXT]]


def test_beams_that_a_checkpoint_carries_are_refused_and_can_be_taken_back() -> None:
    model = tiny_llama()
    model.generation_config.num_beams = 4
    with pytest.raises(DecodeError, match="num_beams cannot be honoured"):
        model.generate(IDS, custom_generate=Generate(), **PLAIN)
    assert model.generate(IDS, custom_generate=Generate(), num_beams=1, **PLAIN).tolist() == [[*PROMPT, *TEXT]]


def test_a_dict_is_returned_where_one_is_asked_for() -> None:
    told = LLAMA.generate(IDS, custom_generate=Generate(), return_dict_in_generate=True, **PLAIN)
    assert told.sequences.tolist() == [[*PROMPT, *TEXT]]


BATCH = torch.tensor([[0, 0, 5, 9, 5], [0, 3, 7, 9, 9], [5, 9, 5, 9, 7]])
MASK = {"attention_mask": (BATCH > 0).long()}


@pytest.mark.parametrize("pad", [0, 61, None])
def test_rows_that_end_early_are_padded(pad: int | None) -> None:
    theirs, ours = both(LLAMA, BATCH, **MASK, pad_token_id=pad, eos_token_id=[4, 5, 6, 7, 8])
    assert ours == theirs
    assert len({row.index(theirs[0][-1]) for row in theirs}) >= 1


def test_rows_without_an_eos_go_on_until_all_have_ended() -> None:
    def at_a_small_token(ids: Tensor, scores: None) -> Tensor:
        return ids[:, -1] < 8

    theirs, ours = both(LLAMA, BATCH, **MASK, stopping_criteria=StoppingCriteriaList([at_a_small_token]))
    assert ours == theirs
    assert len(theirs[0]) < 5 + NEW


class Falling:
    """A processor with a state: no token is likelier than twice."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(ids.shape[1])
        assert self.seen == list(range(self.seen[0], ids.shape[1] + 1)), "each prefix once and in order"
        scores[:, len(self.seen) % 7] = -torch.inf
        return scores


@pytest.mark.parametrize("settings", [{"suppress_tokens": [0]}, {"logits_processor": True}], ids=["pure", "stateful"])
def test_a_row_without_an_eos_that_ends_within_a_draft_goes_on(settings: dict[str, object]) -> None:
    """Where no draft may be taken back, such a row is decoded without drafts."""

    def ends(ids: Tensor, scores: None) -> Tensor:
        return torch.tensor([len(row) >= (5 + 2 if row[1] == 3 else 5 + 9) for row in ids.tolist()])

    def said(**how: object) -> Texts:
        given = {"logits_processor": LogitsProcessorList([Falling()])} if "logits_processor" in settings else settings
        criteria = StoppingCriteriaList([ends])
        said: Tensor = LLAMA.generate(BATCH, **given, stopping_criteria=criteria, **PLAIN, **MASK, **how)
        return said.tolist()

    texts, drafted = said(), set[int]()

    def drafter(tokens: Tokens) -> Iterator[Proposal]:
        whole = next(row for row in ([t for t in row if t] for row in texts) if tuple(row[:3]) == tokens[:3])
        drafted.add(len(tokens))
        return (Proposal(token) for token in whole[len(tokens) :])

    assert said(custom_generate=Generate(drafter)) == texts
    assert bool(drafted) is ("suppress_tokens" in settings)


def test_a_criterion_with_a_state_is_one_for_each_row() -> None:
    class AfterFive:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, ids: Tensor, scores: None) -> Tensor:
            self.calls += 1
            return torch.full((len(ids),), self.calls >= 5)

    settings = {**PLAIN, **MASK}
    theirs = LLAMA.generate(BATCH, stopping_criteria=StoppingCriteriaList([AfterFive()]), **settings)
    ours = LLAMA.generate(
        BATCH, stopping_criteria=StoppingCriteriaList([AfterFive()]), custom_generate=Generate(), **settings
    )
    assert ours.tolist() == theirs.tolist()


def test_a_constraint_is_asked_about_its_own_row() -> None:
    asked: list[tuple[int, int]] = []
    starts = {row: tuple(ids) for row, ids in enumerate(BATCH.tolist())}

    def allowed(row: int, ids: Tensor) -> list[int]:
        assert tuple(ids[:5].tolist()) == starts[row]
        asked.append((row, len(ids)))
        return [10 + row, 20 + row, 30 + (int(ids[-1]) + 1) % 10]

    theirs = LLAMA.generate(BATCH, prefix_allowed_tokens_fn=allowed, **PLAIN, **MASK)
    before = sorted(asked)
    asked.clear()
    ours = LLAMA.generate(
        BATCH, prefix_allowed_tokens_fn=Stateless(allowed), custom_generate=Generate(), **PLAIN, **MASK
    )
    assert ours.tolist() == theirs.tolist()
    assert sorted(asked) == before


class Strict:
    """An automaton: tokens are even and odd in turns, and anything else is an error."""

    def __init__(self) -> None:
        self.last: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        token = int(ids[0, -1])
        assert self.last is None or token % 2 != self.last % 2, f"token {token} behind {self.last}"
        self.last = token
        scores[:, token % 2 :: 2] = -torch.inf
        return scores


@pytest.mark.parametrize(
    "drafter", [right, forked(PROMPT + TEXT), lambda tokens: (Proposal(tokens[-1]) for _ in "1234")]
)
def test_a_strict_automaton_hears_of_no_draft_that_it_forbids(drafter: Callable[[Tokens], Iterator[Proposal]]) -> None:
    theirs = LLAMA.generate(IDS, logits_processor=LogitsProcessorList([Strict()]), **PLAIN)
    ours = LLAMA.generate(
        IDS, logits_processor=LogitsProcessorList([Strict()]), custom_generate=Generate(drafter), **PLAIN
    )
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("drafter", [right, forked(PROMPT + TEXT)])
def test_a_trie_that_leaves_nothing_behind_the_eos_hears_of_no_draft_behind_it(
    drafter: Callable[[Tokens], Iterator[Proposal]],
) -> None:
    end, settings = 12, {**PLAIN, "eos_token_id": [TEXT[12], 10**6]}
    assert TEXT[end] not in TEXT[:end]

    def allowed(row: int, ids: Tensor) -> list[int]:
        said = tuple(ids[len(PROMPT) :].tolist())
        return [TEXT[len(said)]] if said == TEXT[: len(said)] and len(said) <= end else []

    theirs = LLAMA.generate(IDS, prefix_allowed_tokens_fn=allowed, **settings)
    ours = LLAMA.generate(IDS, prefix_allowed_tokens_fn=allowed, custom_generate=Generate(drafter), **settings)
    assert ours.tolist() == theirs.tolist() == [[*PROMPT, *TEXT[: end + 1]]]


@pytest.fixture
def tokenized(smollm2: Loaded) -> tuple[PreTrainedModel, tf.PreTrainedTokenizerBase, Tensor]:
    model = tiny_llama(vocab_size=len(smollm2.tokenizer), dtype=torch.float32)
    return model, smollm2.tokenizer, torch.tensor([smollm2.tokenizer("hello there my friend").input_ids])


@pytest.mark.parametrize("settings", [{"stop_strings": ["e"]}, {"stop_strings": "a"}, {"token_healing": True}], ids=str)
def test_stop_strings_and_token_healing_find_the_tokenizer(
    tokenized: tuple[PreTrainedModel, tf.PreTrainedTokenizerBase, Tensor], settings: dict[str, object]
) -> None:
    model, tokenizer, ids = tokenized
    if "token_healing" in settings:
        ids = torch.tensor([tokenizer('The link is <a href="http:').input_ids])
    theirs, ours = both(model, ids, tokenizer=tokenizer, **settings)
    assert ours == theirs
    assert theirs != both(model, ids)[0]
    assert both(model, ids, tokenizer=tokenizer)[1] == both(model, ids)[0]


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.values: list[list[int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.ended, self.fails_at = 0, fails_at

    def put(self, value: Tensor) -> None:
        if len(self.values) == self.fails_at:
            raise RuntimeError("nobody reads")
        self.values.append(value.reshape(-1).tolist())
        self.shapes.append(tuple(value.shape))

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_given_to_generate_gets_what_it_gets_without_us() -> None:
    theirs, ours = Kept(), Kept()
    LLAMA.generate(IDS, streamer=theirs, **PLAIN)
    LLAMA.generate(IDS, streamer=ours, custom_generate=Generate(right), **PLAIN)
    assert (ours.values, ours.shapes, ours.ended) == (theirs.values, theirs.shapes, 1)
    behind = Kept()

    def wrapped(*arguments: Any, **more: Any) -> object:  # noqa: ANN401 - what generate gives
        return Generate(right)(*arguments, **more)

    LLAMA.generate(IDS, streamer=behind, custom_generate=wrapped, **PLAIN)
    assert behind.values == theirs.values
    mine = Kept()
    stream(
        speculative_step(right, CachedPredictor(LLAMA), GreedyProcessor(), Dice()), start(PROMPT, NEW).unwrap(), mine
    )
    assert (mine.values, mine.shapes, mine.ended) == (theirs.values, theirs.shapes, 1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["processor", "criterion", "drafter"])
def test_a_streamer_is_ended_after_any_error(error: type[BaseException], where: str) -> None:
    def fail(*arguments: object) -> Tensor:
        raise error("out of memory")

    settings: dict[str, dict[str, object]] = {
        "processor": {"logits_processor": LogitsProcessorList([fail])},
        "criterion": {"stopping_criteria": StoppingCriteriaList([fail])},
        "drafter": {},
    }
    kept = Kept()
    drafter: Any = fail if where == "drafter" else None
    with pytest.raises(error, match="out of memory"):
        LLAMA.generate(IDS, streamer=kept, custom_generate=Generate(drafter), **PLAIN, **settings[where])
    assert kept.ended == 1


def test_a_streamer_that_cannot_be_ended_is_refused() -> None:
    class Endless:
        def put(self, value: Tensor) -> None:
            pass

    with pytest.raises(DecodeError, match="streamer is not a streamer"):
        LLAMA.generate(IDS, streamer=Endless(), custom_generate=Generate(), **PLAIN)


def test_a_streamer_is_ended_after_a_refusal_and_after_its_own_error() -> None:
    for settings in ({"num_beams": 1, "guidance_scale": 2.0}, {"assistant_model": LLAMA}):
        kept = Kept()
        with pytest.raises(DecodeError):
            LLAMA.generate(IDS, streamer=kept, custom_generate=Generate(), **PLAIN, **settings)
        assert kept.ended == 1
    batch = Kept()
    with pytest.raises(DecodeError, match="a batch cannot be streamed"):
        LLAMA.generate(torch.cat([IDS, IDS]), streamer=batch, custom_generate=Generate(), **PLAIN)
    assert batch.ended == 1
    failing = Kept(fails_at=3)
    with pytest.raises(RuntimeError, match="nobody reads"):
        LLAMA.generate(IDS, streamer=failing, custom_generate=Generate(), **PLAIN)
    assert failing.ended == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_stream_ends_its_streamer_after_any_error(error: type[BaseException]) -> None:
    def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        if len(tokens) > 4:
            raise error("out of memory")
        return torch.zeros(len(drafts) + 1, 8)

    step = speculative_step(propose_nothing, target, GreedyProcessor(), Dice())
    for kept in (Kept(), Kept(fails_at=0)):
        with pytest.raises((error, RuntimeError)):
            stream(step, start([1, 2], 9).unwrap(), kept)
        assert kept.ended == 1


def test_a_cancelled_task_stays_until_its_step_is_done() -> None:
    began, goes_on, running = threading.Event(), threading.Event(), []

    def slow(state: DecodeState) -> DecodeState | Finished:
        running.append(True)
        began.set()
        goes_on.wait(5)
        running.pop()
        return DecodeState(state.request, (*state.tokens, 7))

    async def main() -> bool:
        async def everything() -> None:
            async for _ in new_tokens(slow, start([1], 9).unwrap()):
                pass

        task = asyncio.create_task(everything())
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.sleep(0.05)
        still = not task.done() and running == [True]
        task.cancel()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return still and not running

    assert asyncio.run(main())


def test_an_error_in_a_step_comes_out_of_new_tokens() -> None:
    def failing(state: DecodeState) -> DecodeState | Finished:
        raise StopIteration("out of memory")

    async def main() -> None:
        async for _ in new_tokens(failing, start([1], 9).unwrap()):
            pass

    with pytest.raises(RuntimeError):
        asyncio.run(main())


@pytest.mark.parametrize("wrong", [None, 3, "text", torch.zeros(2), [None], PointMass(1)], ids=str)
def test_wrong_types_are_refused(wrong: object) -> None:
    state, step = start([1], 3).unwrap(), speculative_step(right, CachedPredictor(LLAMA), GreedyProcessor(), Dice())
    calls: list[Callable[[], object]] = [
        lambda: stream(wrong, state, Kept()),  # type: ignore[arg-type]
        lambda: stream(step, wrong, Kept()),  # type: ignore[arg-type]
        lambda: stream(step, state, wrong),  # type: ignore[arg-type]
        lambda: new_tokens(wrong, state),  # type: ignore[arg-type]
        lambda: new_tokens(step, wrong),  # type: ignore[arg-type]
        lambda: stops(wrong),  # type: ignore[arg-type]
        lambda: Generate(gamma=wrong),  # type: ignore[arg-type]
        lambda: Generate(rng=wrong),  # type: ignore[arg-type]
        lambda: Generate()(wrong, IDS, [], [], GenerationConfig()),  # type: ignore[arg-type]
        lambda: Generate()(LLAMA, wrong, [], [], GenerationConfig(max_length=20)),  # type: ignore[arg-type]
        lambda: Generate()(LLAMA, IDS, wrong, [], GenerationConfig(max_length=20)),  # type: ignore[arg-type]
        lambda: Generate()(LLAMA, IDS, [], wrong, GenerationConfig(max_length=20)),  # type: ignore[arg-type]
        lambda: Generate()(LLAMA, IDS, [], [], wrong),  # type: ignore[arg-type]
        lambda: Generate()(LLAMA, IDS, [], [], GenerationConfig()),
    ]
    if wrong is not None:
        calls.append(lambda: Generate(wrong))  # type: ignore[arg-type]
    for call in calls:
        with pytest.raises(DecodeError):
            call()


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {**SIZES, "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
SIGHT = {**SIZES, "image_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 4, "out_hidden_size": 32}
TURNING = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MARKS = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
CLIP = {**SIGHT, "model_type": "clip_vision_model", "projection_dim": 32}

SEEING: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=WORDS, vision_config=SIGHT, image_token_index=98, boi_token_index=97, eoi_token_index=96
        )
    ),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config={**WORDS, "model_type": "llama"}, vision_config=CLIP, image_token_index=98)
    ),
    "idefics3": lambda: tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(text_config={**WORDS, "model_type": "llama"}, vision_config=SIGHT, image_token_id=98)
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config={**WORDS, "rope_parameters": TURNING}, vision_config=SIGHT, **MARKS)
    ),
}


@pytest.mark.parametrize("kind", SEEING)
def test_the_text_of_a_model_that_sees(kind: str) -> None:
    torch.manual_seed(0)
    model = SEEING[kind]()
    model.to(torch.float64)
    model.eval()
    theirs, ours = both(model, IDS)
    assert ours == theirs
    theirs, ours = both(model, BATCH, **MASK)
    assert ours == theirs
    types = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}.get(kind)
    if types is not None:
        assert both(model, IDS, **{types: torch.zeros_like(IDS)})[1] == both(model, IDS)[0]
        with pytest.raises(DecodeError, match=types):
            model.generate(IDS, custom_generate=Generate(), **PLAIN, **{types: torch.ones_like(IDS)})


def test_images_are_refused_by_name() -> None:
    torch.manual_seed(0)
    model = SEEING["llava"]()
    model.eval()
    ids = torch.tensor([[5, *[98] * 4, 7]])
    with pytest.raises(DecodeError, match=r"pixel_values|mm_encoder_outputs"):
        model.generate(ids, pixel_values=torch.zeros(1, 3, 16, 16), custom_generate=Generate(), **PLAIN)


def test_positions_that_the_model_counts_otherwise_are_refused() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 99, "is_decoder": True, "initializer_range": 0.3, "max_position_embeddings": 64}
    model = tf.RobertaForCausalLM(tf.RobertaConfig(**sizes))
    model.eval()
    fed = passes_of(model)
    with pytest.raises(DecodeError, match="over the position_ids of `generate` is not the model over its ids"):
        model.generate(IDS, custom_generate=Generate(), **PLAIN)
    assert len(fed) <= 2


def test_token_types_that_a_model_embeds_are_refused() -> None:
    model = tiny_gpt2()
    with pytest.raises(DecodeError, match="token_type_ids"):
        model.generate(IDS, token_type_ids=torch.zeros_like(IDS), custom_generate=Generate(), **PLAIN)
    theirs, ours = both(model)
    assert ours == theirs


def test_padding_that_a_model_sees_is_refused_whatever_it_was_given_before() -> None:
    model = built("rwkv")
    whole = [[*row, *oracle(row, model, NEW)] for row in BATCH.tolist()]  # `generate` says another text itself
    for _ in range(2):
        ours = model.generate(BATCH, custom_generate=Generate(), **PLAIN, attention_mask=torch.ones_like(BATCH))
        assert ours.tolist() == whole
        with pytest.raises(DecodeError, match="over the attention_mask of `generate` is not the model over its ids"):
            model.generate(BATCH, custom_generate=Generate(), **PLAIN, **MASK)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_padding_is_tried_by_what_the_model_rounds_to_whatever_its_logits_come_in(kind: str) -> None:
    torch.manual_seed(0)
    model = built(kind).to(torch.bfloat16)
    model.get_submodule("lm_head").register_forward_hook(lambda head, given, logits: logits.float())
    assert model.generate(BATCH, custom_generate=Generate(), **PLAIN, **MASK).shape == (3, 5 + NEW)


def test_a_model_whose_logits_are_not_finite_is_told_so() -> None:
    model = tiny_llama()
    model.get_submodule("lm_head").register_forward_hook(lambda head, given, logits: logits * torch.nan)
    with pytest.raises(DecodeError, match="the model's logits are not finite"):
        both(model, BATCH, **MASK)


def test_what_a_model_makes_of_its_arguments_is_found_out_anew_when_its_weights_have_changed() -> None:
    model, types = tiny_gpt2(), {"token_type_ids": torch.zeros_like(IDS)}
    table = model.get_parameter("transformer.wte.weight")
    was = table[0].detach().clone()
    with torch.no_grad():
        table[0] = 0
    theirs, ours = both(model, **types)
    assert ours == theirs
    with torch.no_grad():
        table[0] = was
    with pytest.raises(DecodeError, match="token_type_ids"):
        both(model, **types)


def test_what_a_model_makes_of_its_arguments_is_found_out_by_one_thread_at_a_time() -> None:
    model, inside, another = tiny_gpt2(), threading.Semaphore(1), threading.Event()

    def enter(*_: object) -> None:
        if not inside.acquire(blocking=False):
            another.set()
            return
        another.wait(0.2)
        inside.release()

    model.register_forward_pre_hook(enter)

    def ask(name: str) -> None:
        with contextlib.suppress(DecodeError):
            refuse_other_inputs(model, PROMPT, (), {name: torch.zeros_like(IDS)})

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("token_type_ids", "position_ids")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not another.is_set()


def test_an_encoder_decoder_model_is_refused() -> None:
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
    )
    with pytest.raises(DecodeError, match="an encoder-decoder model cannot be decoded"):
        tf.T5ForConditionalGeneration(config).generate(IDS, custom_generate=Generate(), **PLAIN)


def test_a_dynamic_rope_is_refused_beyond_its_context_only() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = tf.LlamaConfig(**SIZES, vocab_size=64, max_position_embeddings=24, rope_parameters=rope)
    model = tf.LlamaForCausalLM(config)
    model.eval()
    with pytest.raises(DecodeError, match='rope of type "dynamic"') as caught:
        model.generate(IDS, custom_generate=Generate(), **PLAIN)
    assert caught.value.parameter == "max_length"
    theirs, ours = both(model, max_new_tokens=13)
    assert ours == theirs


def test_inputs_that_are_prepared_otherwise_are_refused() -> None:
    model = tiny_llama()
    own = model.prepare_inputs_for_generation

    def prepare(ids: Tensor, **more: object) -> object:
        return own(ids, **more)

    model.prepare_inputs_for_generation = prepare  # type: ignore[method-assign,assignment]
    with pytest.raises(DecodeError, match="prepared in a way of their own"):
        model.generate(IDS, custom_generate=Generate(), **PLAIN)


@pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "LoraConfig"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_soft_prompt_is_read(kind: str, use_cache: bool) -> None:
    import peft  # noqa: PLC0415 - it may not be installed

    sizes: dict[str, object] = {"num_virtual_tokens": 4}
    if kind == "PromptEncoderConfig":
        sizes["encoder_hidden_size"] = 16
    if kind == "LoraConfig":
        sizes = {"r": 4, "init_lora_weights": False}
    model = peft.get_peft_model(tiny_llama(), getattr(peft, kind)(task_type="CAUSAL_LM", **sizes))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    model.to(torch.float64)
    model.eval()
    text = list(PROMPT)
    with torch.no_grad():
        for _ in range(8):
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    settings = {**PLAIN, "max_new_tokens": 8, "use_cache": use_cache}
    ours = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), custom_generate=Generate(SuffixDrafter()), **settings
    )
    assert ours[0].tolist() == text
    assert text[len(PROMPT) :] != list(TEXT[:8])


@pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_adapter_for_each_row_is_refused() -> None:
    import peft  # noqa: PLC0415 - it may not be installed

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    model.eval()
    settings = {**PLAIN, "input_ids": torch.cat([IDS, IDS]), "adapter_names": ["default", "__base__"]}
    assert model.generate(**settings)[1].tolist() == [*PROMPT, *TEXT]
    with pytest.raises(DecodeError, match="adapter_names cannot be honoured"):
        model.generate(custom_generate=Generate(), **settings)


def test_sampling_draws_from_the_given_dice() -> None:
    settings = {**PLAIN, "do_sample": True, "top_k": 0}
    texts = [
        LLAMA.generate(
            IDS, custom_generate=Generate(rng=Dice(torch.Generator().manual_seed(seed))), **settings
        ).tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_an_instance_tells_its_signature_and_so_does_the_class() -> None:
    assert list(inspect.signature(Generate).parameters) == ["drafter", "gamma", "rng"]
    assert "tokenizer" in inspect.signature(Generate()).parameters
