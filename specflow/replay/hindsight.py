"""Hindsight: what the best γ would have been, now that the text is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import final

from attrs import define, evolve, field, frozen

from specflow.bench.stopwatch import Stopwatch
from specflow.replay.recording import RecordedText
from specflow.stages import Draft
from specflow.state import TEXT, DecodeState, Drafter, Pace, Proposal, parents_of


@final
@frozen
class Hindsight:
    """The seconds of one text with γ = 0, 1, … at each step (`fixed`), and with the best γ at each step (`best`)."""

    fixed: tuple[float, ...]
    best: float


@final
@define(eq=False)
class _Look:
    """A policy that takes up to `most` drafts and notes when each was there, from `began` on."""

    most: int
    watch: Stopwatch
    began: float = 0.0
    taken: tuple[Proposal, ...] = ()
    seconds: list[float] = field(factory=list)

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        taken = []
        self.seconds = [0.0]  # nobody asks a drafter for no drafts
        for proposal in islice(stream, self.most):
            taken.append(proposal)
            self.seconds.append(self.watch.drafting - self.began)
        self.seconds.append(self.watch.drafting - self.began)  # and when it was known that there are no more
        self.taken = tuple(taken)
        return self.taken, state.pace


def hindsight(drafter: Drafter, text: RecordedText, vocab_size: int, most: int, watch: Stopwatch) -> Hindsight:
    """The drafter is asked at each place of the text, for up to `most` drafts; `watch` times it.

    It has to be a function of the text.
    """
    look = _Look(most, watch)
    draft, begun, costs = Draft(watch.timed(drafter), look), text.state(vocab_size), text.costs
    begin, end = len(text.prompt), len(text.tokens)
    steps: dict[int, list[tuple[int, float]]] = {}
    for here in range(begin, end):
        look.began = watch.drafting
        draft(evolve(begun, tokens=text.tokens[:here]))
        accepted = _accepted(look.taken, text.tokens[here:])
        steps[here] = []
        for gamma in range(most + 1):
            n = min(gamma, len(look.taken))
            seconds = (costs.begin if here == begin else costs.of)(n + 1) + look.seconds[n if n == gamma else n + 1]
            steps[here].append((min(end, here + accepted[n] + 1), seconds + costs.own))
    best = {end: 0.0}
    for here in reversed(range(begin, end)):
        best[here] = min(seconds + best[after] for after, seconds in steps[here])
    return Hindsight(tuple([_walked(steps, begin, end, gamma) for gamma in range(most + 1)]), best[begin])


def _walked(steps: dict[int, list[tuple[int, float]]], here: int, end: int, gamma: int) -> float:
    total = 0.0
    while here < end:
        here, seconds = steps[here][gamma]
        total += seconds
    return total


def _accepted(drafts: Sequence[Proposal], comes: Sequence[int]) -> list[int]:
    """How many of the first 0, 1, … drafts stand if the text goes on like this.

    >>> tree = Proposal(5), Proposal(6, parent=TEXT), Proposal(7, parent=1)
    >>> _accepted(tree, (6, 7, 8))
    [0, 0, 1, 2]
    """
    last, depth, accepted = TEXT, 0, [0]
    for i, (proposal, parent) in enumerate(zip(drafts, parents_of(drafts), strict=True)):
        if parent == last and depth < len(comes) and proposal.token == comes[depth]:
            last, depth = i, depth + 1
        accepted.append(depth)
    return accepted
