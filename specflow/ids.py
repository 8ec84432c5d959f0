"""Token ids as plain ints, of whatever plainly holds them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from numbers import Integral

import numpy
import torch
from torch import Tensor

from specflow.checks import shown
from specflow.errors import DecodeError
from specflow.state import Tokens

REMEDY = "give plain ints, such as tokenizer(text).input_ids"


def ids_of(name: str, ids: object) -> Tokens:
    """The ids in a sequence of whole numbers, or in a tensor or numpy array of one row, [n] or [1, n].

    `DecodeError`, naming the parameter `name`, for anything else: texts, floats, bools, several rows, a meta tensor.

    >>> ids_of("inputs", torch.tensor([[5, 6]])), ids_of("inputs", range(3))
    ((5, 6), (0, 1, 2))
    """
    if isinstance(ids, Tensor | numpy.ndarray):
        rows = rows_of(name, ids)
        if len(rows) != 1:
            raise DecodeError(name, f"{name} holds several texts", f"{len(rows)} rows", "decode one at a time")
        return plain(name, rows[0])
    if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Sequence):
        raise DecodeError(name, f"{name} is not a sequence of token ids", shown(ids), REMEDY)
    return plain(name, ids)


def stops_of(name: str, ids: object) -> frozenset[int]:
    """The ids that end a text: one whole number, or several in any order.

    >>> stops_of("eos_tokens_id", 2), stops_of("eos_tokens_id", {2})
    (frozenset({2}), frozenset({2}))
    """
    if isinstance(ids, Integral):
        return frozenset(plain(name, [ids]))
    if isinstance(ids, Tensor | numpy.ndarray) and ids.ndim == 0:
        return frozenset(ids_of(name, ids.reshape(1)))
    if ids is None:
        raise DecodeError(name, f"{name} is missing", None, "give [] for a text that no token ends")
    return frozenset(ids_of(name, list(ids) if isinstance(ids, Set) else ids))


def rows_of(name: str, ids: Tensor | numpy.ndarray) -> list[list[int]]:
    """The rows of [B, L], or the one row of anything smaller. `DecodeError` for what holds no whole numbers."""
    if ids.ndim > 2:
        received = str(list(ids.shape))
        raise DecodeError(name, f"{name} has more than two dimensions", received, "give [batch, length]")
    if isinstance(ids, Tensor) and (ids.is_meta or ids.layout is not torch.strided):
        where = "on the meta device" if ids.is_meta else f"a {ids.layout} tensor"
        raise DecodeError(name, f"{name} has no numbers to look at", where, REMEDY)
    rows: list[list[int]] = (ids if ids.ndim == 2 else ids.reshape(1, -1)).tolist()
    return rows


def plain(name: str, ids: Sequence[object]) -> Tokens:
    """`ids` as plain ints; `DecodeError` at one that is no whole number."""
    tokens = tuple(ids)
    if {*map(type, tokens)} <= {int}:
        return tokens  # type: ignore[return-value] # looked at above, all at once
    for token in tokens:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise DecodeError(name, "a token id is not an int", shown(token), REMEDY)
    return tuple([int(token) for token in tokens if isinstance(token, Integral)])
