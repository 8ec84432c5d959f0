"""Entropy-guided γ."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import floor
from typing import NamedTuple, final

from attrs import field, frozen

from specflow.distribution import PointMass, normalised_entropy
from specflow.errors import DecodeError
from specflow.guards import checks
from specflow.guards.checks import drafts, number, valid
from specflow.policies.belief import drafter_law, told
from specflow.policies.choice import are_numbers
from specflow.state import DecodeState, Pace, Proposal

is_coefficient = number("the EMA coefficient is outside [0, 1)", "use 0 for no smoothing", lambda beta: 0 <= beta < 1)


class EGAGPace(NamedTuple):
    """What `EGAG` carries between steps: the smoothed γ."""

    mean: float


@final
@frozen
class EGAG:
    """Entropy-guided adaptive gamma: the less the drafter knows about the first token, the fewer it drafts.

    γ = clamp(⌊(1 - H / log V)·γ_max⌋, γ_min, γ_max), with H the entropy in nats of the drafter's softmax(logits / T) at
    the first draft position, before top-k and top-p; of q where a proposal has no logits. With β > 0 it is smoothed,
    m ← β·m + (1 - β)·γ, and rounded (half to even); m starts at the first γ and travels in `state.pace`.

    Exact, since γ depends on the text alone. With a large V it hardly adapts: see docs/gamma.md. Threads may share it.
    A pace of another policy is a fresh start, and an m of other bounds counts as the nearest within these.
    1 ≤ γ_min ≤ γ_max, 0 ≤ β < 1 and T > 0, else `DecodeError`.
    Source: the formula of `use_egag` in the function `speculative_generate`.

    >>> import torch
    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> guesses = (Proposal(0, logits=torch.tensor([2.0, 0.0, 0.0, 0.0])) for _ in range(9))
    >>> len(EGAG(gamma_max=8)(guesses, state)[0])  # H / log V = 0.74
    2
    """

    gamma_min: int = field(default=1, validator=valid(drafts))
    gamma_max: int = field(default=5, validator=valid(drafts))
    ema_beta: float = 0.0
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __attrs_post_init__(self) -> None:
        is_coefficient("egag_ema_beta", self.ema_beta)
        if self.gamma_max < self.gamma_min:
            happened = f"gamma_max is below the gamma_min of {self.gamma_min}"
            raise DecodeError("gamma_max", happened, self.gamma_max, "give them in order")

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        first = next(stream, None)
        if first is None:
            return (), state.pace
        law = drafter_law(first, self.temperature)
        doubt = 0.0 if isinstance(law, PointMass) else told(normalised_entropy(law.probs))
        gamma = self._within(floor((1 - doubt) * self.gamma_max))
        match state.pace:
            case EGAGPace(before) if are_numbers(state.pace):
                beta = float(self.ema_beta)  # numpy's would make a mean that the next step takes for no number
                mean = beta * self._within(before) + (1 - beta) * gamma
            case _:
                mean = float(gamma)
        return (first, *islice(stream, round(mean) - 1)), EGAGPace(mean)

    def _within(self, gamma: float) -> float:
        return min(max(gamma, self.gamma_min), self.gamma_max)
