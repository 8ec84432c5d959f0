"""Drawn trees: different tokens for one place, drawn without replacement, each with its law given the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from math import inf

import torch
from torch import Tensor

from specflow.asked import law_after, laws_of
from specflow.distribution import Categorical, Distribution, PointMass
from specflow.errors import DecodeError
from specflow.processors import Processor
from specflow.randomness import Sampling, drawn, q_of
from specflow.state import BEFORE, TEXT, Proposal, Tokens


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
    each law is made of them by the processor, and is the q of its drafts. Where it says that nothing can follow,
    nothing does. The only draft that can follow the one before it says so, as those of a chain do: it may end a stream.
    """
    drafted: list[Proposal] = []
    level: Sequence[int] = (TEXT,)
    texts = {TEXT: text}
    for depth, width in enumerate(chain(widths, repeat(1))):
        if not level or (levels is not None and depth >= levels):
            return
        first = len(drafted)
        is_chain = len(level) == width == 1
        for here, row in zip(level, rows(tuple(drafted), len(level)), strict=True):
            before = texts[here]
            for token, q in siblings(processor, before, row, rng, width):
                texts[len(drafted)] = (*before, token)
                drafted.append(Proposal(token, q, BEFORE if is_chain else here, source, logits=row))
                yield drafted[-1]
        level = range(first, len(drafted))


def siblings(
    processor: Processor, text: Tokens, logits: Tensor, rng: Sampling, width: int
) -> Iterator[tuple[int, Distribution]]:
    """Up to `width` different tokens that may follow a text, each with the q that it is judged by; `logits` [V].

    After a certain token come those that the processor is certain of where it may not say the ones before.

    >>> from specflow import Dice, GreedyProcessor
    >>> [token for token, _ in siblings(GreedyProcessor(), (0,), torch.tensor([0.5, 2.0, 1.0]), Dice(), 2)]
    [1, 2]
    """
    q = law_after(processor, text, logits)
    taken: list[int] = []
    while q is not None and len(taken) < width:
        taken.append(drawn(rng, q, len(text)))
        yield taken[-1], q_of(rng, q, len(text))
        if len(taken) < width:  # else the law of another would be made, and waited for on a device, for nobody
            q = _without(q, taken, processor, text, logits)


def _without(
    q: Distribution, taken: list[int], processor: Processor, text: Tokens, logits: Tensor
) -> Distribution | None:
    """The law of a token other than those `taken`, the last of them from q; None where there is none."""
    match q:
        case PointMass():
            rest = logits.index_fill(0, torch.tensor(taken, device=logits.device), -inf)
            try:
                other = laws_of(processor, text, rest[None])[0]
            except DecodeError:  # a law was made of these logits before: nothing else has a chance
                return None
            return other if isinstance(other, PointMass) and other.token not in taken else None
        case Categorical(probs, by):
            rest = probs.clone()
            rest[taken[-1]] = 0.0
            total = rest.sum()
            return Categorical(rest / total, by) if total > 0 else None
    return None
