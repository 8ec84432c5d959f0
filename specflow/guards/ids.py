"""Token ids as plain ints, of whatever plainly holds them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from numbers import Integral
from typing import TypeAlias

import numpy
import torch
from torch import Tensor

from specflow.errors import DecodeError
from specflow.guards.checks import is_whole, shown, whole

Tokens: TypeAlias = tuple[int, ...]
"""The ids of a text."""

REMEDY = "give plain ints, such as tokenizer(text).input_ids"


def ids_of(name: str, ids: object) -> Tokens:
    """The ids in a sequence of whole numbers, or in a tensor or numpy array of one row, [n] or [1, n].

    `DecodeError`, naming the parameter `name`, for anything else: texts, floats, bools, several rows, a meta tensor.

    >>> ids_of("inputs", torch.tensor([[5, 6]])), ids_of("inputs", range(3))
    ((5, 6), (0, 1, 2))
    """
    if isinstance(ids, (tuple, list)):  # as most are: to tell any other sequence takes ten times as long
        return plain(name, ids)
    if isinstance(ids, Tensor | numpy.ndarray):
        rows = id_rows(name, ids)
        if len(rows) != 1:
            raise DecodeError(name, f"{name} holds several texts", f"{len(rows)} rows", "decode one at a time")
        return plain(name, rows[0])
    if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Sequence):
        raise DecodeError(name, f"{name} is not a sequence of token ids", shown(ids), REMEDY)
    return plain(name, ids)


def text_of(tokens: object) -> Tokens:
    """A text that is read: at least one token. What is a tuple is not looked through, as it may be long.

    >>> text_of(range(3))
    (0, 1, 2)
    """
    text: Tokens = tokens if isinstance(tokens, tuple) else ids_of("tokens", tokens)
    if not text:
        raise DecodeError("tokens", "the text is empty", "no tokens", "give at least one token")
    return text


def reading_of(tokens: object, last: int) -> tuple[Tokens, int]:
    """The text of a reading, and after how many of its last prefixes rows are asked for: 1 ≤ last ≤ its length."""
    text = text_of(tokens)
    if type(last) is not int or not 1 <= last <= len(text):
        whole(1, "ask for at least one row", len(text))("last", last)
    return text, int(last)


def stops_of(name: str, ids: object) -> frozenset[int]:
    """The ids that end a text: one whole number, or several in any order.

    >>> stops_of("eos_tokens_id", 2), stops_of("eos_tokens_id", {2})
    (frozenset({2}), frozenset({2}))
    """
    if isinstance(ids, Integral):
        return frozenset(plain(name, [ids]))
    if ids is None:
        raise DecodeError(name, f"{name} is missing", None, "give [] for a text that no token ends")
    return frozenset(ids_of(name, list(ids) if isinstance(ids, Set) else ids))


def id_rows(name: str, ids: Tensor | numpy.ndarray, last: int | None = None) -> list[list[int]]:
    """The rows of [B, L], or the one row of anything smaller; of each the last columns, `last` of them.

    `DecodeError` for more dimensions, and for a tensor without values.
    """
    if ids.ndim > 2:
        received = str(list(ids.shape))
        raise DecodeError(name, f"{name} has more than two dimensions", received, "give [batch, length]")
    if isinstance(ids, Tensor) and (ids.is_meta or ids.layout is not torch.strided):
        where = "on the meta device" if ids.is_meta else f"a {ids.layout} tensor"
        raise DecodeError(name, f"{name} has no numbers to look at", where, REMEDY)
    table = ids if ids.ndim == 2 else ids.reshape(1, -1)
    rows: list[list[int]] = (table if last is None else table[:, -last:]).tolist()
    return rows


def plain(name: str, ids: Sequence[object]) -> Tokens:
    """`ids` as plain ints; `DecodeError` at one that is not a whole number."""
    tokens = tuple(ids)
    if {*map(type, tokens)} <= {int}:
        return tokens  # type: ignore[return-value] # looked at above, all at once
    for token in tokens:
        if not is_whole(token):
            raise DecodeError(name, "a token id is not an int", shown(token), REMEDY)
    return tuple(map(int, tokens))  # type: ignore[arg-type] # looked at above
