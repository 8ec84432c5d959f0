"""What a target said after a text: its most probable tokens, and all others as one number."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import inf, log
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from specflow.stages.ngram import top_logits
from specflow.state import Proposal, Tokens, parents_of

NAMED: int = 16
"""How many bytes the name of a text has."""


class Row(NamedTuple):
    """The most probable tokens after a text, the logarithms of their probabilities, and the probability of the rest."""

    tokens: NDArray[numpy.int32]
    logs: NDArray[numpy.float32]
    rest: float


def rows_kept(logits: Tensor, kept: int) -> list[Row]:
    """The `kept` most probable tokens of each row of `logits` [n, V].

    >>> row = rows_kept(torch.tensor([[0.5, 0.25, 0.25]]).log(), 1)[0]
    >>> row.tokens.tolist(), round(row.rest, 6)
    ([0], 0.5)
    """
    exact = logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    logs, tokens = top_logits(exact, kept)
    rest = (1 - logs.double().exp().sum(-1)).clamp(min=0.0).tolist()
    columns = tokens.int().numpy(), logs.float().numpy(), rest
    return [Row(*row) for row in zip(*columns, strict=True)]


def whole(row: Row, vocab_size: int) -> Tensor:
    """The row as logits [V], the rest spread evenly over all tokens that were not kept.

    >>> whole(Row(numpy.array([2]), numpy.array([log(0.5)]), 0.5), 3).exp().tolist()
    [0.25, 0.25, 0.5]
    """
    others = vocab_size - len(row.tokens)
    level = log(row.rest / others) if others and row.rest > 0 else -inf
    lowest = min(level, float(row.logs.min()))
    logits = torch.full((vocab_size,), lowest, dtype=torch.float32, device="cpu")
    logits[torch.from_numpy(row.tokens).long()] = torch.from_numpy(row.logs).float()
    return logits


def names_of(tokens: Tokens, drafts: Sequence[Proposal]) -> list[bytes]:
    """A name for the text, and one for the text and the path down to each draft."""
    begun = [blake2b(numpy.array(tokens, "<i8").tobytes(), digest_size=NAMED)]
    for draft, parent in zip(drafts, parents_of(drafts), strict=True):
        longer = begun[parent + 1].copy()
        longer.update(int(draft.token).to_bytes(8, "little"))
        begun.append(longer)
    return [each.digest() for each in begun]
