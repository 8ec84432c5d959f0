"""The laws that tokens are drawn from: a point mass, a categorical law, and a sampler whose law nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite, isnan, log
from typing import Final, TypeAlias, final

import torch
from attrs import field, frozen
from torch import Tensor

from specflow.errors import DeadEndError, DecodeError
from specflow.guards.checks import a, calls, described, is_floats, is_id, named, shown, valid
from specflow.guards.finite import not_finite

TOLERANCE: Final = 1e-4
"""How far from 1 a law's probabilities may sum to: more than rounding to 24 bits makes of the longest row."""

COARSE: Final = 0.01
"""The same in 16 bits: what rounding to 8 bits makes of a long row."""


def max_fn(x: Tensor) -> Tensor:
    """The positive part, normalised: max(0, x) / Σ max(0, x), over the last dimension.

    With x = p - q this is the law that a corrected token is drawn from after a rejection. Where nothing is positive the
    result is all zeros instead of 0/0; `Categorical.residual` then draws from p, since there p = q.
    Source: Leviathan et al. 2211.17192, section 2.3; Chen et al. 2302.01318, algorithm 2.

    >>> max_fn(torch.tensor([0.3, 0.5, 0.2]) - torch.tensor([0.4, 0.3, 0.3]))
    tensor([0., 1., 0.])
    """
    a(Tensor, "give a tensor of differences [..., V]")("x", x)
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
        if is_id(self.token) and self.token < len(rest):  # else q takes nothing from it
            rest[self.token] -= 1.0
        return rest


@final
@frozen(eq=False)
class Origin:
    """Who made laws, and of what: `logits` [k, V], the first of whose rows made the law of the token at `start`."""

    name: str
    logits: Tensor = field(repr=False)
    start: int


@final
@frozen(eq=False)
class Categorical:
    """A law over the vocabulary, `probs` of shape [V], summing to 1. Nothing may write to `probs`.

    `by` tells who made it, once that has been seen to be a law, or will be when it arrives from a device.
    `DecodeError` for what is not a tensor of that shape.

    >>> law = Categorical(torch.tensor([0.25, 0.75]))
    >>> law.of(1), law.of(7), round(law.entropy(), 4)
    (0.75, 0.0, 0.5623)
    """

    probs: Tensor
    by: Origin | None = field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        vector(self.probs)

    def of(self, token: int) -> float:
        """The probability of `token`; 0 for one outside the vocabulary."""
        return float(self.probs[token]) if is_id(token) and token < len(self.probs) else 0.0

    def entropy(self) -> float:
        """H = -Σ p log p, in nats; never below 0, whatever the rounding of `probs`, and NaN where they are no law."""
        return max(-float(torch.special.xlogy(self.probs, self.probs).sum()), 0.0)  # in this order NaN stays NaN

    def residual(self, q: Known) -> Categorical:
        """norm(max(0, p - q)): what is left of p once q has had its chance. Where p = q this is p."""
        rest = q.taken_from(self.probs).clamp(min=0)
        total = rest.sum()
        # Not an `if`: on a device it would wait.
        return Categorical(torch.where(total > 0, rest / total, self.probs), self.by)

    def taken_from(self, probs: Tensor) -> Tensor:
        """probs - q as [V], on the device of `probs`."""
        return probs - self.probs.to(probs.device)


@final
@frozen(eq=False)
class BlackBox:
    """A user's sampler over `probs` [V]: it can be drawn from, but nobody knows its law.

    `sample` takes [1, V] and returns one token. Verification never asks for the probability of a draft here: it
    draws a token and looks whether it is the draft, which is exact whatever `sample` does.

    >>> BlackBox(torch.tensor([0.25, 0.75]), lambda probs: torch.tensor([[2]])).draw()
    Traceback (most recent call last):
    specflow.errors.DecodeError: the sampler <lambda> gives no token of the vocabulary of 2: received tensor([[2]]); \
return one id for each row.
    """

    probs: Tensor
    sample: Callable[[Tensor], Tensor] = field(
        repr=False, validator=valid(calls("a sampler", "give a function from probabilities [1, V] to an id"))
    )

    def __attrs_post_init__(self) -> None:
        vector(self.probs)

    def draw(self) -> int:
        """The sampler's own choice; `DecodeError` where that is not one id of the vocabulary."""
        sample: object = self.sample(self.probs[None])
        token: object = sample.item() if isinstance(sample, Tensor) and sample.numel() == 1 else sample
        if not is_id(token) or token >= len(self.probs):
            happened = f"the sampler {named(self.sample)} gives no token of the vocabulary of {len(self.probs)}"
            raise DecodeError("processor", happened, shown(sample), "return one id for each row")
        return int(token)


