"""Stops: draft nothing after a proposal of which the drafter is not sure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf, sqrt
from typing import TypeAlias, final

from attrs import field, frozen

from specflow.distribution import Categorical
from specflow.errors import DecodeError
from specflow.guards import checks
from specflow.guards.checks import calls, number, shown, valid, whole
from specflow.policies.belief import drafter_law, entropy_of, told
from specflow.policies.fixed import Fixed
from specflow.state import DecodeState, GammaPolicy, Pace, Proposal

Stop: TypeAlias = Callable[[Proposal], bool]
"""Whether to draft nothing after this proposal, which is kept: what was paid for is verified.

Keeping it is also what makes any stop exact: no token is left out because of what it is.
"""

_is_threshold = number("the threshold is not a finite number", "use the default")
_is_factor = number("c is not a finite number of 0 or more", "use the default", lambda c: 0 <= c < inf)


@final
@frozen
class StopAfter:
    """Takes what the policy `within` takes, but nothing after the first proposal at which `stop` is true.

    Stops nest: `StopAfter(a, StopAfter(b, EGAG()))` ends at whichever comes first. The pace is that of `within`, and
    threads may share it as they may share `within`. `DecodeError` for a stop that cannot tell true from false.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> stream = (Proposal(token) for token in (4, 5, 6))
    >>> [proposal.token for proposal in StopAfter(lambda proposal: proposal.token == 5)(stream, state)[0]]
    [4, 5]
    """

    stop: Stop = field(validator=valid(calls("a stop", "give a function of a proposal")))
    within: GammaPolicy = field(default=Fixed(20), validator=valid(calls("a gamma policy", "give Fixed(20)")))

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        return self.within(self._until_stopped(stream), state)

    def _until_stopped(self, stream: Iterator[Proposal]) -> Iterator[Proposal]:
        for proposal in stream:
            yield proposal
            verdict: object = self.stop(proposal)
            try:
                is_last = bool(verdict)
            except Exception as error:  # tensors and arrays of several numbers have no truth
                happened = "a stop told neither true nor false"
                raise DecodeError("stop", happened, shown(verdict), "return a bool") from error
            if is_last:
                return


@final
@frozen
class Unsure:
    """A `Stop`: the drafter's probability of its own token is below `confidence`.

    Source: transformers, `assistant_confidence_threshold`, 0.4 by default.

    >>> import torch
    >>> Unsure()(Proposal(0, logits=torch.zeros(4))), Unsure()(Proposal(0))
    (True, False)
    """

    confidence: float = field(default=0.4, validator=valid(_is_threshold))
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __call__(self, proposal: Proposal, /) -> bool:
        law, token = drafter_law(proposal, self.temperature), proposal.token
        if isinstance(law, Categorical):
            whole(0, "draft from the vocabulary that the logits are of", len(law.probs) - 1)("token", token)
        return told(law.of(token)) < self.confidence


@final
@frozen
class SVIP:
    """A `Stop`: √(c·H) > h, with H the entropy in nats of the drafter's softmax(logits / T).

    √(c·H) estimates the distance TV(p, q), so 1 - √(c·H) the chance of acceptance. The defaults stop at H > 0.6.
    Source: Zhang et al. 2411.18462, section 3; c and h from the authors' code.

    >>> import torch
    >>> SVIP()(Proposal(0, logits=torch.zeros(4))), SVIP()(Proposal(0))
    (True, False)
    """

    h: float = field(default=0.3, validator=valid(_is_threshold))
    c: float = field(default=0.15, validator=valid(_is_factor))
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __call__(self, proposal: Proposal, /) -> bool:
        return sqrt(self.c * entropy_of(proposal, self.temperature)) > self.h


@final
@frozen
class AdaEDL:
    """A `Stop`: the bound 1 - √(0.2·H) on the chance of acceptance is below λ.

    λ is fixed here; the paper also moves it with the acceptance rate. The default stops at H > 1.8 nats.
    Source: Agrawal et al. 2410.18351, section 3; the default λ is the confidence threshold of transformers.

    >>> import torch
    >>> AdaEDL()(Proposal(0, logits=torch.zeros(8))), AdaEDL()(Proposal(0))
    (True, False)
    """

    lambda_: float = field(default=0.4, validator=valid(_is_threshold))
    temperature: float = field(default=1.0, validator=valid(checks.temperature))

    def __call__(self, proposal: Proposal, /) -> bool:
        return 1 - sqrt(0.2 * entropy_of(proposal, self.temperature)) < self.lambda_
