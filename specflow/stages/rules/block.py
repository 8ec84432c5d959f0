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

    A block is what was drawn: it ends before a certain draft, and where the law of p or q is not known (a user's
    sampler), and `Reject` judges the rest. It ends after a draft that cannot stand, p(x) = 0. Of a tree it is the first
    path, and its siblings never stand: for those there is `Traverse`.
    Source: Sun et al. 2403.10444, algorithm 2 and theorems 1 and 2.
    """

    rng: Randomness = field(validator=is_randomness)

    def __call__(self, scored: Scored, /) -> Verdict:
        a_score("scored", scored)
        block, weights = _block(scored)
        path, end = scored.drafted.trunk(TEXT)[1:], len(block)
        if not block or accepts(self.rng, weights[end]):
            return Reject(self.rng).judge_from(path[end - 1] if end else TEXT, scored)
        masses = _masses(weights, block)
        for i in reversed(range(1, end)):
            # 1 - w first: after a sum it would round away a mass that is small, and leave 0 / 0.
            if masses[i] > 0 and accepts(self.rng, masses[i] / (masses[i] + (1.0 - weights[i]))):
                return Verdict(path[:i], left_over(weights[i], masses[i], *block[i]))
        # The empty draft always passes, with weight 1.
        return Verdict((), left_over(weights[0], masses[0], *block[0]))


def _block(scored: Scored) -> tuple[list[_Pair], list[float]]:
    """The laws of the drafts that were drawn, as far as all can stand, and the weights after 0 and more of them."""
    block: list[_Pair] = []
    weights, odds = [1.0], Odds(scored)
    for before, i in zip(trunk := scored.drafted.trunk(TEXT), trunk[1:], strict=False):
        q = scored.drafted.proposals[i].q
        if weights[-1] == 0 or not isinstance(q, Categorical):
            break
        p = scored.law(before)
        if isinstance(p, BlackBox):
            break
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
            return torch.tensor(max(0.0, weight - q.of(token)), dtype=torch.float64)
        case Categorical(probs):
            return _rest(weight, probs, q).sum()


def left_over(weight: float, mass: float, p: Known, q: Known) -> Known:
    """The law that max(0, w·p - q), of this mass, makes; p where it has no mass."""
    return Categorical(_rest(weight, p.probs, q) / mass, p.by) if mass > 0 and isinstance(p, Categorical) else p


def _rest(weight: float, probs: Tensor, q: Known) -> Tensor:
    return q.taken_from(weight * probs).clamp(min=0)
