"""A KV cache whose rollback is a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor

from specflow.caches.lasting import lasting
from specflow.errors import DecodeError
from specflow.guards.checks import is_id, shown, valid, whole
from specflow.guards.ids import ids_of

BLOCK: Final = 512
"""Room is made in multiples of this, the number of keys that torch's attention on a CPU takes at a time."""


def _is_buffer(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.ndim != 5:
        received = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise DecodeError(name, f"{name} is no buffer", received, "give a tensor [layers, 2, heads, capacity, size]")


_tokens: Final = whole(0, "give a number of tokens")


@final
@define(eq=False)
class KVCache:
    """Keys and values of `length` tokens, in a buffer [layers, 2, heads, capacity, size] that doubles when it is full.

    After `length` there are zeros or forgotten tokens: finite numbers, which a mask can hide. A pass writes into the
    buffer, so a cache belongs to one text.

    >>> import torch
    >>> cache = KVCache(torch.empty(3, 2, 1, 0, 4))
    >>> cache.reserve(2)
    >>> cache.length = 2
    >>> cache.rollback(1)
    >>> cache.length, cache.buffer.shape
    (1, torch.Size([3, 2, 1, 512, 4]))
    """

    buffer: Tensor = field(repr=False, validator=valid(_is_buffer))
    length: int = field(default=0, validator=valid(_tokens))

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens. `DecodeError` where there are not as many."""
        if not is_id(length) or length > self.length:
            remedy = f"give a number from 0 to {self.length}"
            raise DecodeError("length", f"the cache holds {self.length} tokens", shown(length), remedy)
        self.length = int(length)

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Keep the first `start` tokens and, of those after them, only the `rows`, counted from there, in order.

        So one branch of a tree is kept whose drafts were read in one pass. `DecodeError` where there are no such rows.

        >>> import torch
        >>> cache = KVCache(torch.arange(5.0).reshape(1, 1, 1, 5, 1).repeat(1, 2, 1, 1, 1), length=5)
        >>> cache.keep(2, [0, 2])
        >>> cache.length, cache.buffer[0, 0, 0, : cache.length, 0].tolist()
        (4, [0.0, 1.0, 2.0, 4.0])
        """
        _tokens("start", start)
        start, rows = int(start), ids_of("rows", rows)
        held = self.length - start
        if held < 0 or not all(0 <= row < held for row in rows):
            happened = f"the cache holds {self.length} tokens, {held} of them after the first {start}"
            raise DecodeError("rows", happened, list(rows), "give rows that are there")
        move_up([self.buffer], start, rows)
        self.length = start + len(rows)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens."""
        _tokens("length", length)
        if length > self.buffer.shape[3]:
            self.buffer = wider(self.buffer, int(length))


def move_up(held: Sequence[Tensor], start: int, rows: Sequence[int]) -> None:
    """Write the `rows` after the first `start` of each [..., n, size], counted from there, one after the other."""
    if list(rows) == list(range(len(rows))):
        return
    places: dict[torch.device, Tensor] = {}  # a device is told them once, not for each layer
    for each in held:
        if each.device not in places:
            places[each.device] = torch.tensor([start + row for row in rows], device=each.device)
        each[..., start : start + len(rows), :] = each.index_select(-2, places[each.device])


def wider(held: Tensor, length: int) -> Tensor:
    """A tensor with the same rows [..., n, size], then zeros: room for at least `length` rows and for twice as many."""
    room = -(-max(length, 2 * held.shape[-2]) // BLOCK) * BLOCK
    with lasting(), torch.no_grad():
        return F.pad(held, (0, 0, 0, room - held.shape[-2]))
