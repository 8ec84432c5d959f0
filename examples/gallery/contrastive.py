"""Contrastive decoding: what the expert prefers more than a weak model does (Li et al. 2210.15097).

The target is a function of two models. That is a predictor like any other, so drafts are exact for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specflow import LLMDrafter, Predictor, Proposal, Step, Tokens, autoregressive_step, run, speculative_step
from specflow.testing import CASES, Ending, World, same_law


def contrastive(expert: Predictor, amateur: Predictor, plausible: float = 0.1) -> Predictor:
    """log p_expert - log p_amateur, among tokens of at least `plausible` times the expert's best probability."""

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        strong = expert(tokens, drafts).log_softmax(-1)
        weak = amateur(tokens, drafts).log_softmax(-1).clamp(min=-50.0)
        least = strong.max(-1, keepdim=True).values + torch.log(torch.tensor(plausible))
        return (strong - weak).masked_fill(strong < least, -torch.inf)

    return predict


def decoder(world: World) -> Step:
    """The amateur drafts, too."""
    drafter = LLMDrafter(world.drafter, world.processor, world.rng)
    return speculative_step(drafter, contrastive(world.target, world.drafter), world.processor, world.rng)


def check() -> None:
    """Drafts leave the law of contrastive decoding as it is."""

    def plain(world: World) -> Ending:
        target = contrastive(world.target, world.drafter)
        return Ending.of(run(autoregressive_step(target, world.processor, world.rng), world.start))

    same_law(lambda world: Ending.of(run(decoder(world), world.start)), plain, CASES[:6])