Known: TypeAlias = PointMass | Categorical
"""A law whose probabilities can be read."""

Distribution: TypeAlias = PointMass | Categorical | BlackBox
"""Anything a token can be drawn from."""


def vector(probs: object) -> None:
    """Refuses what is not a row of probabilities [V]; the numbers are not looked at."""
    if not is_floats(probs) or probs.ndim != 1 or not probs.numel():
        remedy = "give a tensor of floats [V]"
        raise DecodeError("probs", "a law has no row of probabilities", described(probs), remedy)


def flaw(law: object, vocab_size: int | None = None) -> str | None:
    """What it is that makes a law none; None for a law. On a device it waits for the numbers.

    >>> flaw(Categorical(torch.tensor([0.0, 0.0]))), flaw(PointMass(7), vocab_size=4), flaw(PointMass(3), vocab_size=4)
    ('probabilities that sum to 0', 'certainty of token 7 in a vocabulary of 4', None)
    """
    match law:
        case PointMass(token):
            inside = vocab_size is None or (is_id(token) and token < vocab_size)
            where = "" if inside else f" in a vocabulary of {vocab_size}"
            return None if is_id(token) and inside else f"certainty of token {shown(token)}{where}"
        case Categorical(probs) | BlackBox(probs) if vocab_size not in (None, len(probs)):
            return f"{len(probs)} probabilities for a vocabulary of {vocab_size}"
        case Categorical(probs):
            return flaw_of_sums(float(probs.sum()), float(probs.amin()), probs.dtype)
        case BlackBox(probs):
            return "NaN" if isnan(float(probs.sum())) else None  # what its sampler makes of the rest is its own affair
    return shown(law)


def flaw_of_sums(total: float, least: float, dtype: torch.dtype) -> str | None:
    """The same of a law of this dtype whose probabilities have this sum, and this least among them."""
    if isnan(total) or isnan(least):
        return "NaN"
    if least < 0:
        return f"a probability of {least:.3g}"
    return None if abs(total - 1) <= _tolerance(dtype) else f"probabilities that sum to {total:.6g}"


def lawful(rows: Tensor) -> Tensor:
    """Which of `rows` [..., V] are laws, as bools [...] on their device; nothing waits for them."""
    return ((rows.sum(dim=-1) - 1).abs() <= _tolerance(rows.dtype)) & (rows.amin(dim=-1) >= 0)


def normalised(probs: Tensor) -> Tensor:
    """Probabilities [V] that sum to nearly 1 divided by their sum, in at least fp32. What is no law stays none.

    Whoever draws from a law divides by its sum, and whoever weighs a draft by it does not: else the text's law would
    depend on what is drafted. Nothing waits for a device.

    >>> normalised(torch.tensor([0.25, 0.746], dtype=torch.bfloat16)).sum()
    tensor(1.)
    """
    exact = probs.to(torch.promote_types(probs.dtype, torch.float32))
    total = exact.sum()
    return torch.where((total - 1).abs() <= _tolerance(probs.dtype), exact / total, exact)


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype.itemsize >= 4 else COARSE


def no_law(law: object, position: int, by: Origin | None = None) -> DecodeError:
    """The error that names who left no law for the token at `position`: its processor, or the model's own logits.

    Where nothing has a chance it is a dead end: of the model's logits a processor may have masked all.
    """
    origin = law.by if by is None and isinstance(law, Categorical) else by
    size = None
    if origin is not None:
        row = origin.logits[position - origin.start]
        best = float(row.amax())
        if best == -inf:
            received = f"nothing but -∞ after the token at position {position - 1}"
            remedy = "allow one, or check the weights and the dtype where the model itself says so"
            return DeadEndError("processor", "no token has a chance", received, remedy)
        if not isfinite(best):
            return not_finite(position - 1)
        size = len(row)
    what = flaw(law, size) or "NaN"
    return DecodeError(
        "processor",
        "a law is not valid" if origin is None else f"the law of {origin.name} is not valid",
        f"{what} after the token at position {position - 1}",
        "leave a token some probability, none a negative one, and let all sum to 1",
    )


def normalised_entropy(probs: Tensor) -> float:
    """H(p) / log V of a law [V]: 0 when certain, 1 when uniform.

    >>> round(normalised_entropy(torch.tensor([0.25, 0.25, 0.25, 0.25])), 6)
    1.0
    """
    law = Categorical(probs)
    return law.entropy() / log(len(probs)) if len(probs) > 1 else 0.0
