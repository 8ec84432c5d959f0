"""Verify: one target pass over all drafts, and a rule that tells how many of them stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, final

from attrs import frozen

from specflow.distribution import BlackBox, Distribution, PointMass
from specflow.processors import Processor
from specflow.random import Randomness, Sampling, draws
from specflow.stages.probabilities import Probability, probabilities
from specflow.state import Drafted, Predictor, Proposal, Verified

Judgement: TypeAlias = tuple[int, Distribution]
"""How many drafts stand, and the law of the token behind them."""

Rule: TypeAlias = Callable[[Sequence[Proposal], Sequence[Distribution], int], Judgement]
"""(proposals, the laws behind each prefix of them, position of the first) → the judgement. There is one law more."""


def judged(drafted: Drafted, target: Predictor, processor: Processor, rule: Rule) -> Verified:
    """One target pass over all drafts, judged by a rule: what every verification stage does."""
    tokens = drafted.state.tokens + drafted.tokens
    logits = target(tokens, len(drafted.proposals) + 1)
    laws = processor.laws(tokens, logits)
    accepted, correction = rule(drafted.proposals, laws, len(drafted.state.tokens))
    return Verified(drafted, accepted, correction, laws, logits)


@final
@frozen
class RejectTokens:
    """Token rejection: draft x_i stands iff u_i < p(x_i) / q(x_i) and all before it stand.

    At the first refusal the correction is drawn from norm(max(0, p - q)), behind γ accepted drafts from p. The text
    then has exactly the target's law, and P(accept) = 1 - TV(p, q). For a point mass q this is: accept x with
    probability p(x), else draw from p without x. Where the law of p or q is not known (a user's sampler) the position
    is judged by sample-and-match, which is exact too.
    Source: Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318, algorithm 2. Beyond them: p(x) = 0 is
    always refused, and a residual without mass (p = q) is replaced by p.
    """

    target: Predictor
    processor: Processor
    rng: Randomness

    def __call__(self, drafted: Drafted, /) -> Verified:
        return judged(drafted, self.target, self.processor, self.judge)

    def judge(self, proposals: Sequence[Proposal], laws: Sequence[Distribution], start: int, /) -> Judgement:
        """The rule alone, on laws that are already there."""
        of = probabilities(proposals, laws, start)
        for i, draft in enumerate(proposals):
            correction = self._refusal(draft, laws[i], start + i, of)
            if correction is not None:
                return i, correction
        return len(proposals), laws[-1]

    def _refusal(self, draft: Proposal, p: Distribution, position: int, of: Probability) -> Distribution | None:
        """None if the draft stands, else the law of the token in its place."""
        q = draft.q
        if isinstance(p, BlackBox) or isinstance(q, BlackBox):
            sample = self.rng.draw(p, position)
            return None if sample == draft.token else PointMass(sample)
        likely, drafted = of(p, draft.token), of(q, draft.token)
        if likely > 0 and (likely >= drafted or self.rng.accept(likely / drafted)):
            return None
        return p.residual(q)


@final
@frozen
class MatchSamples:
    """Sample-and-match: draw s ~ p at each position and emit it; the draft stands iff it is s.

    Exact whatever the drafts are and however s is drawn, since every emitted token is the target's own sample. For
    point masses it accepts as often as token rejection; for spread drafts less often, unless drafter and target share
    their noise: with `SharedNoise` on both sides this is seed-coupled verification, and the text depends on the seed
    alone, not on the drafter. Source: Daliri et al. 2408.07978, section 3.
    """

    target: Predictor
    processor: Processor
    rng: Sampling

    def __call__(self, drafted: Drafted, /) -> Verified:
        return judged(drafted, self.target, self.processor, self.judge)

    def judge(self, proposals: Sequence[Proposal], laws: Sequence[Distribution], start: int, /) -> Judgement:
        """The rule alone, on laws that are already there."""
        samples = draws(self.rng, laws[:-1], start)
        for i, (draft, sample) in enumerate(zip(proposals, samples, strict=True)):
            if sample != draft.token:
                return i, PointMass(sample)
        return len(proposals), laws[-1]
