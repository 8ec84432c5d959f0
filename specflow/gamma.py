"""How many tokens to draft: gamma policies, values that take proposals from a drafter's lazy stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from math import floor, isfinite, sqrt
from typing import TypeAlias, TypeVar, final

import torch
import torch.nn.functional as F
from attrs import field, frozen

from specflow.distribution import BlackBox, Categorical, Known, PointMass, normalised_entropy
from specflow.errors import DecodeError
from specflow.state import DecodeState, GammaPolicy, Pace, Proposal

T = TypeVar("T")

Stop: TypeAlias = Callable[[Proposal], bool]
"""Whether to draft nothing behind this proposal, which is kept: what was paid for is verified.

Keeping it is also what makes any stop exact: no token is left out because of what it is.
"""


def _at_least_one(instance: object, attribute: object, gamma: int) -> None:
    if gamma < 1:
        raise DecodeError("gamma", "gamma is below 1", gamma, "draft at least one token")


def _positive(instance: object, attribute: object, temperature: float) -> None:
    if not (temperature > 0 and isfinite(temperature)):
        raise DecodeError("temperature", "temperature is not a positive number", temperature, "use 1.0 for raw logits")


def drafter_law(proposal: Proposal, temperature: float = 1.0) -> Known:
    """What the drafter believed: softmax(logits / T), before top-k, top-p or argmax; q itself where it has no logits.

    >>> drafter_law(Proposal(7, PointMass(7))), drafter_law(Proposal(1, PointMass(1), logits=torch.zeros(4)))
    (PointMass(token=7), Categorical(probs=tensor([0.2500, 0.2500, 0.2500, 0.2500])))
    """
    if proposal.logits is not None:
        scores = proposal.logits.to(torch.promote_types(proposal.logits.dtype, torch.float32))
        return Categorical(F.softmax(scores / temperature, dim=-1))
    return Categorical(proposal.q.probs) if isinstance(proposal.q, BlackBox) else proposal.q


@final
@frozen
class Fixed:
    """The same γ at each step: up to `gamma` proposals, fewer where the stream ends. γ ≥ 1, else `DecodeError`.

    It never looks at what it takes, so that it is a policy for the nodes of a tree too.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> stream = (Proposal(token, PointMass(token)) for token in (4, 5, 6))
    >>> [proposal.token for proposal in Fixed(2)(stream, state)[0]]
    [4, 5]
    """

    gamma: int = field(default=5, validator=_at_least_one)

    def __call__(self, stream: Iterator[T], state: DecodeState, /) -> tuple[tuple[T, ...], Pace]:
        return tuple(islice(stream, self.gamma)), state.pace


@final
@frozen
class EGAG:
    """Entropy-guided adaptive gamma: the less the drafter knows about the first token, the fewer it drafts.

    γ = clamp(⌊(1 - H / log V)·γ_max⌋, γ_min, γ_max), with H the entropy in nats of the drafter's softmax(logits / T) at
    the first draft position, before top-k and top-p. With β > 0 it is smoothed, m ← β·m + (1 - β)·γ, and rounded (half
    to even); m starts at the first γ and travels in `state.pace`. The first proposal is one of the γ, so looking at it
    costs no drafter pass. A proposal without logits is judged by its q: an n-gram is certain, H = 0.

    Exact, since γ depends on the text alone. With a large V it hardly adapts: see docs/gamma.md.
    1 ≤ γ_min ≤ γ_max, 0 ≤ β < 1 and T > 0, else `DecodeError`.
    Source: the formula behind the `use_egag` of the function `speculative_generate`.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> guesses = (Proposal(0, PointMass(0), logits=torch.tensor([2.0, 0.0, 0.0, 0.0])) for _ in range(9))
    >>> len(EGAG(gamma_max=8)(guesses, state)[0])  # H / log V = 0.74
    2
    """

    gamma_min: int = 1
    gamma_max: int = 5
    ema_beta: float = 0.0
    temperature: float = field(default=1.0, validator=_positive)

    def __attrs_post_init__(self) -> None:
        if self.gamma_min < 1:
            raise DecodeError("gamma_min", "gamma_min is below 1", self.gamma_min, "draft at least one token")
        if self.gamma_max < self.gamma_min:
            happened = f"gamma_max is below the gamma_min of {self.gamma_min}"
            raise DecodeError("gamma_max", happened, self.gamma_max, "give them in order")
        if not 0 <= self.ema_beta < 1:
            happened = "the EMA coefficient is outside [0, 1)"
            raise DecodeError("egag_ema_beta", happened, self.ema_beta, "use 0 for no smoothing")

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        first = next(stream, None)
        if first is None:
            return (), state.pace
        law = drafter_law(first, self.temperature)
        doubt = 0.0 if isinstance(law, PointMass) else normalised_entropy(law.probs)
        gamma = min(max(floor((1 - doubt) * self.gamma_max), self.gamma_min), self.gamma_max)
        before = state.pace[0] if state.pace else gamma
        mean = self.ema_beta * before + (1 - self.ema_beta) * gamma
        return (first, *islice(stream, round(mean) - 1)), (mean,)


@final
@frozen
class Heuristic:
    """The schedule of transformers: γ + 2 when all drafts of the last step were accepted, else γ - 1.

    γ stays in [1, `gamma_max`]; a step that drafted nothing leaves it. `state.pace` is γ and what the tally was.
    1 ≤ `gamma` ≤ `gamma_max`, else `DecodeError`.
    Source: transformers, `num_assistant_tokens_schedule="heuristic"`, which has no maximum of its own.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> Heuristic(gamma=3)((Proposal(token, PointMass(token)) for token in range(9)), state)[1]
    (3, 0, 0)
    """

    gamma: int = field(default=5, validator=_at_least_one)
    gamma_max: int = 40

    def __attrs_post_init__(self) -> None:
        if self.gamma_max < self.gamma:
            happened = f"gamma_max is below the first gamma of {self.gamma}"
            raise DecodeError("gamma_max", happened, self.gamma_max, "give them in order")

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        tally, gamma = state.tally, self.gamma
        match state.pace:
            case (before, drafted, accepted) if tally.drafted > drafted:
                refused = (tally.drafted - drafted) - (tally.accepted - accepted)
                gamma = max(1, int(before) - 1) if refused else min(self.gamma_max, int(before) + 2)
            case (before, _, _):
                gamma = int(before)
        return tuple(islice(stream, gamma)), (gamma, tally.drafted, tally.accepted)


@final
@frozen
class StopAfter:
    """Takes what the policy `within` takes, but nothing behind the first proposal at which `stop` is true.

    Stops nest: `StopAfter(a, StopAfter(b, EGAG()))` ends at whichever comes first.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> stream = (Proposal(token, PointMass(token)) for token in (4, 5, 6))
    >>> [proposal.token for proposal in StopAfter(lambda proposal: proposal.token == 5)(stream, state)[0]]
    [4, 5]
    """

    stop: Stop
    within: GammaPolicy = Fixed(20)

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        return self.within(self._until_stopped(stream), state)

    def _until_stopped(self, stream: Iterator[Proposal]) -> Iterator[Proposal]:
        for proposal in stream:
            yield proposal
            if self.stop(proposal):
                return


@final
@frozen
class Unsure:
    """A `Stop`: the drafter's probability of its own token is below `confidence`.

    Source: transformers, `assistant_confidence_threshold`, 0.4 by default.

    >>> Unsure()(Proposal(0, PointMass(0), logits=torch.zeros(4))), Unsure()(Proposal(0, PointMass(0)))
    (True, False)
    """

    confidence: float = 0.4
    temperature: float = field(default=1.0, validator=_positive)

    def __call__(self, proposal: Proposal, /) -> bool:
        return drafter_law(proposal, self.temperature).of(proposal.token) < self.confidence


@final
@frozen
class SVIP:
    """A `Stop`: √(c·H) > h, with H the entropy in nats of the drafter's softmax(logits / T).

    √(c·H) estimates the distance TV(p, q), so 1 - √(c·H) the chance of acceptance. The defaults stop at H > 0.6.
    Source: Zhang et al. 2411.18462, section 3; c and h from the authors' code.

    >>> SVIP()(Proposal(0, PointMass(0), logits=torch.zeros(4))), SVIP()(Proposal(0, PointMass(0)))
    (True, False)
    """

    h: float = 0.3
    c: float = 0.15
    temperature: float = field(default=1.0, validator=_positive)

    def __call__(self, proposal: Proposal, /) -> bool:
        return sqrt(self.c * drafter_law(proposal, self.temperature).entropy()) > self.h


@final
@frozen
class AdaEDL:
    """A `Stop`: the bound 1 - √(0.2·H) on the chance of acceptance is below λ.

    λ is fixed here; the paper also moves it with the acceptance rate. The default stops at H > 1.8 nats.
    Source: Agrawal et al. 2410.18351, section 3; the default λ is the confidence threshold of transformers.

    >>> AdaEDL()(Proposal(0, PointMass(0), logits=torch.zeros(8))), AdaEDL()(Proposal(0, PointMass(0)))
    (True, False)
    """

    lambda_: float = 0.4
    temperature: float = field(default=1.0, validator=_positive)

    def __call__(self, proposal: Proposal, /) -> bool:
        return 1 - sqrt(0.2 * drafter_law(proposal, self.temperature).entropy()) < self.lambda_
