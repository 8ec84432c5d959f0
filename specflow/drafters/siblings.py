"""Different tokens for one place: drawn one after the other without replacement, each with its law given the others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from specflow.distribution import Categorical, Distribution, PointMass
from specflow.randomness import Sampling, drawn


def siblings(
    law: Distribution, logits: Tensor, rng: Sampling, position: int, width: int
) -> Iterator[tuple[int, Distribution]]:
    """Up to `width` different tokens of a law made of `logits` [V], each with the law that it was drawn from.

    After a greedy choice they are the tokens with the next largest logits.

    >>> import torch
    >>> from specflow import Dice
    >>> [token for token, _ in siblings(PointMass(1), torch.tensor([0.5, 2.0, 1.0]), Dice(), 0, 2)]
    [1, 2]
    """
    q: Distribution | None = law
    taken: list[int] = []
    while q is not None and len(taken) < width:
        taken.append(drawn(rng, q, position))
        yield taken[-1], q
        q = _without(q, taken, logits)


def _without(q: Distribution, taken: list[int], logits: Tensor) -> Distribution | None:
    """The law of a token other than those `taken`, the last of them from q; None where there is none."""
    match q:
        case PointMass():
            best: list[int] = logits.topk(min(len(taken) + 1, len(logits))).indices.tolist()
            other = next((token for token in best if token not in taken), None)
            return None if other is None else PointMass(other)
        case Categorical(probs):
            rest = probs.clone()
            rest[taken[-1]] = 0.0
            total = rest.sum()
            return Categorical(rest / total) if total > 0 else None
    return None
