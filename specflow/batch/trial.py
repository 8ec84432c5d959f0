"""Whether a model reads several texts in one pass as it reads each alone: found out by trying."""

from __future__ import annotations

from random import Random
from typing import Final

import torch
from torch import Tensor

from specflow.batch.ragged import Piece, joins, new_past, read_together
from specflow.caches import Shelves
from specflow.predictors.reader import Reader
from specflow.predictors.trial import error_bound, error_of
from specflow.predictors.watch import Findings
from specflow.state import TEXT
from specflow.trees import path_to

TREE: Final = (TEXT, TEXT, 0, 2, 1)
"""The drafts that the trial reads after one of its texts, by their parents."""

CHAIN: Final = (TEXT, 0, 1, 2, 3)
"""The same for a model that cannot read trees."""


_JOINS: Final = Findings[bool](bool)


def reads_together(reader: Reader, over: int, *, trees: bool) -> bool:
    """Whether texts of more than `over` tokens are read beside others, short ones among them, as they are alone: with
    trees of drafts, or at least with chains.

    Tried once for each dtype, kind of device, implementation of attention and set of adapters, and again when modules
    were replaced, or weights by some of another kind; what went wrong also when the weights have changed.
    """
    if not joins(reader):
        return False
    look = reader.watch.look()
    key = (over, trees, reader.dtype, reader.device.type, *look.kind)
    return _JOINS.of(reader.model, key, look, lambda: _try(reader, over, TREE if trees else CHAIN))


def _try(reader: Reader, over: int, drafts: tuple[int, ...]) -> bool:
    """Three texts, one of them short, read together from their beginnings and then on, with drafts after two of
    them, and on after a path of the first's: all rows are compared with those of fresh passes."""
    vocab_size, context = reader.limits.vocab_size, reader.limits.context
    lengths = [over + 6, 4, over + 4]
    if vocab_size is None or (context is not None and max(lengths) + 6 > context):
        return False
    random = Random(over)
    texts = [random.choices(range(vocab_size), k=length + 6) for length in lengths]
    shelves = Shelves()
    pasts = [new_past(reader, shelves) for _ in texts]

    def step(news: list[int], tree: int | None = None) -> list[Tensor]:
        """The next `news` tokens of each text, in one pass; those of text `tree` are its drafts."""
        pieces = []
        for i, (text, past, new) in enumerate(zip(texts, pasts, news, strict=True)):
            ids = tuple(text[past.length : past.length + new])
            pieces.append(Piece(past, ids, drafts if i == tree else tuple(range(-1, new - 1)), min(new, len(drafts))))
        return read_together(reader, pieces)

    def fresh(text: list[int], last: int) -> Tensor:
        return reader.read_afresh(tuple(text), last)

    try:
        pairs = []
        for text, length, rows in zip(texts, lengths, step(lengths), strict=True):
            pairs.append((rows, fresh(text[:length], len(rows))))
        drafted, chained, one = step([len(drafts), 2, 1], tree=0)
        for i, row in enumerate(drafted):
            path = [texts[0][lengths[0] + k] for k in path_to(drafts, i)]
            pairs.append((row[None], fresh(texts[0][: lengths[0]] + path, 1)))
        pairs.append((chained, fresh(texts[1][: lengths[1] + 2], 2)))
        pairs.append((one, fresh(texts[2][: lengths[2] + 1], 1)))
        pasts[0].keep(lengths[0], kept := path_to(drafts, 3))
        texts[0][lengths[0] : -1] = [texts[0][lengths[0] + k] for k in kept]
        for text, past, rows in zip(texts, list(pasts), step([1, 1, 1]), strict=True):
            pairs.append((rows, fresh(text[: past.length], 1)))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model raises here says that it cannot be read so
        return False
    # Row by row: of several, `error_of` passes over the worst in half precision.
    together, alone = (torch.cat(rows)[:, None].unbind() for rows in zip(*pairs, strict=True))
    return max(map(error_of, together, alone)) <= error_bound(reader.rounding)
