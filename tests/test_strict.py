"""A processor that is not total is asked only about text that can stand, and never behind a stop token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final

import pytest
import torch
from attrs import define, evolve, field
from torch import Tensor

from specflow import (
    TEXT,
    Block,
    Categorical,
    DecodeState,
    Dice,
    Drafter,
    EachPrefix,
    Fixed,
    LLMDrafter,
    Match,
    MultinomialProcessor,
    PointMass,
    Processor,
    Proposal,
    Reject,
    Rule,
    Step,
    Tokens,
    Traverse,
    chain,
    run,
    speculative_step,
    verified_step,
)
from specflow.distribution import Distribution
from specflow.errors import DeadEndError
from specflow.laws import Lazily
from specflow.lossy import accept_loss
from specflow.paths import path_by_path
from specflow.randomness import Randomness, Sampling
from specflow.stages import Adjust, Draft, LossyJudge, LossyTypical, Score, ending
from specflow.state import Reason, Request
from specflow.steps import lossy_unadjusted_step
from specflow.testing import Case, World, certify

V: Final = 6
STOP: Final = 5


@define
class Automaton:
    """Even, odd, even, odd, … up to a 5, which ends the text; it raises when it is asked about anything else."""

    choose: Callable[[Tensor], Distribution]
    asked: list[Tokens] = field(factory=list)

    def law(self, prefix: Tokens, logits: Tensor) -> Distribution:
        self.asked.append(prefix)
        for before, token in pairwise(prefix):
            assert before % 2 != token % 2, f"{token} behind {before} is not in the language"
        assert STOP not in prefix, "nothing follows a 5"
        scores = logits.clone()
        scores[prefix[-1] % 2 :: 2] = -torch.inf
        return self.choose(scores)

    @property
    def processor(self) -> Processor:
        return EachPrefix(self.law)


def likeliest(scores: Tensor) -> Distribution:
    return PointMass(int(scores.argmax()))


def drawn(scores: Tensor) -> Distribution:
    return Categorical(scores.softmax(-1))


@path_by_path
def target(tokens: Tokens, last: int) -> Tensor:
    """All is possible, and a 5 is likely."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    table[:, STOP] += 0.5
    return table[torch.tensor(tokens[-last:])]


