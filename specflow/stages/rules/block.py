"""Block verification: the whole draft is judged at once, and more of it stands than when each token is judged alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, final

import torch
from attrs import field, frozen
from torch import Tensor

from specflow.asked import accepts
from specflow.distribution import BlackBox, Categorical, Known, PointMass
from specflow.randomness import Randomness
from specflow.stages.order import a_score
from specflow.stages.rules.odds import Odds
from specflow.stages.rules.reject import Reject
from specflow.stages.rules.samples import is_randomness
from specflow.state import TEXT, Scored, Verdict

_Pair: TypeAlias = tuple[Known, Known]
"""The laws p and q of a draft."""


@final
@frozen
class Block:
    """Block verification: the longest prefix of the draft that passes stands, whatever became of shorter ones.

    With the weights w_0 = 1 and w_i = min(1, w_{i-1} · p(x_i) / q(x_i)), and the mass Z_i = Σ_x max(0, w_i·p - q) of
    what the next draft would leave over, a prefix of i < γ tokens passes with probability Z_i / (Z_i + 1 - w_i), the
    whole draft with w_γ. The correction after i tokens is drawn from norm(max(0, w_i·p - q)), after all from p.
    The text has exactly the target's law, and in expectation a step never accepts fewer tokens than by `Reject`; for
    point masses it is the same rule. As it looks at the longest prefix first, it mostly takes fewer decisions.

    Of a tree the first path is a block. Where it ends, the siblings of the draft that was rejected there are judged in
    the same way, each with the path below it, against what is left of the law; after the last of them that is the law
    of the correction. `Traverse` mostly accepts more drafts of a tree.

    A block is what was drawn: it ends before siblings of which one is certain, and where the law of p or q is not known
    (a user's sampler), and `Reject` judges the rest. It ends after a draft that cannot stand, p(x) = 0, and after
    one that nothing can follow.
    Source: Sun et al. 2403.10444, algorithm 2 and theorems 1 and 2; for siblings Zhou et al. 2601.05724, algorithm 3.
    The latter's hierarchical verification of a chain (algorithm 2) is this rule: its capped ratio
    p(x_1…x_i) / q(x_1…x_i), divided by the largest of those before it and of 1, is w_i.

    >>> from specflow import Dice, GreedyProcessor, Proposal, start
    >>> from specflow.stages import Score
    >>> from specflow.state import Drafted
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start((0,), 9).unwrap(), (Proposal(4), Proposal(3)))
    >>> Block(Dice())(Score(TableModel(5, seed=1), GreedyProcessor())(drafted)).path
    (0,)
    """

    rng: Randomness = field(validator=is_randomness)

    def __call__(self, scored: Scored, /) -> Verdict:
        a_score("scored", scored)
        drafted, odds = scored.drafted, Odds(scored)
        here, siblings = TEXT, drafted.children(TEXT)
        left: Known | None = None
        while siblings:
            path = drafted.trunk(siblings[0])
            block, weights = _block(here, path, left, odds)
            end = len(block)
            if not block or accepts(self.rng, weights[end]):
                here, left = path[end - 1] if end else here, None
                break
            masses = _masses(weights, block)
            passed = self._longest(masses, weights)
            left = left_over(weights[passed], masses[passed], *block[passed])
            if passed:
                here = path[passed - 1]
            siblings = (drafted.children(here) if passed else siblings)[1:]
        return Reject(self.rng).judge_from(here, scored) if left is None else Verdict(drafted.path(here), left)

    def _longest(self, masses: Sequence[float], weights: Sequence[float]) -> int:
        """How many drafts of a block stand that does not stand as a whole."""
        for i in reversed(range(1, len(masses))):
            # 1 - w first: after a sum it would round away a mass that is small, and leave 0 / 0.
            if masses[i] > 0 and accepts(self.rng, masses[i] / (masses[i] + (1.0 - weights[i]))):
                return i
        return 0  # no draft always passes, with weight 1


def _block(here: int, path: Sequence[int], left: Known | None, odds: Odds) -> tuple[list[_Pair], list[float]]:
    """The laws of the drafts of a path that were drawn, as far as all can stand, and the weights after 0 and more.

    `left` is what the siblings before the first of them left of the law after draft `here`, if there were any.
    """
    scored = odds.scored
    proposals = scored.drafted.proposals
    block: list[_Pair] = []
    weights = [1.0]
    for before, i in zip((here, *path), path, strict=False):
        q = proposals[i].q
        are_drawn = all(isinstance(proposals[child].q, Categorical) for child in scored.drafted.children(before))
        if weights[-1] == 0 or not are_drawn or scored.ends(before):
            break
        p = scored.law(before) if block or left is None else left
        if isinstance(p, BlackBox):
            break
        assert isinstance(q, Categorical)
        block.append((p, q))
        weights.append(weight_after(weights[-1], *odds.of(i, p)))
    return block, weights


def weight_after(before: float, likely: float, drafted: float) -> float:
    """min(1, before · p / q), without dividing by 0."""
    scaled = before * likely
    return min(1.0, scaled / drafted) if scaled < drafted else float(scaled > 0)


def _masses(weights: Sequence[float], block: Sequence[_Pair]) -> list[float]:
    """The mass Z of max(0, w·p - q) after each prefix but the whole draft, from a device all in one copy."""
    masses = [mass_of(weight, p, q) for weight, (p, q) in zip(weights, block)]  # noqa: B905 - the whole draft's is left
    numbers: list[float] = torch.stack([mass.to(masses[0]) for mass in masses]).tolist()
    return numbers


def mass_of(weight: float, p: Known, q: Known) -> Tensor:
    """The mass of max(0, w·p - q), on the device of p."""
    match p:
        case PointMass(token):
            return torch.tensor(max(0.0, weight - q.of(token)), dtype=torch.float64, device="cpu")
        case Categorical(probs):
            return _rest(weight, probs, q).sum()


def left_over(weight: float, mass: float, p: Known, q: Known) -> Known:
    """The law that max(0, w·p - q), of this mass, makes; p where it has no mass."""
    return Categorical(_rest(weight, p.probs, q) / mass, p.by) if mass > 0 and isinstance(p, Categorical) else p


def _rest(weight: float, probs: Tensor, q: Known) -> Tensor:
    return q.taken_from(weight * probs).clamp(min=0)
