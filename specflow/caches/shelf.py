"""Keys and values of several texts side by side, so that one pass reads them as they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, final
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor

from specflow.caches.buffer import BLOCK, move_up
from specflow.caches.lasting import lasting

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values."""


@final
@define(eq=False)
class Shelf:
    """Keys and values [rows, heads, capacity, size] of each layer. A text has one row of all layers.

    After a text its row has forgotten tokens or zeros: finite numbers, which a mask can hide.
    """

    capacity: int
    _layers: dict[int, Pair] = field(init=False, factory=dict)
    _rows: int = field(init=False, default=0)
    _free: list[int] = field(init=False, factory=list)

    def take(self) -> int:
        """The number of a row that nobody has, with zeros in it."""
        if not self._free:
            more = max(1, self._rows)
            self._free += range(self._rows, self._rows + more)
            self._rows += more
            with lasting(), torch.no_grad():
                for i, (keys, values) in self._layers.items():
                    self._layers[i] = _longer(keys, more), _longer(values, more)
        number = min(self._free)
        self._free.remove(number)
        for pair in self._layers.values():
            for held in pair:
                held[number].zero_()
        return number

    def give_back(self, number: int) -> None:
        """Let another text have this row."""
        self._free.append(number)

    def layer(self, i: int, like: Pair) -> Pair:
        """Layer i of all rows; where it is new, it is made of heads [_, heads, _, size] as `like` has them."""
        if i not in self._layers:
            with lasting():  # texts in inference mode and texts in others are read in turns
                keys, values = (new.new_zeros(self._rows, new.shape[1], self.capacity, new.shape[3]) for new in like)
            self._layers[i] = keys, values
        return self._layers[i]

    def keep(self, number: int, start: int, rows: Sequence[int]) -> None:
        """In row `number` move those `rows` up to `start` that are counted from there."""
        move_up([held[number] for pair in self._layers.values() for held in pair], start, rows)

    def copy(self, number: int, other: Shelf, onto: int, length: int) -> None:
        """Copy the first `length` tokens of row `number` to row `onto` of another shelf, or of this one."""
        for i, pair in self._layers.items():
            for held, room in zip(pair, other.layer(i, pair), strict=True):
                room[onto, :, :length] = held[number, :, :length]


def _longer(held: Tensor, more: int) -> Tensor:
    return F.pad(held, (0, 0, 0, 0, 0, 0, 0, more))


Shelves: TypeAlias = WeakValueDictionary[int, Shelf]
"""Shelves by their capacities, each for as long as a text has a row of it."""


@final
@define(eq=False)
class Row:
    """The cache of one text of `layers` layers: the first `length` tokens of row `number` of a shelf.

    Its rollback is a number.

    A text that outgrows its shelf moves to one of twice the capacity. A row that is forgotten is given back, and so is
    a shelf of which all rows are.
    """

    layers: int
    shelf: Shelf
    number: int
    length: int
    _shelves: Shelves

    @classmethod
    def on(cls, shelves: Shelves, layers: int) -> Row:
        """A text of which nothing was read yet; it will stand on one of the `shelves`."""
        return cls(layers, Shelf(0), 0, 0, shelves)

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = length

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Keep the first `start` tokens and, of those after them, only the `rows`, counted from there, in order."""
        self.shelf.keep(self.number, start, rows)
        self.length = start + len(rows)

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens."""
        if length > self.shelf.capacity:
            capacity = BLOCK << (-(-length // BLOCK) - 1).bit_length()
            self._move(self._shelves.setdefault(capacity, Shelf(capacity)))

    def __deepcopy__(self, memo: dict[int, object]) -> Row:
        other = Row(self.layers, self.shelf, self.shelf.take(), self.length, self._shelves)
        self.shelf.copy(self.number, other.shelf, other.number, self.length)
        return other

    def __del__(self) -> None:
        self.shelf.give_back(self.number)

    def _move(self, shelf: Shelf) -> None:
        number = shelf.take()
        self.shelf.copy(self.number, shelf, number, self.length)
        self.shelf.give_back(self.number)
        self.shelf, self.number = shelf, number
