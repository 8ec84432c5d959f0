"""Traces: recording changes no text, the numbers are those of the decode, and no text gets out of its page."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Final

import pytest
import torch
from attrs import evolve
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from specflow import (
    TEXT,
    DecodeError,
    Dice,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    PromptLookup,
    Proposal,
    Step,
    SuffixDrafter,
    Tokens,
    Traverse,
    along_paths,
    autoregressive_step,
    chain,
    cli,
    first_of,
    run,
    speculative_step,
    start,
    unfold,
    verified_step,
)
from specflow.distribution import BlackBox
from specflow.margins import Margins
from specflow.state import Count, Reason, Tally
from specflow.testing import TableModel, World, certify
from specflow.trace import DraftTrace, Fate, Recorder, StepTrace, Trace
from specflow.trace.parts import Origin
from specflow.trace.words import pieces
from tests.test_cli import words
from tests.toys import tiny_llama

NASTY: Final = "</script><script>alert(1)</script>"
WORDS: Final = (
    "a",
    " b",
    NASTY,
    "<!--<script>",
    "\u202eevil",
    "مرحبا ",
    "שלום ",
    "\n",
    "&lt;",
    "\x1b[31m\x00",
    "👩‍👩‍👧",
)


class Spelling:
    """A tokenizer: a word each, then the four bytes of a smile, one each."""

    all_special_ids = ()

    def __len__(self) -> int:
        return len(WORDS) + 4

    def convert_ids_to_tokens(self, ids: int, /) -> str | None:
        return f"<0x{'😀'.encode()[ids - len(WORDS)]:02X}>" if ids >= len(WORDS) else WORDS[ids].replace(" ", "▁")

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        return [WORDS.index("a")] * text.count("a")

    def decode(self, token_ids: list[int], /) -> str:
        return "".join([WORDS[i] if i < len(WORDS) else "�" for i in token_ids])


WORD: Final = {i: text.encode() for i, text in enumerate(WORDS)} | {
    len(WORDS) + i: bytes([byte]) for i, byte in enumerate("😀".encode())
}
SMILE: Final = tuple(range(len(WORDS), len(WORDS) + 4))


def wheel(size: int) -> Callable[[Tokens], Tensor]:
    """After t comes t + 1."""
    return lambda tokens: 9.0 * torch.eye(size)[(tokens[-1] + 1) % size]


def decoded(observe: Recorder, tokens: int = 40, size: int = 7, processor: object = None) -> Trace:
    """A text with accepted, rejected and unreached drafts of two sources, branches among them."""
    dice = Dice(torch.Generator().manual_seed(1))

    def guess(tokens: Tokens) -> Iterator[Proposal]:
        last = tokens[-1]
        yield Proposal((last + 1) % size, source="right")
        yield Proposal((last + 3) % size, parent=TEXT, source="wrong")
        yield Proposal((last + 4) % size, source="wrong")
        yield Proposal((last + 2) % size, parent=0, source="right" if last % 2 else "wrong")
        if last % 3 == 0:
            yield Proposal((last + 5) % size, source="wrong")

    target = along_paths(wheel(size))
    drawing = GreedyProcessor() if processor is None else MultinomialProcessor(3.0)
    drafter, target = observe.drafting(guess), observe.reading(target)
    step = speculative_step(drafter, target, drawing, dice, Fixed(5), observe=observe)
    end = run(step, start((0, 1), tokens).unwrap())
    trace = observe.trace
    assert trace.tokens == end.state.tokens
    assert trace.tally == end.state.tally
    assert trace.reason is end.reason
    return trace


def by_hand(tokens: Tokens, drafts: tuple[DraftTrace, ...] = (), prompt: Tokens = (0,)) -> Trace:
    return Trace(prompt, (StepTrace(tokens, drafts),), WORD)


# Recording.


def recorded_tree(world: World) -> Step:
    recorder = Recorder()
    drafter = LLMDrafter(world.drafter, world.processor, world.rng, widths=(2,))
    target = recorder.reading(world.target)
    rule = Traverse(world.rng)
    gamma = Fixed(2)
    return verified_step(recorder.drafting(drafter), target, world.processor, world.rng, rule, gamma, observe=recorder)


def recorded_chain(world: World) -> Step:
    recorder = Recorder()
    drafter = recorder.drafting(LLMDrafter(world.drafter, world.processor, world.rng))
    target = recorder.reading(world.target)
    return speculative_step(drafter, target, world.processor, world.rng, Fixed(2), observe=recorder)


@pytest.mark.parametrize("step", [recorded_chain, recorded_tree])
def test_recording_keeps_the_law(step: Callable[[World], Step]) -> None:
    certify(step)


@pytest.mark.parametrize("sampled", [None, True])
def test_recording_changes_no_token_and_reads_nothing(sampled: bool | None) -> None:
    ends, reads = [], []
    for recorder in (None, Recorder()):
        dice, table = Dice(torch.Generator().manual_seed(3)), TableModel(5)
        passes = 0

        def target(tokens: Tokens, drafts: tuple[Proposal, ...], table: TableModel = table) -> Tensor:
            nonlocal passes
            passes += 1
            return table(tokens, drafts)

        processor = MultinomialProcessor(1.0) if sampled else GreedyProcessor()
        drafter = first_of(SuffixDrafter(), PromptLookup())
        observed = {} if recorder is None else {"observe": recorder}
        step = speculative_step(
            drafter if recorder is None else recorder.drafting(drafter),
            target if recorder is None else recorder.reading(target),  # type: ignore[arg-type]
            processor,
            dice,
            **observed,  # type: ignore[arg-type]
        )
        ends.append(run(step, start((0, 1, 0), 30).unwrap()))
        reads.append(passes)
    assert ends[0] == ends[1]
    assert reads[0] == reads[1] == ends[0].state.tally.steps


def test_what_is_recorded_is_what_the_stages_held() -> None:
    margins, recorder = Margins(), Recorder()
    target, dice = TableModel(4, seed=2), Dice(torch.Generator().manual_seed(0))
    drafter = LLMDrafter(TableModel(4, seed=3), MultinomialProcessor(1.0), dice, widths=(2, 2))
    seen = []

    def observe(committed: object) -> None:
        margins(committed)  # type: ignore[arg-type]
        recorder(committed)  # type: ignore[arg-type]
        seen.append(committed)

    step = speculative_step(drafter, target, MultinomialProcessor(1.0), dice, Fixed(6), observe=observe)
    run(step, start((0,), 25).unwrap())
    trace = recorder.trace
    finite = [margin if margin < float("inf") else None for margin in margins.recorded]
    assert [margin for one in trace.steps for margin in one.margins] == finite
    accepted = 0
    for one, committed in zip(trace.steps, seen, strict=True):
        verified = committed.adjusted.verified  # type: ignore[attr-defined]
        for i, (draft, proposal) in enumerate(zip(one.drafts, verified.drafted.proposals, strict=True)):
            assert (draft.token, draft.source) == (proposal.token, "llm")
            assert draft.q == pytest.approx(proposal.q.of(draft.token))
            law = verified.scored.made(draft.parent)
            assert draft.p == (None if law is None else pytest.approx(law.of(draft.token)))
            assert (draft.fate is Fate.ACCEPTED) is (i in verified.path[: len(one.tokens)])
            accepted += draft.fate is Fate.ACCEPTED
    assert trace.tally.accepted == accepted > 0
    assert {draft.fate for one in trace.steps for draft in one.drafts} == {*Fate}


def test_what_became_of_each_draft_of_a_tree() -> None:
    fates = [(1, TEXT), (2, 0), (5, 1), (4, TEXT), (5, 3), (6, 0)]
    drafts = tuple([Proposal(token, parent=parent, source="toy") for token, parent in fates])
    recorder, dice, target = Recorder(), Dice(), along_paths(wheel(9))
    step = speculative_step(lambda tokens: iter(drafts), target, GreedyProcessor(), dice, Fixed(9), observe=recorder)
    for stop, depths, tokens, expected in (
        (8, (0, 1, 2, 1, 0, 1), [1, 2, 5, 6, 4, 5], "accepted accepted rejected rejected rejected not-reached"),
        (2, (0, 1, 1, 0, 1), [1, 2, 6, 4, 5], "accepted accepted rejected rejected not-reached"),  # a stop ends it
        (1, (0, 0, 1), [1, 4, 5], "accepted rejected not-reached"),
    ):
        end = next(unfold(step, start((0,), 9, (stop,)).unwrap()))
        assert recorder.trace.tally == (end.state if isinstance(end, Finished) else end).tally
        (only,) = recorder.trace.steps
        assert only.depths == depths
        assert [draft.token for draft in only.drafts] == tokens
        assert " ".join([draft.fate.value.replace(" ", "-") for draft in only.drafts]) == expected


def saying(drafts: Tokens, tokens: Tokens) -> Iterator[Proposal]:
    return iter(chain(drafts))


def test_how_each_token_came_to_be() -> None:
    dice, target = Dice(), along_paths(wheel(9))
    kinds: dict[Tokens, list[str]] = {}
    several: tuple[Tokens, ...] = ((), (1, 2), (1, 7, 3), (8,))
    for drafts in several:
        recorder = Recorder()
        step = speculative_step(partial(saying, drafts), target, GreedyProcessor(), dice, observe=recorder)
        step(start((0,), 9).unwrap())
        kinds[drafts] = [origin.value for origin in recorder.trace.origins]
        assert recorder.trace.steps[0].rejected() == {(1, 7, 3): (7, 3), (8,): (8,)}.get(drafts, ())
    assert kinds == {
        (): ["drawn"],
        (1, 2): ["accepted", "accepted", "bonus"],
        (1, 7, 3): ["accepted", "corrected"],
        (8,): ["corrected"],
    }


def test_times_are_those_of_the_clock() -> None:
    moments = iter(range(1000))
    recorder = Recorder(clock=lambda: float(next(moments)))
    trace = decoded(recorder, 8)
    first, second, *_ = trace.steps
    for step in trace.steps:
        assert step.seconds is not None
        assert step.drafting is not None
        assert step.reading == 1.0
        assert step.seconds >= step.drafting + step.reading
    # Each step: the drafter's call, and each of its proposals and its end, take a tick; so does the pass.
    assert first.drafting == 1 + len(first.drafts) + (len(first.drafts) < 5)
    untimed = Recorder()
    run(autoregressive_step(TableModel(3), GreedyProcessor(), Dice(), observe=untimed), start((0,), 3).unwrap())
    assert [one.seconds is None for one in untimed.trace.steps] == [True, False, False]
    assert untimed.trace.seconds is None
    assert second.margins


def test_a_recorder_goes_back_and_begins_anew() -> None:
    recorder = Recorder()
    step = autoregressive_step(TableModel(4), MultinomialProcessor(1.0), Dice(), observe=recorder)
    states = list(unfold(step, start((0, 1), 6).unwrap()))
    third = states[2]
    step(third)  # type: ignore[arg-type] # it has room
    assert len(recorder.trace.steps) == 4
    assert recorder.trace.tokens[:-1] == third.tokens  # type: ignore[union-attr]
    step(start((2,), 3).unwrap())
    assert (recorder.trace.prompt, len(recorder.trace.steps)) == ((2,), 1)


def test_what_nobody_knows_is_none() -> None:
    hidden = BlackBox(torch.full((9,), 1 / 9), lambda probs: torch.tensor([[1]]))
    recorder = Recorder()
    drafts = (Proposal(1, hidden, source="box"), Proposal(3), Proposal(4))
    step = speculative_step(
        lambda tokens: iter(drafts), along_paths(wheel(9)), GreedyProcessor(), Dice(), observe=recorder
    )
    step(start((0,), 9).unwrap())
    first, second, _ = recorder.trace.steps[0].drafts
    assert (first.q, first.p, first.ratio) == (None, 1.0, None)
    assert (second.q, second.p, second.ratio) == (1.0, 0.0, 0.0)
    one = along_paths(lambda tokens: torch.zeros(1))
    step = autoregressive_step(one, GreedyProcessor(), Dice(), observe=recorder)
    step(start((0,), 2).unwrap())
    assert recorder.trace.steps[0].margins == (None,)
    with pytest.raises(DecodeError, match="no step was recorded"):
        _ = Recorder().trace


def test_a_drafter_that_is_timed_is_refused_as_it_is() -> None:
    def bad(tokens: Tokens) -> Iterator[Proposal]:
        yield None  # type: ignore[misc]

    for drafter in (bad, Recorder().drafting(bad)):
        with pytest.raises(DecodeError, match="bad proposes what is not a Proposal"):
            speculative_step(drafter, TableModel(3), GreedyProcessor(), Dice())(start((0,), 4).unwrap())

    def no_stream(tokens: Tokens) -> Iterator[Proposal]:
        return 3  # type: ignore[return-value]

    step = speculative_step(Recorder().drafting(no_stream), TableModel(3), GreedyProcessor(), Dice())
    with pytest.raises(DecodeError, match="no_stream gives no stream"):
        step(start((0,), 4).unwrap())


# Its numbers.


def test_acceptance_by_position() -> None:
    right, wrong = Fate.ACCEPTED, Fate.REJECTED
    fates = ((1, right), (2, right), (3, wrong), (4, Fate.NOT_REACHED))
    drafts = tuple([DraftTrace(token, i - 1, 1.0, 1.0, fate, "x") for i, (token, fate) in enumerate(fates)])
    one = StepTrace((1, 2, 9), drafts)
    two = StepTrace((7,), (DraftTrace(1, TEXT, 1.0, 0.0, wrong, "x"), DraftTrace(2, TEXT, 1.0, 0.0, wrong, "x")))
    trace = Trace((0,), (one, two, StepTrace((5,))))
    assert trace.tally == Tally(3, (("x", Count(6, 2)),), (2, 1, 1), (1, 1))
    assert trace.output == (1, 2, 9, 7, 5)
    assert str(trace) == "5 tokens in 3 passes (1.67 a pass), 2 of 6 drafts accepted"
    assert Trace((0,), ()).mean_accepted_length == 0.0


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (lambda: StepTrace((1,), (DraftTrace(1, 0, 1.0, 1.0, Fate.ACCEPTED, "x"),)), "does not come after its parent"),
        (lambda: StepTrace((2,), (DraftTrace(1, TEXT, 1.0, 1.0, Fate.ACCEPTED, "x"),)), "are not the beginning"),
        (lambda: StepTrace((1, 2)), "one token after them at most"),
        (lambda: StepTrace((1,), margins=(1.0, 2.0)), "not a margin for each token"),
        (lambda: DraftTrace(1, TEXT, 1.5, 1.0, Fate.ACCEPTED, "x"), "outside"),
        (lambda: DraftTrace(1, -2, 1.0, 1.0, Fate.ACCEPTED, "x"), "below -1"),
        (lambda: StepTrace((1,), seconds=float("nan")), "not a number of seconds"),
        (lambda: Trace((1,), (), {7: "text"}), "a word is not"),  # type: ignore[dict-item]
        (lambda: Trace((1,), (), about={"a": 3}), "a fact is not"),  # type: ignore[dict-item]
    ],
)
def test_what_is_no_trace_is_refused(broken: Callable[[], object], match: str) -> None:
    with pytest.raises(DecodeError, match=match):
        broken()


# Files.


def test_a_file_brings_it_back(tmp_path: Path) -> None:
    trace = evolve(decoded(Recorder(Spelling(), {"rule": f"{NASTY}\udce9"})), reason=Reason.STOP)
    trace = evolve(trace, words=WORD)
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    held = json.loads((tmp_path / "trace.json").read_text())
    assert (held["format"], held["version"]) == ("specflow trace", 2)
    assert held["steps"][0]["drafts"][0]["fate"] == "accepted"
    (tmp_path / "trace.json").write_text(json.dumps({**held, "version": 1}))  # rejected drafts were "refused" there
    with pytest.raises(DecodeError, match="has version 1 of the format, not 2"):
        Trace.load(tmp_path / "trace.json")


WRONG: Final[tuple[object, ...]] = (
    None, -7, 2.5, "x", [-1], ["x"], [{}], [[]], [10**30, 2.5], {}, {"x": 3}, float("inf"), True, 10**400,
)  # fmt: skip


def damaged(content: str) -> Iterator[str]:
    held = json.loads(content)
    yield from ("", "{}", "[]", "null", content[:-5], content[: len(content) // 2], content.replace("0", "x"))
    yield "[" * 100_000
    yield json.dumps({**held, "version": 1})
    for name in held:
        yield json.dumps({key: value for key, value in held.items() if key != name})
        for wrong in WRONG:
            if wrong != held[name] and (name, wrong) != ("reason", None):
                yield json.dumps({**held, name: wrong})
    step = held["steps"][0]
    for name in step:
        for wrong in WRONG[1:]:
            yield json.dumps({**held, "steps": [{**step, name: wrong}]})
    for name in step["drafts"][0]:
        for wrong in WRONG[1:]:
            drafts = [{**step["drafts"][0], name: wrong}, *step["drafts"][1:]]
            yield json.dumps({**held, "steps": [{**step, "drafts": drafts}]})
    yield json.dumps({**held, "words": {"0": 10**15}})


def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = evolve(decoded(Recorder(), 6), words=WORD)
    trace.save(path)
    for content in damaged(path.read_text()):
        path.write_text(content)
        try:
            loaded = Trace.load(path)
        except DecodeError as error:
            said = str(error)
            assert said.startswith("the file ")
            assert "\n" not in said
        else:  # a change that leaves a trace: some text for a name, no steps at all
            assert isinstance(loaded, Trace), content[:300]
            loaded.html()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DecodeError, match="no UTF-8"):
        Trace.load(path)
    for other, match in (
        (tmp_path, "a folder"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "a" / "b", "not exist"),
    ):
        with pytest.raises(DecodeError, match=match):
            Trace.load(other)
    with pytest.raises(DecodeError, match="cannot be written"):
        trace.save_html(tmp_path / "a" / "b")


# Words.


def test_a_character_is_shown_where_it_is_complete() -> None:
    shown = pieces((0, *SMILE, 1, SMILE[0], 0, SMILE[0]), WORD)
    assert [piece.text for piece in shown] == ["a", "", "", "", "😀", " b", "", "�a", "�"]
    assert [piece.part for piece in shown] == [False, True, True, True, True, False, True, True, True]


def test_words_come_from_the_tokenizer() -> None:
    recorder = Recorder(Spelling())
    trace = decoded(recorder, 30, size=15)
    assert trace.words == {i: WORD[i] for i in trace.words}
    assert set(trace.words) >= {*trace.tokens}

    class Lines:
        def decode(self, token_ids: list[int], /) -> str:
            return " ".join([f"w{i}" for i in token_ids])

    class Narrow:
        def decode(self, token_ids: list[int], /) -> str:
            return "".join(["abc"[i] for i in token_ids])

    class Broken:
        def decode(self, token_ids: list[int], /) -> str:
            raise RuntimeError("no")

    assert decoded(Recorder(Lines()), 9).words[3] == b" w3"
    assert decoded(Recorder(Narrow()), 9).words == {0: b"a", 1: b"b", 2: b"c"}, "what it does not know has no word"
    with pytest.raises(DecodeError, match="does not decode token"):
        decoded(Recorder(Broken()), 9)


# The page.


class Reader(HTMLParser):
    """What a browser makes of a page: its elements, and the text of those that are looked for."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if "data-i" in dict(attrs):
            self.tokens.append("")
        if tag in ("span", "script"):
            self._inside.append(tag if tag == "script" or "data-i" in dict(attrs) else "")
            self.scripts += [""] * (tag == "script")

    @override
    def handle_endtag(self, tag: str) -> None:
        if tag in ("span", "script"):
            self._inside.pop()

    @override
    def handle_data(self, data: str) -> None:
        match self._inside:
            case [*_, "script"]:
                self.scripts[-1] += data
            case [*_, "span"]:
                self.tokens[-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


EVERYTHING: Final = (*range(len(WORDS)), *SMILE)


def told(words: dict[int, bytes], name: str) -> Trace:
    """Each word as text, as a draft and in the prompt, and the name wherever somebody may name something."""
    fates = [Fate.REJECTED, *[Fate.NOT_REACHED] * (len(EVERYTHING) - 1)]
    numbered = enumerate(zip(EVERYTHING, fates, strict=True))
    drafts = tuple([DraftTrace(token, i - 1, 1.0, 0.0, fate, name) for i, (token, fate) in numbered])
    steps = (StepTrace((2,), drafts), *[StepTrace((token,)) for token in EVERYTHING])
    return Trace(EVERYTHING, steps, words, {"title": name, name: f"\"'{name}", "rule": name})


def tags_of(page: str) -> list[str]:
    return [tag for tag, _ in read(page).elements if tag != "i"]  # which marks the end of a line


@pytest.mark.parametrize("name", [NASTY, "'><img src=x onerror=alert(1)>", "<!--", "]]><svg onload=alert(1)>"])
def test_text_that_tries_to_be_html_stays_text(name: str) -> None:
    nasty, tame = told(WORD, name), told({}, "tame")
    for page, plain in (
        (nasty.html(), tame.html()),
        (nasty.html(tame), tame.html(tame)),
        (tame.html(nasty), tame.html(tame)),
    ):
        reader = read(page)
        assert tags_of(page) == tags_of(plain)
        assert not [key for _, attributes in reader.elements for key in attributes if key.startswith("on")]
        assert NASTY in "".join(reader.tokens)
        assert not {"\u202e", "\x1b", "\x00"} & {*page}
        for script in reader.scripts[:-1]:
            assert "<" not in script
            assert json.loads(script)["steps"]
    words = json.loads(read(nasty.html()).scripts[0])["words"]
    assert (words["2"], words[str(SMILE[0])]) == (NASTY, "\\xf0")


def test_a_page_asks_the_network_for_nothing() -> None:
    page = decoded(Recorder(Spelling())).html()
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href|url|import)\s*[=(]", page) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page) == []


def test_the_page_shows_each_token_and_its_kind() -> None:
    trace = decoded(Recorder(Spelling()), 40, size=15, processor="sampled")
    reader = read(trace.html())
    expected = "".join([piece.text for piece in pieces(trace.tokens, trace.words)][len(trace.prompt) :])
    spans = [attributes for _, attributes in reader.elements if "data-i" in attributes]
    assert len(spans) == len(trace.output) == len(reader.tokens)
    assert "".join(reader.tokens).replace("⟨U+202E⟩", "\u202e").replace("␛", "\x1b").replace("␀", "\x00") == expected
    classes = [str(attributes["class"]).split() for attributes in spans]
    assert [one[1] in ("s0", "s1") for one in classes] == [origin is Origin.DRAFTED for origin in trace.origins]
    assert sum("b" in one for one in classes) == len(trace.steps)
    assert [attributes["tabindex"] for attributes in spans[:2]] == ["0", "-1"]
    data = json.loads(reader.scripts[0])
    assert [step[0] for step in data["steps"]] == [list(step.tokens) for step in trace.steps]
    assert all(len(step[4]) == len(kept.drafts) for step, kept in zip(data["steps"], trace.steps, strict=True))


def test_what_a_grammar_forces_has_a_colour_of_its_own() -> None:
    forced = DraftTrace(1, TEXT, 1.0, 1.0, Fate.ACCEPTED, "forced")
    page = by_hand((1, 2), (forced,)).html()
    assert '<span class="t forced b" data-i="0"' in page
    assert "what the grammar leaves no choice about" in page


def test_two_traces_side_by_side() -> None:
    one, two = by_hand((1,), prompt=(0,)), by_hand((3,), prompt=(0,))
    both = one.html(two)
    assert "The texts differ from token 1 on." in both
    assert both.count('class="t drawn b d"') == 2
    assert "Both texts are the same." in one.html(one)
    assert "Their prompts differ." in one.html(by_hand((1,), prompt=(1,)))
    longer = Trace((0,), (*one.steps, StepTrace((5,))), WORD)
    assert "The texts differ from token 2 on." in one.html(longer)
    with pytest.raises(DecodeError, match="beside is not a Trace"):
        one.html("x")  # type: ignore[arg-type]


def test_two_thousand_tokens_are_a_small_page() -> None:
    trace = decoded(Recorder(Spelling()), 2000, size=15)
    page = trace.html()
    assert len(page) < 200 * len(trace.output)
    assert len(read(page).tokens) == 2000


def test_a_notebook_and_a_terminal_show_it() -> None:
    trace = decoded(Recorder(Spelling(), {"title": '"quoted" </iframe>'}))
    frame = trace._repr_html_()
    (tag, attributes), *others = read(frame).elements
    assert (tag, others) == ("iframe", [])
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == trace.html()
    assert unescape(frame).count("<!DOCTYPE html>") == 1
    console = Console(file=StringIO(), record=True, force_terminal=True, color_system="standard", width=60)
    console.print(trace)
    out = console.export_text(styles=True)
    assert str(trace) in console.export_text() or str(trace)[:20] in out
    assert "\x1b[31m" not in out.replace("\x1b[1;4;31m", "")
    for name in ("right, accepted", "corrected"):
        assert name in out
    empty = Trace((0,), ())
    console.print(empty)
    assert "0 tokens" in console.export_text()
    assert len(read(empty.html()).tokens) == 0


# The command.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def test_the_command_shows_what_generate_says(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["w5 w6 w7 w5 w6", "--model", str(tiny), "--max-new-tokens", "20", "--dtype", "float64", "--seed", "3"]
    assert cli.main(["generate", *asked]) == 0
    said = capsys.readouterr().out.split()
    page, kept = tmp_path / "page.html", tmp_path / "trace.json"
    assert cli.main(["trace", *asked, "--drafter", "tree", "--html", str(page), "--json", str(kept)]) == 0
    told = capsys.readouterr()
    trace = Trace.load(kept)
    assert trace.about["drafter"] == "tree"
    assert trace.about["rule"] == "match"
    assert [piece.text.strip() for piece in pieces(trace.tokens, trace.words)][len(trace.prompt) :] == said
    assert "".join(told.out.split()).startswith("".join(said))
    assert told.err == f"the page is {page}\n"
    assert str(trace) in " ".join(told.out.split())
    assert page.read_text() == trace.html()
    assert all(step.reading is not None and step.drafting is not None for step in trace.steps)
    both = tmp_path / "both.html"
    assert cli.main(["trace", "--load", str(kept), "--load", str(kept), "--html", str(both)]) == 0
    assert both.read_text() == trace.html(trace)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "nothing to answer"),
        (["a", "--load", "x.json"], "a prompt and a trace are both given"),
        (["--load", "x.json"], "does not exist"),
        (["--load", "x.json", "--load", "x.json", "--load", "x.json"], "two traces are shown side by side"),
        (["--load", "x.json", "--json", "y.json"], "is kept already"),
        (["a", "--html", "nowhere/page.html"], "no file can be written there"),
        (["a", "--html", "."], "no file can be written there"),
        (["a", "--json", "a" * 300], "no file can be written there"),
        (["a", "--html", "x", "--json", "x"], "one file"),
        (["a", "--max-new-tokens", "0"], "nothing to trace"),
        (["a", "--drafter", "llm"], "no model to draft with"),
    ],
)
def test_what_the_command_cannot_do_is_refused_before_a_model_is_loaded(
    arguments: list[str],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["trace", "--model", "there/is/none", *arguments]) == cli.NOT_DECODED
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_file_that_may_not_be_written_is_refused_before_a_model_is_loaded(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert cli.main(["trace", "a", "--model", "there/is/none", option, str(tmp_path / "page")]) == cli.NOT_DECODED
    assert "no file can be written there" in capsys.readouterr().err


def test_a_pipe_takes_a_trace_and_a_device_a_page(tiny: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    out = Path(f"/dev/fd/{writing}")
    if not out.exists():
        pytest.skip("there is no such device")
    asked = ["w5 w6", "--model", str(tiny), "--max-new-tokens", "4", "--dtype", "float64"]
    assert cli.main(["trace", *asked, "--json", str(out), "--html", os.devnull]) == 0
    os.close(writing)
    kept = tmp_path / "trace.json"
    with open(reading, encoding="utf-8") as pipe:
        kept.write_text(pipe.read(), encoding="utf-8")
    assert 0 < len(Trace.load(kept).output) <= 4
