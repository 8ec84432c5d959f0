"""Several draft models at once: the target reads a tree with a branch of each (SpecInfer, Miao et al. 2305.09781).

Each branch is a sample with its true q. `Reject` judges siblings one by one, each against what the earlier ones left.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import final

from attrs import evolve, frozen

from specflow import TEXT, Drafter, Fixed, LLMDrafter, Proposal, Step, Tokens, speculative_step
from specflow.testing import CASES, World, certify


@final
@frozen
class Beside:
    """`depth` drafts of each drafter, as branches of one tree."""

    drafters: tuple[Drafter, ...]
    depth: int = 2

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        for drafter in self.drafters:
            for i, proposal in enumerate(islice(drafter(tokens), self.depth)):
                yield proposal if i else evolve(proposal, parent=TEXT)


def decoder(world: World) -> Step:
    """Two independent samples of one model; two models are written in the same way."""
    one = LLMDrafter(world.drafter, world.processor, world.rng)
    drafter = Beside((one, one), depth=1)
    return speculative_step(drafter, world.target, world.processor, world.rng, Fixed(2))


def check() -> None:
    """Exact, sampled and greedy."""
    certify(decoder, cases=CASES[:8])
