"""Typical acceptance: a lossy rule that keeps drafts which are not unlikely."""

from __future__ import annotations

from math import exp
from typing import final

from attrs import field, frozen

from specflow.distribution import BlackBox, PointMass
from specflow.guards.checks import number, valid
from specflow.lossy import Lossy
from specflow.randomness import Sampling, drawn
from specflow.stages.order import a_score
from specflow.stages.rules.samples import is_sampling
from specflow.state import TEXT, Scored, Verdict

_share = valid(number("it is outside [0, 1]", "give a number between", lambda share: 0 <= share <= 1))


@final
@frozen
class LossyTypical:
    """Draft x stands iff p(x) > min(ε, α·exp(-H(p))) and all before it stand; the token after them is drawn from p.

    Of siblings the first that stands is taken. Lossy: whatever q is, a draft that is likely enough always stands, so
    the text is drawn towards the drafter's taste. Greedy decoding is not affected, since p is a point mass there. A
    user's sampler is judged by sample-and-match.
    Source: Cai et al. 2401.10774, section 2.3.1; ε and α are those of its code. They choose the token in front of the
    drafts greedily; here it is drawn from p.

    >>> from specflow import Dice, GreedyProcessor, chain, start
    >>> from specflow.stages import Score
    >>> from specflow.state import Drafted
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start((0,), 9).unwrap(), chain((4, 3)))
    >>> scored = Score(TableModel(5, seed=1), GreedyProcessor())(drafted)
    >>> LossyTypical(Dice())(scored).value.path
    (0,)
    """

    rng: Sampling = field(validator=is_sampling)
    epsilon: float = field(default=0.09, validator=_share)
    alpha: float = field(default=0.3, validator=_share)

    def __call__(self, scored: Scored, /) -> Lossy[Verdict[Sampling]]:
        a_score("scored", scored)
        drafted, here = scored.drafted, TEXT
        while children := scored.children(here):
            law = scored.law(here)
            if isinstance(law, BlackBox):
                position = len(drafted.state.tokens) + len(drafted.path(here))
                law = PointMass(drawn(self.rng, law, position))
            enough = min(self.epsilon, self.alpha * exp(-law.entropy()))
            taken = next((i for i in children if law.of(drafted.proposals[i].token) > enough), None)
            if taken is None:
                return Lossy(Verdict(drafted.path(here), law))
            here = taken
        return Lossy(Verdict(drafted.path(here)))
