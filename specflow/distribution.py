"""The laws that tokens are drawn from: a point mass, a categorical law, and a sampler whose law nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import TypeAlias, final

import torch
from attrs import field, frozen
from torch import Tensor


def max_fn(x: Tensor) -> Tensor:
    """The positive part, normalised: max(0, x) / Σ max(0, x), over the last dimension.

    With x = p - q this is the law that a corrected token is drawn from after a refusal. Where nothing is positive the
    result is all zeros instead of 0/0; `Categorical.residual` then draws from p, since there p = q.
    Source: Leviathan et al. 2211.17192, section 2.3; Chen et al. 2302.01318, algorithm 2.

    >>> max_fn(torch.tensor([0.3, 0.5, 0.2]) - torch.tensor([0.4, 0.3, 0.3]))
    tensor([0., 1., 0.])
    """
    positive = x.clamp(min=0)
    total = positive.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, positive / total, torch.zeros_like(positive))


@final
@frozen
class PointMass:
    """Certainty: the law of a greedy choice, and of a draft that came from a table rather than from a die.

    >>> PointMass(7).of(7), PointMass(7).of(3), PointMass(7).entropy()
    (1.0, 0.0, 0.0)
    """

    token: int

    def of(self, token: int) -> float:
        """The probability of `token`: 1 or 0."""
        return 1.0 if token == self.token else 0.0

    def entropy(self) -> float:
        """H = 0 nats."""
        return 0.0

    def residual(self, q: Known) -> PointMass:
        """norm(max(0, p - q)) is p itself: whatever q takes away, only this token has mass."""
        return self

    def taken_from(self, probs: Tensor) -> Tensor:
        """probs - q as [V], in a tensor of its own."""
        rest = probs.clone()
        rest[self.token] -= 1.0
        return rest


@final
@frozen(eq=False)
class Categorical:
    """A law over the vocabulary, `probs` of shape [V], summing to 1. Nothing may write to `probs`.

    >>> law = Categorical(torch.tensor([0.25, 0.75]))
    >>> law.of(1), round(law.entropy(), 4)
    (0.75, 0.5623)
    """

    probs: Tensor

    def of(self, token: int) -> float:
        """The probability of `token`."""
        return float(self.probs[token])

    def entropy(self) -> float:
        """H = -Σ p log p, in nats; never below 0, whatever the rounding of `probs`, and NaN where they are no law."""
        return max(-float(torch.special.xlogy(self.probs, self.probs).sum()), 0.0)  # in this order NaN stays NaN

    def residual(self, q: Known) -> Categorical:
        """norm(max(0, p - q)): what is left of p once q has had its chance. Where p = q this is p."""
        rest = q.taken_from(self.probs).clamp(min=0)
        total = rest.sum()
        # Not an `if`: on a device it would wait.
        return Categorical(torch.where(total > 0, rest / total, self.probs))

    def taken_from(self, probs: Tensor) -> Tensor:
        """probs - q as [V], on the device of `probs`."""
        return probs - self.probs.to(probs.device)


@final
@frozen(eq=False)
class BlackBox:
    """A user's sampler over `probs` [V]: it can be drawn from, but nobody knows its law.

    `sample` takes [1, V] and returns one token. Verification never asks for the probability of a draft here: it
    draws a token and looks whether it is the draft, which is exact whatever `sample` does.
    """

    probs: Tensor
    sample: Callable[[Tensor], Tensor] = field(repr=False)

    def draw(self) -> int:
        """The sampler's own choice."""
        return int(self.sample(self.probs[None]))


Known: TypeAlias = PointMass | Categorical
"""A law whose probabilities can be read."""

Distribution: TypeAlias = PointMass | Categorical | BlackBox
"""Anything a token can be drawn from."""


def normalised_entropy(probs: Tensor) -> float:
    """H(p) / log V of a law [V]: 0 when certain, 1 when uniform.

    >>> round(normalised_entropy(torch.tensor([0.25, 0.25, 0.25, 0.25])), 6)
    1.0
    """
    return Categorical(probs).entropy() / log(len(probs)) if len(probs) > 1 else 0.0
