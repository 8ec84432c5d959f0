"""`debug=True` and `Show`: everything a step did is printed, in colour, and no token is changed."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
import torch
from returns.functions import tap
from returns.pipeline import flow
from rich.console import Console
from torch import Tensor

from specflow import (
    TEXT,
    Categorical,
    DecodeError,
    DecodeState,
    Dice,
    Drafted,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Match,
    MultinomialProcessor,
    PointMass,
    Predictor,
    Proposal,
    Rule,
    Traverse,
    along_paths,
    autoregressive_generate,
    run,
    speculative_generate,
    speculative_step,
    verified_step,
)
from specflow.distribution import BlackBox, Distribution
from specflow.predictors import UncachedPredictor
from specflow.randomness import Randomness
from specflow.stages import (
    Adjust,
    Draft,
    Reject,
    Show,
    StopWhen,
    Verify,
    advance,
    commit,
    unobserved,
)
from specflow.state import Adjusted, Committed, Reason, Request, Scored, Verified
from specflow.trace import Recorder
from tests.toys import disturbed, oracle, tiny_llama

GREEN, RED, CYAN, DIM, BOLD = "\x1b[32m", "\x1b[31m", "\x1b[36m", "\x1b[2m", "\x1b[1m"


class Letters:
    """A tokenizer: 0 is a, 1 is b, and so on."""

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(chr(97 + token) for token in token_ids)


def shown(committed: Committed) -> list[str]:
    console = Console(file=StringIO(), record=True, force_terminal=True, color_system="standard", width=40)
    Show(Letters(), console)(committed)
    return console.export_text(styles=True).splitlines()


def a_step(
    accepted: int,
    bonus: int,
    q: Distribution,
    p: Distribution,
    room: int = 9,
    drafts: tuple[int, ...] = (3, 3, 3),
) -> Committed:
    """Drafts with the law q, judged against p, of which `accepted` stand, and the token behind them."""
    state = DecodeState(Request((1, 2), 2 + room, frozenset({9})), (1, 2))
    proposals = tuple([Proposal(token, q, source="toy") for token in drafts])
    return judged(Drafted(state, proposals), tuple(range(accepted)), bonus, p)


def judged(drafted: Drafted, path: tuple[int, ...], bonus: int, p: Distribution) -> Committed:
    """The step in which the drafts on `path` stand, p being the law everywhere."""
    scored = Scored(drafted, torch.zeros(len(drafted.proposals) + 1, 10), lambda way: (p,) * len(way))
    for i in range(TEXT, len(drafted.proposals)):
        scored.law(i)
    verified: Verified[Randomness] = Verified(scored, path, p)
    return commit(Adjusted(verified, bonus))


HALF = Categorical(torch.tensor([0.25, 0.0, 0.25, 0.5]))
QUARTER = Categorical(torch.tensor([0.5, 0.0, 0.25, 0.25]))


def test_a_rejection_is_shown_with_everything_about_it() -> None:
    heading, *drafts, token = shown(a_step(1, 4, HALF, QUARTER))
    assert heading.startswith(BOLD)
    assert "position 2  gamma 3  accepted 1/3" in heading
    for line, colour, verdict in zip(drafts, (GREEN, RED, DIM), ("accepted", "rejected", "not reached"), strict=True):
        assert line.startswith(colour)
        for part in (verdict, "3 'd'", "q 0.5", "p/q 0.5", "toy"):
            assert part in line
    assert token.startswith(CYAN)
    assert "corrected   4 'e'" in token


def test_what_a_tokenizer_does_not_know_is_shown_by_its_id() -> None:
    class Few:
        def decode(self, token_ids: list[int], /) -> str:
            return {4: "e"}[token_ids[0]]

    console = Console(file=StringIO(), record=True, width=40)
    Show(Few(), console)(a_step(1, 4, HALF, QUARTER))
    _, accepted, *_, token = console.export_text().splitlines()
    assert "accepted    3  q 0.5" in accepted
    assert "corrected   4 'e'" in token


def test_a_bonus_and_a_token_without_a_draft() -> None:
    *_, token = shown(a_step(3, 5, PointMass(3), PointMass(3)))
    assert "bonus       5 'f'" in token
    heading, token = shown(a_step(0, 4, HALF, QUARTER, drafts=()))
    assert "gamma 0  accepted 0/0" in heading
    assert "drawn       4 'e'" in token


def test_what_could_have_come_next_is_rejected_in_whatever_branch() -> None:
    state = DecodeState(Request((1, 2), 9), (1, 2))
    path, beside = Proposal(3, source="toy"), Proposal(5, parent=TEXT, source="bush")
    heading, accepted, other, token = shown(judged(Drafted(state, (path, beside)), (0,), 4, HALF))
    assert "gamma 2  accepted 1/2" in heading
    assert accepted.startswith(GREEN)
    assert other.startswith(RED)
    assert "rejected    5 'f'" in other
    assert "bush" in other
    assert "bonus       4 'e'" in token  # behind a leaf
    below = Proposal(6, parent=0, source="toy")
    *_, rejected, other, token = shown(judged(Drafted(state, (path, below, beside)), (0,), 4, HALF))
    assert rejected.startswith(RED)
    assert other.startswith(RED)
    assert "corrected   4 'e'" in token  # its child was rejected


BUSH = ((3, TEXT), (5, TEXT), (4, 0), (6, 0), (7, 2), (8, 1), (2, 5), (1, 6))
"""Tokens and what they follow: 3 and 5 behind the text, 4 and 6 behind the 3, 7 behind the 4; 8, 2, 1 behind the 5."""


@pytest.mark.parametrize(
    ("room", "stop", "verdicts", "last"),
    [
        (9, 9, "accepted rejected accepted rejected rejected not not not", "corrected"),
        (9, 4, "accepted rejected accepted rejected not not not not", "not"),  # the text ends at the 4
        (2, 9, "accepted rejected accepted rejected not not not not", "not"),
        (1, 9, "accepted rejected not not not not not not", "not"),
    ],
)
def test_every_draft_of_a_tree_has_a_verdict(room: int, stop: int, verdicts: str, last: str) -> None:
    """Where 3 and 4 stand."""
    state = DecodeState(Request((1, 2), 2 + room, frozenset({stop})), (1, 2))
    drafted = Drafted(state, tuple([Proposal(token, parent=parent, source="bush") for token, parent in BUSH]))
    heading, *lines = shown(judged(drafted, (0, 2), 0, Categorical(torch.full((10,), 0.1))))
    said = [next(word for word in line.replace("\x1b", " ").split() if word.isalpha()) for line in lines]
    assert " ".join(said[:8]) == verdicts
    assert (said[8:] == ["corrected"]) is (last == "corrected")
    kept = verdicts.split().count("accepted")
    assert f"gamma 8  accepted {kept}/8" in heading
    colours = {"accepted": GREEN, "rejected": RED, "not": DIM}
    assert all(line.startswith(colours[word]) for line, word in zip(lines, verdicts.split(), strict=False))


def test_a_trace_says_the_same_of_each_draft() -> None:
    """The first of two siblings was judged and rejected, before the second was."""
    drafted = Drafted(DecodeState(Request((1, 2), 9), (1, 2)), (Proposal(5), Proposal(6, parent=TEXT)))
    step, recorder = judged(drafted, (1,), 4, HALF), Recorder()
    recorder(step)
    _, first, second, _ = shown(step)
    assert [draft.fate.value for draft in recorder.trace.steps[0].drafts] == ["rejected", "accepted"]
    assert "rejected" in first
    assert "accepted" in second


def test_what_a_stop_or_the_limit_drops_is_not_shown_as_accepted() -> None:
    heading, first, second, third = shown(a_step(3, 5, Categorical(torch.full((10,), 0.1)), HALF, drafts=(3, 9, 3)))
    assert "accepted 2/3  ends: stop token" in heading
    assert ["accepted" in line for line in (first, second, third)] == [True, True, False]
    heading, *lines = shown(a_step(3, 5, HALF, HALF, room=1))
    assert "accepted 1/3  ends: length limit" in heading
    assert ["not reached" in line for line in lines] == [False, True, True]


def test_laws_that_nobody_knows_are_question_marks() -> None:
    hidden = BlackBox(torch.ones(4), lambda probs: probs.argmax(-1, keepdim=True))
    assert "q ?  p/q ?" in shown(a_step(1, 4, hidden, HALF))[1]
    assert "q 0.5  p/q ?" in shown(a_step(1, 4, HALF, hidden))[1]


def test_a_law_that_was_written_over_has_no_odds() -> None:
    """A proposal that its q does not hold is refused, but what is in a tensor may change."""
    with pytest.raises(DecodeError, match="a q that it was not drawn from"):
        a_step(1, 4, PointMass(1), HALF)
    written = Categorical(torch.full((4,), 0.25))
    step = a_step(1, 4, written, HALF)
    written.probs[3] = 0.0
    assert "q 0  p/q ∞" in shown(step)[1]


def test_a_law_that_no_rule_asked_for_is_a_question_mark() -> None:
    """In a tree the rules ask for the laws along what can stand, and showing a step makes no others."""
    drafted = Drafted(DecodeState(Request((1, 2), 9), (1, 2)), (Proposal(3), Proposal(1, parent=TEXT), Proposal(2)))
    asked: list[tuple[int, ...]] = []

    def make(way: tuple[int, ...]) -> tuple[Categorical, ...]:
        asked.append(way)
        return (HALF,) * len(way)

    scored = Scored(drafted, torch.zeros(4, 4), make)
    scored.law(TEXT)
    verified: Verified[Randomness] = Verified(scored, (0,), HALF)
    _, first, beside, below, _ = shown(commit(Adjusted(verified, 3)))
    assert asked == [(TEXT, 0)]
    assert "q 1  p/q 0.5" in first
    assert "q 1  p/q 0" in beside
    assert "q 1  p/q ?" in below


def test_text_is_printed_as_it_is() -> None:
    class Markup:
        def decode(self, token_ids: list[int], /) -> str:
            return "[red]\x1b[0m\n[/]"

    console = Console(file=StringIO(), record=True, width=200)
    Show(Markup(), console)(a_step(1, 4, HALF, QUARTER))
    out = console.export_text()
    assert repr("[red]\x1b[0m\n[/]") in out
    assert len(out.splitlines()) == 5


@pytest.mark.parametrize("processor", [GreedyProcessor(), MultinomialProcessor(0.7)])
@pytest.mark.parametrize("use_egag", [False, True])
def test_debug_changes_no_token(
    processor: GreedyProcessor | MultinomialProcessor, use_egag: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tiny_llama(0)
    drafter = disturbed(target, 1, 0.02)
    outputs = []
    for debug in (False, True):
        torch.manual_seed(5)
        outputs.append(
            speculative_generate(
                [3, 4, 5], drafter, target, Letters(), use_egag=use_egag, logits_processor=processor, debug=debug
            )
        )
        assert bool(capsys.readouterr().out) is debug
        outputs.append((autoregressive_generate([3, 4, 5], target, logits_processor=processor, debug=debug), 0.0))
        assert bool(capsys.readouterr().out) is debug
    assert outputs[:2] == outputs[2:]


def test_every_step_of_a_decode_is_shown_and_adds_up() -> None:
    target = tiny_llama(0)
    predictor, processor, rng = UncachedPredictor(target), GreedyProcessor(), Dice()
    console = Console(file=StringIO(), record=True, width=200)
    drafter = LLMDrafter(UncachedPredictor(disturbed(target, 1, 0.02)), processor, rng)
    step = speculative_step(drafter, predictor, processor, rng, Fixed(4), observe=Show(console=console))
    end = run(step, DecodeState(Request((3, 4, 5), 33), (3, 4, 5)))
    assert list(end.state.output) == oracle([3, 4, 5], target, 30)
    lines = console.export_text().splitlines()
    verdicts = [line.split()[0] for line in lines]
    tally = end.state.tally
    assert verdicts.count("position") == tally.steps
    assert verdicts.count("accepted") == tally.accepted > 0
    assert verdicts.count("rejected") == verdicts.count("corrected") > 0
    assert sum(verdicts.count(kind) for kind in ("accepted", "bonus", "corrected", "drawn")) == 30


def by_last(rows: Tensor) -> Predictor:
    return along_paths(lambda tokens: rows[tokens[-1]])


@pytest.mark.parametrize("processor", [GreedyProcessor(), MultinomialProcessor(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rule", [Reject, Match, Traverse])
def test_every_step_over_trees_is_shown_and_adds_up(
    processor: GreedyProcessor | MultinomialProcessor, rule: Callable[[Dice], Rule]
) -> None:
    rows = torch.randn(6, 6, dtype=torch.float64)
    target, close = by_last(rows), by_last(rows + torch.randn(6, 6))
    ends, lines = [], list[str]()
    for observed in (False, True):
        rng = Dice(torch.Generator().manual_seed(3))
        console = Console(file=StringIO(), record=True, width=200)
        drafter = LLMDrafter(close, processor, rng, widths=(2, 2))
        observe = Show(Letters(), console) if observed else unobserved
        step = verified_step(drafter, target, processor, rng, rule(rng), Fixed(9), observe=observe)
        ends.append(run(step, DecodeState(Request((3, 4, 5), 33), (3, 4, 5))))
        lines = console.export_text().splitlines()
    assert ends[0] == ends[1]
    verdicts = [line.split()[0] for line in lines]
    tally = ends[1].state.tally
    assert verdicts.count("position") == tally.steps
    assert verdicts.count("accepted") == tally.accepted > 0
    assert verdicts.count("rejected") >= max(1, verdicts.count("corrected"))
    assert sum(verdicts.count(kind) for kind in ("accepted", "rejected", "not")) >= tally.drafted
    assert sum(verdicts.count(kind) for kind in ("accepted", "bonus", "corrected", "drawn")) == 30


def test_show_is_a_stage_of_ones_own_step() -> None:
    @along_paths
    def constant(tokens: tuple[int, ...]) -> Tensor:
        return torch.eye(5)[tokens[-1]].roll(1, dims=-1)  # after t comes t + 1

    console = Console(file=StringIO(), record=True, width=200)
    draft = Draft(lambda tokens: (Proposal(t % 5) for t in (tokens[-1] + i for i in (1, 2, 9))))
    verify, adjust, show = Verify(constant, GreedyProcessor(), Reject(Dice())), Adjust(Dice()), Show(Letters(), console)
    never = StopWhen(lambda state: state.tokens[-1] == 4)
    end = run(
        lambda state: flow(state, draft, verify, adjust, never, commit, tap(show), advance),
        DecodeState(Request((0,), 99), (0,)),
    )
    assert (end.state.output, end.reason) == ((1, 2, 3, 4), Reason.CONDITION)
    assert "ends: stop condition" in console.export_text()
