"""Traversal verification: a tree is judged from its leaves up, so that whole paths stand or fall."""

from __future__ import annotations

from typing import final

from attrs import field, frozen

from specflow.asked import accepts
from specflow.distribution import BlackBox, Categorical, Distribution
from specflow.randomness import Randomness
from specflow.stages.order import a_score
from specflow.stages.rules.block import left_over, mass_of, weight_after
from specflow.stages.rules.odds import Odds
from specflow.stages.rules.reject import Reject
from specflow.stages.rules.samples import is_randomness
from specflow.state import TEXT, Scored, Verdict


@final
@frozen
class Traverse:
    """Traversal verification: block verification of a tree. The first leaf that passes stands with the path to it.

    The text has the weight w = 1. A draft x after one of weight w and law p has min(1, w · p(x) / q(x)). A leaf
    passes with its weight. When nothing after x passes, its parent goes on with p = norm(max(0, w·p - q)) and the
    weight Z / (Z + 1 - w), Z = Σ max(0, w·p - q); when nothing is left after the parent, it is a leaf itself, and p is
    the law of the token after it. The text has exactly the target's law. On a chain this is `Block`.

    Where drafts are certain, or the law of p or q is not known, the drafts before them are leaves, and `Reject`
    judges what follows.
    Source: Weng et al. 2505.12398, algorithm 1.

    >>> from specflow import Dice, GreedyProcessor, Proposal, start
    >>> from specflow.stages import Score
    >>> from specflow.state import Drafted
    >>> from specflow.testing import TableModel
    >>> tree = Proposal(3, parent=TEXT), Proposal(4, parent=TEXT), Proposal(2)
    >>> drafted = Drafted(start((0,), 9).unwrap(), tree)
    >>> Traverse(Dice())(Score(TableModel(5, seed=1), GreedyProcessor())(drafted)).path
    (1, 2)
    """

    rng: Randomness = field(validator=is_randomness)

    def __call__(self, scored: Scored, /) -> Verdict:
        a_score("scored", scored)
        found = self._below(TEXT, 1.0, scored, Odds(scored))
        assert found is not None  # the text passes with weight 1
        leaf, correction = found
        if correction is None:
            return Reject(self.rng).judge_from(leaf, scored)
        return Verdict(scored.drafted.path(leaf), correction)

    def _below(self, here: int, weight: float, scored: Scored, odds: Odds) -> tuple[int, Distribution | None] | None:
        """The draft at or below this one that passes, and what its drafts left of the law, if any were judged."""
        drafted = scored.drafted
        children = drafted.children(here) if weight > 0 else ()
        are_drawn = children and all(isinstance(drafted.proposals[i].q, Categorical) for i in children)
        p = scored.law(here) if are_drawn else None
        if p is None or isinstance(p, BlackBox):
            return (here, None) if accepts(self.rng, weight) else None
        for child in children:
            q = drafted.proposals[child].q
            assert isinstance(q, Categorical)
            found = self._below(child, weight_after(weight, *odds.of(child, p)), scored, odds)
            if found is not None:
                return found
            mass = float(mass_of(weight, p, q))
            p = left_over(weight, mass, p, q)
            weight = mass / (mass + (1.0 - weight)) if mass > 0 else float(weight >= 1)
        return (here, p) if accepts(self.rng, weight) else None
