"""Drafting while the target verifies (PEARL, Liu et al. 2408.11850): a thread drafts on, from the text as it hopes.

It stays a function of the text: what was drafted ahead is used where the text came out as hoped, and else drafted anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import final

from attrs import field, frozen

from specflow import Drafter, Fixed, PromptLookup, Proposal, Step, Tokens, speculative_step
from specflow.testing import CASES, World, certify


@final
@frozen(eq=False)
class Ahead:
    """`gamma` drafts of a certain drafter, and meanwhile those after them and one more token."""

    drafter: Drafter
    gamma: int
    pool: ThreadPoolExecutor
    waiting: dict[Tokens, Future[tuple[Proposal, ...]]] = field(factory=dict)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        hoped = self.waiting.pop(tokens, None)
        drafts = self.drafts(tokens, self.gamma + 1) if hoped is None else hoped.result()
        if len(drafts) > self.gamma:
            expected = (*tokens, *[draft.token for draft in drafts])
            self.waiting[expected] = self.pool.submit(self.drafts, expected, self.gamma + 1)
        yield from drafts[: self.gamma]

    def drafts(self, tokens: Tokens, count: int) -> tuple[Proposal, ...]:
        """The first `count` drafts after a text."""
        return tuple(islice(self.drafter(tokens), count))


def check() -> None:
    """Exact, sampled and greedy."""
    with ThreadPoolExecutor(1) as pool:

        def decoder(world: World) -> Step:
            drafter = Ahead(PromptLookup(), 2, pool)
            return speculative_step(drafter, world.target, world.processor, world.rng, Fixed(2))

        certify(decoder, cases=CASES[:8])
