"""How many tokens to draft: gamma policies, values that take proposals from a drafter's lazy stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from math import floor, inf, isnan, sqrt
from typing import NamedTuple, TypeAlias, TypeVar, final

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Tensor

from specflow import checks
from specflow.checks import a, calls, drafts, number, shown, valid, whole
from specflow.distribution import BlackBox, Categorical, Known, PointMass, normalised_entropy
from specflow.errors import DecodeError
from specflow.state import DecodeState, GammaPolicy, Pace, Proposal

T = TypeVar("T")

Stop: TypeAlias = Callable[[Proposal], bool]
"""Whether to draft nothing behind this proposal, which is kept: what was paid for is verified.

Keeping it is also what makes any stop exact: no token is left out because of what it is.
"""


_is_threshold = number("the threshold is not a finite number", "use the default")
_is_factor = number("c is not a finite number of 0 or more", "use the default", lambda c: 0 <= c < inf)
_is_coefficient = number("the EMA coefficient is outside [0, 1)", "use 0 for no smoothing", lambda beta: 0 <= beta < 1)


def are_numbers(pace: tuple[object, ...]) -> bool:
    """Whether a pace holds finite numbers and nothing else, so that its policy can go on from it.

    >>> are_numbers((2.5, 7)), are_numbers((float("nan"),))
    (True, False)
    """
    return all(isinstance(number, int | float) and -inf < number < inf for number in pace)


def drafter_law(proposal: Proposal, temperature: float = 1.0) -> Known:
    """What the drafter believed: softmax(logits / T), before top-k, top-p or argmax; q itself where it has no logits.

    `DecodeError` where the logits are no row [V] of numbers, where q is no law, and for a T that is no temperature.

    >>> drafter_law(Proposal(7, PointMass(7))), drafter_law(Proposal(1, PointMass(1), logits=torch.zeros(4)))
    (PointMass(token=7), Categorical(probs=tensor([0.2500, 0.2500, 0.2500, 0.2500])))
    """
    a(Proposal, "have the drafter yield proposals")("proposal", proposal)
    checks.temperature("temperature", temperature)
    match proposal.logits, proposal.q:
        case Tensor() as logits, _ if logits.ndim == 1 and len(logits) and not (logits.is_complex() or logits.is_meta):
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # Behind the largest of them: divided by a small T they would be beyond floats.
            return Categorical(F.softmax((scores - scores.amax()) / float(temperature), dim=-1))
        case None, BlackBox(probs):
            return Categorical(probs)
        case None, PointMass() | Categorical():
            return proposal.q
        case None, _:
            raise DecodeError(
                "drafter", "a proposal's q is no law", shown(proposal.q), "give a PointMass or Categorical"
            )
    happened, remedy = "the logits of a proposal are no row of numbers", "give a tensor [V], or leave them out"
    raise DecodeError("drafter", happened, shown(proposal.logits), remedy)


def _entropy(proposal: Proposal, temperature: float) -> float:
    """H of the drafter's law, in nats."""
    return _told(drafter_law(proposal, temperature).entropy())


def _told(number: float) -> float:
    """A number that was made of a drafter's law; NaN was made of none."""
    if isnan(number):
        happened, remedy = "the drafter's law is none: its logits are not finite", "check its weights and dtype"
        raise DecodeError("drafter", happened, "NaN or infinity", remedy)
    return number


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

    gamma: int = field(default=5, validator=valid(drafts))

    def __call__(self, stream: Iterator[T], state: DecodeState, /) -> tuple[tuple[T, ...], Pace]:
        return tuple(islice(stream, self.gamma)), state.pace


class EGAGPace(NamedTuple):
    """What `EGAG` carries between steps: the smoothed γ."""

    mean: float


