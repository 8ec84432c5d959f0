"""transformers' growing layer, in a buffer that doubles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from specflow.caches.buffer import BLOCK


@final
class Roomy(DynamicLayer):
    """transformers' growing layer, in a buffer that doubles: a pass writes its own rows and copies no others.

    transformers' own copies all rows in every pass. What lies behind the rows that are held are forgotten tokens. A
    layer that is one of transformers' kinds is what transformers' models take, hence the inheritance.
    """

    room: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, layer: DynamicLayer) -> Roomy:
        """A layer that holds what the given one holds, and will write elsewhere."""
        roomy = cls()
        vars(roomy).update(vars(layer), room=(layer.keys, layer.values))
        return roomy

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones [batch, heads, k, size] among them."""
        if not self.is_initialized or self.keys is None or self.values is None:
            return super().update(key_states, value_states)
        held, new = self.keys.shape[-2], key_states.shape[-2]
        if held + new > self.room[0].shape[-2] or self.keys.data_ptr() != self.room[0].data_ptr():
            self.room = _wider(self.keys, held + new), _wider(self.values, held + new)
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., held : held + new, :] = states
        self.keys, self.values = (room[..., : held + new, :] for room in self.room)
        return self.keys, self.values

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Keep the first `start` rows and, of those behind them, only `rows`, counted from there."""
        if not self.is_initialized or self.keys is None or self.values is None:
            return
        if list(rows) != list(range(len(rows))):
            for held in (self.keys, self.values):
                held[..., start : start + len(rows), :] = held[..., [start + row for row in rows], :]
        self.crop(start + len(rows) - self.keys.shape[-2])


def _wider(rows: Tensor, length: int) -> Tensor:
    """A tensor with the same rows [..., n, size] and room for at least `length` and for twice as many."""
    capacity = -(-max(length, 2 * rows.shape[-2]) // BLOCK) * BLOCK
    room = rows.new_empty(*rows.shape[:-2], capacity, rows.shape[-1])
    room[..., : rows.shape[-2], :] = rows
    return room
