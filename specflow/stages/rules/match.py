"""Sample-and-match: the target's own samples choose a path through the drafts."""

from __future__ import annotations

from contextlib import closing
from typing import final

from attrs import field, frozen

from specflow.distribution import PointMass
from specflow.randomness import Sampling
from specflow.stages.order import a_score
from specflow.stages.rules.samples import Samples, is_sampling
from specflow.state import TEXT, Scored, Verdict


@final
@frozen
class Match:
    """Sample-and-match: draw s ~ p after the text and emit it; go on after the draft that is s, if there is one.

    Exact whatever the drafts are and however s is drawn, since every emitted token is the target's own sample. For
    certain drafts nothing accepts more often; drafts that were drawn are accepted more often by `Reject`, unless
    drafter and target share their noise: with `SharedNoise` on both sides this is seed-coupled verification, and the
    text depends on the seed alone, not on the drafter.
    Source: Daliri et al. 2408.07978, section 3; for trees Miao et al. 2305.09781 (SpecInfer), section 4, its naive
    sampling.

    >>> from specflow import Dice, Drafted, GreedyProcessor, Proposal, start
    >>> from specflow.stages import Score
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start([1], 9).unwrap(), (Proposal(2), Proposal(0, parent=TEXT)))
    >>> Match(Dice())(Score(TableModel(3, seed=1), GreedyProcessor())(drafted)).path
    (1,)
    """

    rng: Sampling = field(validator=is_sampling)

    def __call__(self, scored: Scored, /) -> Verdict[Sampling]:
        a_score("scored", scored)
        drafted, here = scored.drafted, TEXT
        with closing(Samples(self.rng, scored, lambda i: bool(drafted.children(i)))) as samples:
            while followers := scored.followers(here):
                sample = samples.after(here)
                if sample not in followers:
                    return Verdict(drafted.path(here), PointMass(sample))
                here = followers[sample]
        return Verdict(drafted.path(here))