def repeats(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """Always illegal."""
    while True:
        yield Proposal(tokens[-1], source="repeats")


def counts(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """Legal, through a 5 and beyond."""
    token = tokens[-1]
    while True:
        token = (token + 1) % V
        yield Proposal(token, source="counts")


def spread(tokens: Tokens) -> Iterator[Proposal[Categorical]]:
    """Drawn from all tokens, legal or not."""
    dice = Dice(torch.Generator().manual_seed(len(tokens)))
    q = Categorical(torch.full((V,), 1 / V, dtype=torch.float64))
    while True:
        yield Proposal(dice.draw(q, 0), q, source="spread")


def mixed(tokens: Tokens) -> Iterator[Proposal]:
    for one, other in zip(counts(tokens), spread(tokens), strict=True):
        yield one
        yield other


def bush(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """A legal and an illegal token, and below both again, a 5 among them."""
    even, odd = tokens[-1] // 2 * 2, STOP
    yield Proposal(odd, parent=TEXT)
    yield Proposal(even, parent=TEXT)
    yield Proposal(even, parent=0)
    yield Proposal(odd, parent=0)
    yield Proposal(odd, parent=1)
    yield Proposal(even, parent=1)
    yield Proposal(even, parent=4)


def thicket(tokens: Tokens) -> Iterator[Proposal[Categorical]]:
    """Two siblings drawn from all tokens, legal or not, and two more below each of them."""
    parents = (TEXT, TEXT, 0, 0, 1, 1)
    for draft, parent in zip(spread(tokens), parents, strict=False):
        yield evolve(draft, parent=parent)


DRAFTERS: dict[str, Drafter] = {
    "repeats": repeats,
    "counts": counts,
    "spread": spread,
    "mixed": mixed,
    "a tree": bush,
    "a drawn tree": thicket,
}


def typically(drafter: Drafter, processor: Processor, dice: Dice) -> Step:
    draft, score, judge, adjust = (
        Draft(drafter, Fixed(7)),
        Score(target, processor),
        LossyJudge(LossyTypical(dice)),
        Adjust(dice),
    )
    end = ending()
    return accept_loss(
        lambda state: state.then(draft).then(score).then(judge).map(lambda verified: verified.then(adjust).then(end))
    )


def by(rule: Callable[[Randomness], Rule]) -> Callable[[Drafter, Processor, Dice], Step]:
    return lambda drafter, processor, dice: verified_step(drafter, target, processor, dice, rule(dice), Fixed(7))


RULES: dict[str, Callable[[Drafter, Processor, Dice], Step]] = {
    "token rejection": by(Reject),
    "sample-and-match": by(Match),
    "block verification": by(Block),
    "traversal verification": by(Traverse),
    "typical acceptance": typically,
    "no adjustment": lambda d, p, r: accept_loss(lossy_unadjusted_step(d, target, p, r, Fixed(7))),
}


@pytest.mark.parametrize("choose", [likeliest, drawn])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(6))
def test_a_strict_automaton_hears_of_nothing_that_it_forbids(
    rule: str, drafter: str, choose: Callable[[Tensor], Distribution], seed: int
) -> None:
    automaton = Automaton(choose)
    step = RULES[rule](DRAFTERS[drafter], automaton.processor, Dice(torch.Generator().manual_seed(seed)))
    end = run(step, DecodeState(Request((2, 3), 14, frozenset({STOP})), (2, 3)))
    text = end.state.tokens
    assert STOP not in text[:-1]
    assert (end.reason is Reason.STOP) is (text[-1] == STOP)
    assert all(a % 2 != b % 2 for a, b in pairwise(text))
    assert len(text) == 14 or text[-1] == STOP
    tally = end.state.tally
    assert len(end.state.output) - tally.accepted in (tally.steps, tally.steps - 1)


def test_an_accepted_stop_token_is_the_last_and_has_no_token_behind_it() -> None:
    automaton = Automaton(likeliest)
    row = torch.tensor([[0.0, 1.0, 0.5, 0.0, 4.0, 5.0]])
    step = speculative_step(
        counts, lambda tokens, drafts: row.expand(len(drafts) + 1, -1), automaton.processor, Dice(), Fixed(4)
    )
    end = run(step, DecodeState(Request((3,), 20, frozenset({STOP})), (3,)))
    assert (end.state.output, end.reason) == ((4, 5), Reason.STOP)
    assert (end.state.tally.steps, end.state.tally.drafted, end.state.tally.accepted) == (1, 2, 2)
    assert automaton.asked == [(3,), (3, 4)]


def test_a_drafter_is_not_asked_behind_a_stop_token_and_neither_is_its_processor() -> None:
    automaton = Automaton(likeliest)
    row = torch.tensor([[0.0, 1.0, 0.5, 0.0, 4.0, 5.0]])
    drafter = LLMDrafter(lambda tokens, drafts: row.expand(len(drafts) + 1, -1), automaton.processor, Dice())
    drafted = Draft(drafter, Fixed(5))(DecodeState(Request((3,), 20, frozenset({STOP})), (3,)))
    assert drafted.tokens == (4, 5)
    assert automaton.asked == [(3,), (3, 4)]
    assert Draft(counts, Fixed(5))(DecodeState(Request((3,), 20), (3,))).tokens == (4, 5, 0, 1, 2)


BUSH = ((0, TEXT), (1, TEXT), (0, 0), (0, 1), (1, 0))
GAMMAS = {"a chain": 3, "a tree": 5, "a drawn tree": 3}

CERTIFIED: dict[str, Callable[[World], Rule]] = {
    "token rejection": lambda world: Reject(world.rng),
    "sample-and-match": lambda world: Match(world.rng),
    "block verification": lambda world: Block(world.rng),
    "traversal verification": lambda world: Traverse(world.rng),
}


@pytest.mark.parametrize("drafts", ["a chain", "a tree", "a drawn tree"])
@pytest.mark.parametrize("rule", CERTIFIED)
def test_the_certificate_holds_for_laws_that_are_made_lazily(rule: str, drafts: str) -> None:
    """Over the cases' own models: a token that is not the one before, and an automaton that raises where it is."""

    def law(prefix: Tokens, logits: Tensor) -> Distribution:
        assert all(a != b for a, b in pairwise(prefix[1:]))  # a prompt may repeat itself
        scores = logits.clone()
        if len(prefix) > 1:
            scores[prefix[-1]] = -torch.inf
        return Categorical(scores.softmax(-1)) if scores.isfinite().any() else PointMass(1 - prefix[-1])

    def strict(rng: Sampling) -> Processor:
        return EachPrefix(law)

    cases = [Case(2, (0,), 4, seed=15), Case(3, (2,), 3, seed=1), Case(4, (3, 0, 1), 3, frozenset({1}), seed=4)]
    if drafts == "a drawn tree":  # has many more branches
        cases = [Case(2, (0,), 3, seed=15), Case(3, (2,), 3, frozenset({1}), seed=1)]
    cases = [evolve(case, processor=strict) for case in cases]

    def compose(world: World) -> Step:
        model = MultinomialProcessor(1.0)
        drafters: dict[str, Drafter] = {
            "a chain": LLMDrafter(world.drafter, model, world.rng),
            "a tree": lambda tokens: iter([Proposal(token, parent=parent) for token, parent in BUSH]),
            "a drawn tree": LLMDrafter(world.drafter, model, world.rng, widths=(2,)),
        }
        by_rule, gamma = CERTIFIED[rule](world), Fixed(GAMMAS[drafts])
        return verified_step(drafters[drafts], world.target, world.processor, world.rng, by_rule, gamma)

    assert certify(compose, cases=cases).accepted > 0


OVER = 1


def is_over(state: DecodeState) -> bool:
    return state.tokens[-1] == OVER


@pytest.mark.parametrize("drafts", ["certain", "drawn", "drawn behind it", "a tree", "a drawn tree"])
@pytest.mark.parametrize("rule", RULES)
def test_a_draft_that_nothing_can_follow_stands_without_those_behind_it(rule: str, drafts: str) -> None:
    asked: list[Tokens] = []

    def law(prefix: Tokens, logits: Tensor) -> Distribution:
        asked.append(prefix)
        if prefix[-1] == OVER:
            raise DeadEndError("tokens", "the answer is over", OVER, "end it")
        return PointMass(OVER)

    certain, even = Categorical(torch.eye(V)[OVER]), Categorical(torch.full((V,), 1 / V))
    behind = [Proposal(0, even), Proposal(2, even)]
    proposed: dict[str, Sequence[Proposal]] = {
        "certain": chain((OVER, 0, 2)),
        "drawn": [Proposal(OVER, certain), *behind],
        "drawn behind it": [Proposal(OVER), *behind],
        "a tree": [Proposal(OVER), Proposal(0, parent=TEXT), Proposal(2, parent=0), Proposal(3, parent=0)],
        "a drawn tree": [Proposal(OVER, certain), *[evolve(draft, parent=0) for draft in behind]],
    }
    step = RULES[rule](lambda tokens: iter(proposed[drafts]), EachPrefix(law), Dice())
    outcome = step(DecodeState(Request((2,), 9), (2,)))
    assert isinstance(outcome, DecodeState)
    assert outcome.output == (OVER,)
    assert asked == [(2,), (2, OVER)]
    with pytest.raises(DeadEndError, match="the answer is over"):  # no condition has ended the text
        step(outcome)


@pytest.mark.parametrize("drafts", ["a chain", "a drawn chain", "a tree", "a drawn tree"])
@pytest.mark.parametrize("rule", CERTIFIED)
def test_the_certificate_holds_where_drafts_lie_behind_the_end(rule: str, drafts: str) -> None:
    """A draft that would end the answer may still be refused, whatever was drafted behind it."""

    def law(prefix: Tokens, logits: Tensor) -> Distribution:
        assert OVER not in prefix[:-1]
        if prefix[-1] == OVER:
            raise DeadEndError("tokens", "the answer is over", OVER, "end it")
        return Categorical(logits.softmax(-1))

    def strict(rng: Sampling) -> Processor:
        return EachPrefix(law)

    cases = [Case(2, (0,), 4, seed=15), Case(3, (2,), 3, seed=1), Case(4, (3, 0), 3, frozenset({2}), seed=4)]
    cases = [evolve(case, processor=strict) for case in cases[: 2 if drafts == "a drawn tree" else 3]]

    def compose(world: World) -> Step:
        model = MultinomialProcessor(1.0)
        drafters: dict[str, Drafter] = {
            "a chain": lambda tokens: iter(chain((0, OVER, 0))),
            "a drawn chain": LLMDrafter(world.drafter, model, world.rng),
            "a tree": lambda tokens: iter([Proposal(token, parent=parent) for token, parent in BUSH]),
            "a drawn tree": LLMDrafter(world.drafter, model, world.rng, widths=(2,)),
        }
        by_rule, gamma = CERTIFIED[rule](world), Fixed(GAMMAS.get(drafts, 3))
        return verified_step(drafters[drafts], world.target, world.processor, world.rng, by_rule, gamma, until=is_over)

    assert certify(compose, until=is_over, cases=cases).accepted > 0


def test_laws_are_made_once_each_behind_those_before() -> None:
    made: list[int] = []

    def make(row: int) -> PointMass:
        made.append(row)
        return PointMass(row)

    laws = Lazily(4, make)
    assert made == []
    assert (laws[1], laws[0], laws[-3], len(laws)) == (PointMass(1), PointMass(0), PointMass(1), 4)
    assert made == [0, 1]
    with pytest.raises(IndexError):
        laws[4]
