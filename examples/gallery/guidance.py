"""Classifier-free guidance: away from what the model would say without the prompt (Sanchez et al. 2306.17806).

Two readings of one model make the target, and the drafter knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specflow import Fixed, Predictor, Proposal, Step, SuffixDrafter, Tokens, autoregressive_step, run, speculative_step
from specflow.testing import CASES, Ending, World, same_law


def guided(model: Predictor, prompt: int, strength: float = 1.5) -> Predictor:
    """u + strength · (c - u): c with the whole text, u with the text without the first `prompt` tokens, but one."""

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        given = model(tokens, drafts).log_softmax(-1).clamp(min=-50.0)
        free = model(tokens[max(0, prompt - 1) :], drafts).log_softmax(-1).clamp(min=-50.0)
        return free + strength * (given - free)

    return predict


def decoder(world: World) -> Step:
    """With what the text repeats as drafts."""
    target = guided(world.target, len(world.start.request.prompt))
    return speculative_step(SuffixDrafter(), target, world.processor, world.rng, Fixed(2))


def check() -> None:
    """Drafts leave the law of guided decoding as it is."""

    def plain(world: World) -> Ending:
        target = guided(world.target, len(world.start.request.prompt))
        return Ending.of(run(autoregressive_step(target, world.processor, world.rng), world.start))

    same_law(lambda world: Ending.of(run(decoder(world), world.start)), plain, CASES[:6])
