"""transformers' growing layer, in a buffer that doubles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from specflow.caches.buffer import move_up, wider


@final
class Roomy(DynamicLayer):
    """transformers' growing layer, in a buffer that doubles: a pass writes its own rows and copies no others.

    transformers' own copies all rows in every pass. After the rows that are held the buffer has forgotten tokens. It
    inherits because transformers' models take only layers of transformers' kinds.
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
            self.room = wider(self.keys, held + new), wider(self.values, held + new)
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., held : held + new, :] = states
        self.keys, self.values = (room[..., : held + new, :] for room in self.room)
        return self.keys, self.values

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Keep the first `start` rows and, of those after them, only `rows`, counted from there."""
        if not self.is_initialized or self.keys is None or self.values is None:
            return
        move_up([self.keys, self.values], start, rows)
        self.crop(start + len(rows) - self.keys.shape[-2])