@final
@frozen
class EGAG:
    """Entropy-guided adaptive gamma: the less the drafter knows about the first token, the fewer it drafts.

    γ = clamp(⌊(1 - H / log V)·γ_max⌋, γ_min, γ_max), with H the entropy in nats of the drafter's softmax(logits / T) at
    the first draft position, before top-k and top-p. With β > 0 it is smoothed, m ← β·m + (1 - β)·γ, and rounded (half
    to even); m starts at the first γ and travels in `state.pace`. The first proposal is one of the γ, so looking at it
    costs no drafter pass. A proposal without logits is judged by its q: an n-gram is certain, H = 0.

    Exact, since γ depends on the text alone. With a large V it hardly adapts: see docs/gamma.md. Threads may share it.
    A pace of another policy is a fresh start, and an m of other bounds counts as the nearest within these.
    1 ≤ γ_min ≤ γ_max, 0 ≤ β < 1 and T > 0, else `DecodeError`.
    Source: the formula behind the `use_egag` of the function `speculative_generate`.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> guesses = (Proposal(0, PointMass(0), logits=torch.tensor([2.0, 0.0, 0.0, 0.0])) for _ in range(9))
    >>> len(EGAG(gamma_max=8)(guesses, state)[0])  # H / log V = 0.74
    2
    """

    gamma_min: int = field(default=1, validator=valid(drafts))
    gamma_max: int = field(default=5, validator=valid(drafts))
    ema_beta: float = 0.0
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __attrs_post_init__(self) -> None:
        _is_coefficient("egag_ema_beta", self.ema_beta)
        if self.gamma_max < self.gamma_min:
            happened = f"gamma_max is below the gamma_min of {self.gamma_min}"
            raise DecodeError("gamma_max", happened, self.gamma_max, "give them in order")

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        first = next(stream, None)
        if first is None:
            return (), state.pace
        law = drafter_law(first, self.temperature)
        doubt = 0.0 if isinstance(law, PointMass) else _told(normalised_entropy(law.probs))
        gamma = self._within(floor((1 - doubt) * self.gamma_max))
        match state.pace:
            case EGAGPace(before) if are_numbers(state.pace):
                mean = self.ema_beta * self._within(before) + (1 - self.ema_beta) * gamma
            case _:
                mean = float(gamma)
        return (first, *islice(stream, round(mean) - 1)), EGAGPace(mean)

    def _within(self, gamma: float) -> float:
        return min(max(gamma, self.gamma_min), self.gamma_max)


class HeuristicPace(NamedTuple):
    """What `Heuristic` carries between steps: γ, and what the tally was."""

    gamma: float
    drafted: float
    accepted: float


@final
@frozen
class Heuristic:
    """The schedule of transformers: γ + 2 when all drafts of the last step were accepted, else γ - 1.

    γ stays in [1, `gamma_max`]; a step that drafted nothing leaves it. `state.pace` is γ and what the tally was. A pace
    of another policy, or one that this text's tally cannot have come from, is a fresh start. Threads may share it.
    1 ≤ `gamma` ≤ `gamma_max`, else `DecodeError`.
    Source: transformers, `num_assistant_tokens_schedule="heuristic"`, which has no maximum of its own.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> Heuristic(gamma=3)((Proposal(token, PointMass(token)) for token in range(9)), state)[1]
    HeuristicPace(gamma=3, drafted=0, accepted=0)
    """

    gamma: int = field(default=5, validator=valid(drafts))
    gamma_max: int = field(default=40, validator=valid(drafts))

    def __attrs_post_init__(self) -> None:
        if self.gamma_max < self.gamma:
            happened = f"gamma_max is below the first gamma of {self.gamma}"
            raise DecodeError("gamma_max", happened, self.gamma_max, "give them in order")

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        tally, gamma = state.tally, self.gamma
        match state.pace:
            case HeuristicPace(before, drafted, accepted) if are_numbers(state.pace):
                judged, stood = tally.drafted - drafted, tally.accepted - accepted
                if 0 <= stood <= judged:
                    change = 0 if judged == 0 else 2 if stood == judged else -1
                    gamma = min(max(int(before) + change, 1), self.gamma_max)
        return tuple(islice(stream, gamma)), HeuristicPace(gamma, tally.drafted, tally.accepted)


