"""Typical acceptance: a lossy rule that keeps drafts which are not unlikely."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import final

from attrs import frozen

from specflow.distribution import BlackBox, Distribution
from specflow.lossy import Lossy
from specflow.processors import Processor
from specflow.random import Sampling
from specflow.stages.verify import Judgement, MatchSamples, judged
from specflow.state import Drafted, Predictor, Proposal, Verified


@final
@frozen
class LossyTypicalAcceptance:
    """Draft x stands iff p(x) > min(ε, α·exp(-H(p))) and all before it stand; the token behind them is drawn from p.

    Lossy: whatever q is, a draft that is likely enough always stands, so the text is drawn towards the drafter's taste.
    Greedy decoding is not affected, since p is a point mass there. A user's sampler is judged by sample-and-match.
    Source: Cai et al. 2401.10774, section 2.3.1; ε and α are those of its code. They choose the token in front of the
    drafts greedily; here it is drawn from p.
    """

    target: Predictor
    processor: Processor
    rng: Sampling
    epsilon: float = 0.09
    alpha: float = 0.3

    def __call__(self, drafted: Drafted, /) -> Lossy[Verified]:
        return Lossy(judged(drafted, self.target, self.processor, self.judge))

    def judge(self, proposals: Sequence[Proposal], laws: Sequence[Distribution], start: int, /) -> Judgement:
        """The rule alone, on laws that are already there."""
        for i, draft in enumerate(proposals):
            p = laws[i]
            if isinstance(p, BlackBox):
                by_samples = MatchSamples(self.target, self.processor, self.rng)
                more, correction = by_samples.judge(proposals[i:], laws[i:], start + i)
                return i + more, correction
            if not p.of(draft.token) > min(self.epsilon, self.alpha * exp(-p.entropy())):
                return i, p
        return len(proposals), laws[-1]
