"""How texts are decoded, and drafts that are as good as one says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Final, final

from attrs import frozen
from torch.nn import Module

from benchmarks.accelerate import Decode, stepping
from specflow import (
    TEXT,
    CachedPredictor,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    Proposal,
    Step,
    Tokens,
    speculative_step,
)
from specflow.bench.stopwatch import clock_for
from specflow.policies import CostAware, CostMeter


@final
@frozen
class Told:
    """Drafts that are right by construction with a probability of `right` each: what drafts cost, whoever makes them.

    With two `branches` each draft has a sibling, which is right with that probability where the draft is not. After
    wrong ones others follow, so that no draft tells by its place whether it is right.
    """

    prompt: Tokens
    truth: Tokens
    size: int
    right: float = 0.8
    branches: int = 1

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        parent, made = TEXT, 0
        for place in range(len(tokens), len(self.prompt) + len(self.truth)):
            random = Random(hash((self.prompt, place)))  # the texts of a batch are not wrong at the same places
            true = self.truth[place - len(self.prompt)]
            guesses = [(true + k) % self.size for k in random.sample(range(1, self.size), self.branches)]
            right = next((i for i in range(self.branches) if random.random() < self.right), None)
            if right is not None:
                guesses[right] = true
            for guess in guesses:
                yield Proposal(guess, parent=parent, source="told")
            parent, made = made + (right or 0), made + len(guesses)


@final
@frozen
class Costing:
    """Drafts that are told, each with one of another drafter that is made and thrown away.

    So what that drafter costs is measured with drafts that are as often right as one says, not as often as its own.
    """

    told: Drafter
    cost: Drafter

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        for draft, _ in zip(self.told(tokens), self.cost(tokens), strict=False):
            yield draft


def costing(told: Callable[[], Drafter], cost: Callable[[], Drafter]) -> Callable[[], Drafter]:
    """Makes such drafters, one for each text."""
    return lambda: Costing(told(), cost())


GAMMA: Final = 4
GREEDY: Final = GreedyProcessor()


def drafting(model: Module, drafter: Callable[[], Drafter], gamma: int = GAMMA) -> Decode:
    """Greedy decoding with drafts, a fixed number a step."""

    def step() -> Step:
        target = CachedPredictor(model)
        return speculative_step(drafter(), target, GREEDY, Dice(), Fixed(gamma), prune=(target,))

    return stepping(step)


def pacing(model: Module, drafter: Callable[[], Drafter], most: int = 8) -> Decode:
    """The same, as many as pay."""
    meter = CostMeter(clock_for(model))
    policy = CostAware(meter, most)

    def step() -> Step:
        target = CachedPredictor(model)
        return speculative_step(drafter(), meter.timed(target), GREEDY, Dice(), policy, prune=(target,))

    return stepping(step)
