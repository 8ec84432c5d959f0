"""Drawn trees: different tokens for one place, drawn without replacement, each with its law given the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat

from torch import Tensor

from specflow.asked import laws_of
from specflow.distribution import Categorical, Distribution, PointMass
from specflow.processors import Processor
from specflow.randomness import Sampling, drawn, q_of
from specflow.state import TEXT, Proposal, Tokens


def drawn_tree(
    text: Tokens,
    rows: Callable[[Sequence[Proposal], int], Tensor],
    processor: Processor,
    rng: Sampling,
    widths: Sequence[int],
    source: str,
    levels: int | None,
) -> Iterator[Proposal]:
    """A tree after a text, level by level: `widths[0]` different tokens after it, `widths[1]` after each of them, and
    so on; deeper, one after each. At most so many `levels`; None for no end.

    `rows(drafts, last)` are the logits [last, V] after the last of some drafts, or after the text where there are none;
    each law is made of them by the processor, and is the q of its drafts.
    """
    drafted: list[Proposal] = []
    level: Sequence[int] = (TEXT,)
    texts = {TEXT: text}
    for depth, width in enumerate(chain(widths, repeat(1))):
        if levels is not None and depth >= levels:
            return
        first = len(drafted)
        for here, row in zip(level, rows(tuple(drafted), len(level)), strict=True):
            before = texts[here]
            law = laws_of(processor, before, row[None])[0]
            for token, q in siblings(law, row, rng, len(before), width):
                texts[len(drafted)] = (*before, token)
                drafted.append(Proposal(token, q, here, source, logits=row))
                yield drafted[-1]
        level = range(first, len(drafted))


def siblings(
    law: Distribution, logits: Tensor, rng: Sampling, position: int, width: int
) -> Iterator[tuple[int, Distribution]]:
    """Up to `width` different tokens of a law made of `logits` [V], each with the q that it is judged by.

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
        yield taken[-1], q_of(rng, q, position)
        if len(taken) < width:  # else the law of another would be made, and waited for on a device, for nobody
            q = _without(q, taken, logits)


def _without(q: Distribution, taken: list[int], logits: Tensor) -> Distribution | None:
    """The law of a token other than those `taken`, the last of them from q; None where there is none."""
    match q:
        case PointMass():
            best: list[int] = logits.topk(min(len(taken) + 1, len(logits))).indices.tolist()
            other = next((token for token in best if token not in taken), None)
            return None if other is None else PointMass(other)
        case Categorical(probs, by):
            rest = probs.clone()
            rest[taken[-1]] = 0.0
            total = rest.sum()
            return Categorical(rest / total, by) if total > 0 else None
    return None
