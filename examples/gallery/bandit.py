"""γ by a bandit: arms are numbers of drafts, and the reward is what a step yields for its cost (2505.15141).

A policy remembers in its pace: a tuple of floats in the state. So a state that is stepped twice learns the same twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import log, sqrt
from typing import final

from attrs import frozen

from specflow import DecodeState, LLMDrafter, Proposal, Step, speculative_step
from specflow.state import Pace
from specflow.testing import CASES, World, certify


@final
@frozen
class Bandit:
    """UCB1 over `arms`. A step's reward is its tokens over 1 + `price` · drafts; the pace holds (arm, length, n, Σ)."""

    arms: tuple[int, ...] = (1, 2, 3)
    price: float = 0.1

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        k = len(self.arms)
        known = len(state.pace) == 2 + 2 * k
        last, length, *table = state.pace if known else (-1.0, 0.0, *([0.0] * 2 * k))
        pulls, sums = table[:k], table[k:]
        if last >= 0:
            arm = int(last)
            pulls[arm] += 1
            sums[arm] += (len(state.tokens) - length) / (1 + self.price * self.arms[arm])
        arm = max(range(k), key=lambda i: self.worth(pulls[i], sums[i], sum(pulls)))
        return tuple(islice(stream, self.arms[arm])), (float(arm), float(len(state.tokens)), *pulls, *sums)

    def worth(self, pulls: float, total: float, all_pulls: float) -> float:
        """The mean reward and how unsure it is."""
        return total / pulls + sqrt(2 * log(all_pulls) / pulls) if pulls else float("inf")


def decoder(world: World) -> Step:
    """It looks at the text so far and at no draft, so it cannot be wrong."""
    drafter = LLMDrafter(world.drafter, world.processor, world.rng)
    return speculative_step(drafter, world.target, world.processor, world.rng, Bandit())


def check() -> None:
    """Exact, sampled and greedy."""
    certify(decoder, cases=CASES[:8])
