"""Typical acceptance: a lossy rule that keeps drafts which are not unlikely."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import final

from attrs import field, frozen

from specflow.checks import number, valid
from specflow.distribution import BlackBox
from specflow.lossy import Lossy
from specflow.processors import Laws, Processor
from specflow.random import Sampling
from specflow.stages.verify import Judgement, by_samples, is_processor, is_sampling, is_target, judged
from specflow.state import Drafted, Predictor, Proposal, Verified

_share = valid(number("it is outside [0, 1]", "give a number between", lambda share: 0 <= share <= 1))


@final
@frozen
class LossyTypicalAcceptance:
    """Draft x stands iff p(x) > min(ε, α·exp(-H(p))) and all before it stand; the token behind them is drawn from p.

    Lossy: whatever q is, a draft that is likely enough always stands, so the text is drawn towards the drafter's taste.
    Greedy decoding is not affected, since p is a point mass there. A user's sampler is judged by sample-and-match.
    Source: Cai et al. 2401.10774, section 2.3.1; ε and α are those of its code. They choose the token in front of the
    drafts greedily; here it is drawn from p.
    """

    target: Predictor = field(validator=is_target)
    processor: Processor = field(validator=is_processor)
    rng: Sampling = field(validator=is_sampling)
    epsilon: float = field(default=0.09, validator=_share)
    alpha: float = field(default=0.3, validator=_share)

    def __call__(self, drafted: Drafted, /) -> Lossy[Verified]:
        return Lossy(judged(drafted, self.target, self.processor, self.judge))

    def judge(self, proposals: Sequence[Proposal], laws: Laws, start: int, /) -> Judgement:
        """The rule alone, on laws that are already there."""
        for i, draft in enumerate(proposals):
            p = laws[i]
            if isinstance(p, BlackBox):
                refusal = by_samples(self.rng, proposals, laws, start, range(i, i + 1))
                if refusal is not None:
                    return refusal
            elif not p.of(draft.token) > min(self.epsilon, self.alpha * exp(-p.entropy())):
                return i, p
        return len(proposals), None
