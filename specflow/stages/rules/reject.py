"""Token rejection, on chains and on trees with drawn siblings."""

from __future__ import annotations

from contextlib import closing
from typing import final

from attrs import field, frozen

from specflow.asked import accepts
from specflow.distribution import BlackBox, Categorical, Distribution, PointMass
from specflow.randomness import Randomness, drawn
from specflow.stages.order import a_score
from specflow.stages.rules.odds import Odds
from specflow.stages.rules.samples import Samples, is_randomness
from specflow.state import TEXT, Drafted, Scored, Verdict


@final
@frozen
class Reject:
    """Token rejection: a drawn draft x stands iff u < p(x) / q(x) and all before it stand.

    At a rejection p becomes norm(max(0, p - q)), against which the next sibling is judged; after the last of them it is
    the law of the correction. The text then has exactly the target's law, and on a chain P(accept) = 1 - TV(p, q).

    A certain draft, one whose q is a point mass, is judged by sample-and-match: s ~ p, and the draft that is s stands,
    or s is emitted. That has the same law and P(accept) = p(x), and takes one draw for each token that it emits:
    with certain drafters a seed gives one text, that of autoregressive decoding. So is a draft where the law of p or q
    is not known (a user's sampler).
    Source: Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318, algorithm 2; for siblings the recursive
    rejection of Miao et al. 2305.09781, section 4.3. Beyond them: p(x) = 0 is always rejected, and a residual without
    mass (p = q) is replaced by p.

    >>> from specflow import Dice, Drafted, GreedyProcessor, Proposal, start
    >>> from specflow.stages import Score
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start([1], 9).unwrap(), (Proposal(0), Proposal(0)))
    >>> Reject(Dice())(Score(TableModel(3, seed=1), GreedyProcessor())(drafted)).path
    (0,)
    """

    rng: Randomness = field(validator=is_randomness)

    def __call__(self, scored: Scored, /) -> Verdict:
        a_score("scored", scored)
        return self.judge_from(TEXT, scored) if scored.drafted.proposals else Verdict(())

    def judge_from(self, here: int, scored: Scored) -> Verdict:
        """The rule for the drafts after draft `here`, which stands."""
        drafted, odds = scored.drafted, Odds(scored)
        with closing(Samples(self.rng, scored, lambda i: _are_certain(drafted, drafted.children(i)))) as samples:
            while children := scored.children(here):
                if _are_certain(drafted, children):
                    sample = samples.after(here)
                    taken = next((i for i in children if drafted.proposals[i].token == sample), None)
                    rest: Distribution = PointMass(sample)
                else:
                    samples.close()
                    taken, rest = self._one_by_one(here, children, scored, odds)
                if taken is None:
                    return Verdict(drafted.path(here), rest)
                here = taken
        return Verdict(drafted.path(here))

    def _one_by_one(
        self, here: int, children: tuple[int, ...], scored: Scored, odds: Odds
    ) -> tuple[int | None, Distribution]:
        """The first of some siblings that stands, if one does, and else what they leave of the law."""
        law = scored.law(here)
        position = len(scored.drafted.state.tokens) + len(scored.drafted.path(here))
        for child in children:
            draft = scored.drafted.proposals[child]
            if isinstance(law, BlackBox) or not isinstance(draft.q, Categorical):
                token = drawn(self.rng, law, position)
                if token == draft.token:
                    return child, law
                law = PointMass(token)
                continue
            likely, drafted = odds.of(child, law)
            if likely > 0 and (likely >= drafted or accepts(self.rng, likely / drafted)):
                return child, law
            law = law.residual(draft.q)
        return None, law


def _are_certain(drafted: Drafted, siblings: tuple[int, ...]) -> bool:
    """Whether there are any, and all of them certain."""
    return bool(siblings) and Categorical not in [type(drafted.proposals[i].q) for i in siblings]
