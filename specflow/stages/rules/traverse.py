"""Traversal verification: a tree is judged from its leaves up, so that whole paths stand or fall."""

from __future__ import annotations

from typing import final

from attrs import define, field, frozen

from specflow.asked import accepts
from specflow.distribution import BlackBox, Categorical, Known
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
        leaf = self._passing(scored)
        if leaf.law is None:
            return Reject(self.rng).judge_from(leaf.draft, scored)
        return Verdict(scored.drafted.path(leaf.draft), leaf.law)

    def _passing(self, scored: Scored) -> _Node:
        """The first leaf that passes. No recursion: a chain may be deeper than Python's stack."""
        odds, path = Odds(scored), [_Node.of(TEXT, 1.0, scored)]
        while True:
            here = path[-1]
            if here.law is not None and here.waiting:
                child = here.waiting.pop()
                path.append(_Node.of(child, weight_after(here.weight, *odds.of(child, here.law)), scored))
            elif accepts(self.rng, here.weight):  # as the text does, whose weight stays 1
                return here
            else:
                path.pop()
                path[-1].goes_on_without(here.draft, scored)


@final
@define(eq=False)
class _Node:
    """A draft or the text: its weight, the drafts after it that wait to be judged, and what the others left of its law.

    The law is None where no drafts after it are judged.
    """

    draft: int
    weight: float
    law: Known | None
    waiting: list[int]

    @classmethod
    def of(cls, draft: int, weight: float, scored: Scored) -> _Node:
        """A draft before those after it are judged."""
        drafted = scored.drafted
        children = drafted.children(draft) if weight > 0 else ()
        are_drawn = children and all(isinstance(drafted.proposals[i].q, Categorical) for i in children)
        law = scored.law(draft) if are_drawn and not scored.ends(draft) else None
        return cls(draft, weight, None if isinstance(law, BlackBox) else law, [*reversed(children)])

    def goes_on_without(self, child: int, scored: Scored) -> None:
        """Nothing passed from this draft after it on."""
        q, law = scored.drafted.proposals[child].q, self.law
        assert isinstance(q, Categorical)
        assert law is not None
        mass = float(mass_of(self.weight, law, q))
        self.law = left_over(self.weight, mass, law, q)
        self.weight = mass / (mass + (1.0 - self.weight)) if mass > 0 else float(self.weight >= 1)