@final
@frozen
class StopAfter:
    """Takes what the policy `within` takes, but nothing behind the first proposal at which `stop` is true.

    Stops nest: `StopAfter(a, StopAfter(b, EGAG()))` ends at whichever comes first. The pace is that of `within`, and
    threads may share it as they may share `within`. `DecodeError` for a stop that cannot tell true from false.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> stream = (Proposal(token, PointMass(token)) for token in (4, 5, 6))
    >>> [proposal.token for proposal in StopAfter(lambda proposal: proposal.token == 5)(stream, state)[0]]
    [4, 5]
    """

    stop: Stop = field(validator=valid(calls("a stop", "give a function of a proposal")))
    within: GammaPolicy = field(
        default=Fixed(20), validator=valid(calls("a gamma policy", "give one, such as Fixed(20)"))
    )

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        return self.within(self._until_stopped(stream), state)

    def _until_stopped(self, stream: Iterator[Proposal]) -> Iterator[Proposal]:
        for proposal in stream:
            yield proposal
            if _verdict(self.stop(proposal)):
                return


def _verdict(verdict: object) -> bool:
    try:
        return bool(verdict)
    except Exception as error:  # tensors and arrays of several numbers have no truth
        raise DecodeError("stop", "a stop told neither true nor false", shown(verdict), "return a bool") from error


@final
@frozen
class Unsure:
    """A `Stop`: the drafter's probability of its own token is below `confidence`.

    Source: transformers, `assistant_confidence_threshold`, 0.4 by default.

    >>> Unsure()(Proposal(0, PointMass(0), logits=torch.zeros(4))), Unsure()(Proposal(0, PointMass(0)))
    (True, False)
    """

    confidence: float = field(default=0.4, validator=valid(_is_threshold))
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __call__(self, proposal: Proposal, /) -> bool:
        law, token = drafter_law(proposal, self.temperature), proposal.token
        if isinstance(law, Categorical):
            whole(0, "draft from the vocabulary that the logits are of", len(law.probs) - 1)("token", token)
        return _told(law.of(token)) < self.confidence


@final
@frozen
class SVIP:
    """A `Stop`: √(c·H) > h, with H the entropy in nats of the drafter's softmax(logits / T).

    √(c·H) estimates the distance TV(p, q), so 1 - √(c·H) the chance of acceptance. The defaults stop at H > 0.6.
    Source: Zhang et al. 2411.18462, section 3; c and h from the authors' code.

    >>> SVIP()(Proposal(0, PointMass(0), logits=torch.zeros(4))), SVIP()(Proposal(0, PointMass(0)))
    (True, False)
    """

    h: float = field(default=0.3, validator=valid(_is_threshold))
    c: float = field(default=0.15, validator=valid(_is_factor))
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __call__(self, proposal: Proposal, /) -> bool:
        return sqrt(self.c * _entropy(proposal, self.temperature)) > self.h


@final
@frozen
class AdaEDL:
    """A `Stop`: the bound 1 - √(0.2·H) on the chance of acceptance is below λ.

    λ is fixed here; the paper also moves it with the acceptance rate. The default stops at H > 1.8 nats.
    Source: Agrawal et al. 2410.18351, section 3; the default λ is the confidence threshold of transformers.

    >>> AdaEDL()(Proposal(0, PointMass(0), logits=torch.zeros(8))), AdaEDL()(Proposal(0, PointMass(0)))
    (True, False)
    """

    lambda_: float = field(default=0.4, validator=valid(_is_threshold))
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __call__(self, proposal: Proposal, /) -> bool:
        return 1 - sqrt(0.2 * _entropy(proposal, self.temperature)) < self.lambda_
