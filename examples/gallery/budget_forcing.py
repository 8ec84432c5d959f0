"""Budget forcing: no answer ends before so many tokens were thought (s1, Muennighoff et al. 2501.19393).

A processor forbids the stop tokens until then. It is a part of the target's law, so drafts are exact under it.
"""

from __future__ import annotations

from typing import final

import torch
from attrs import frozen
from torch import Tensor

from specflow import EachPrefix, LLMDrafter, Processor, Tokens, autoregressive_step, run, speculative_step
from specflow.distribution import Distribution
from specflow.testing import CASES, Ending, World, same_law


@final
@frozen
class NotBefore:
    """The law of a processor, without `stop` while the text has fewer than `least` tokens."""

    processor: Processor
    stop: frozenset[int]
    least: int

    def law(self, tokens: Tokens, logits: Tensor, /) -> Distribution:
        """Of logits [V] after `tokens`."""
        if len(tokens) < self.least and self.stop:
            allowed = torch.ones_like(logits, dtype=torch.bool)
            allowed[list(self.stop)] = False
            logits = logits.masked_fill(~allowed, -torch.inf)
        return self.processor.laws(tokens, logits[None])[0]


def thinking(world: World) -> Processor:
    """Two tokens at least after the prompt."""
    request = world.start.request
    return EachPrefix(NotBefore(world.processor, request.stop, len(request.prompt) + 2).law)


def check() -> None:
    """Drafts leave the law under the budget as it is."""

    def drafted(world: World) -> Ending:
        processor = thinking(world)
        drafter = LLMDrafter(world.drafter, world.processor, world.rng)  # it may not know of the budget
        return Ending.of(run(speculative_step(drafter, world.target, processor, world.rng), world.start))

    def plain(world: World) -> Ending:
        return Ending.of(run(autoregressive_step(world.target, thinking(world), world.rng), world.start))

    same_law(drafted, plain, CASES[:6])
