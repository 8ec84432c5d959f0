"""The `Past` behind a predictor's memo: a cache, what it covers, and how it goes back."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import inf
from typing import Final, cast, final

from attrs import define, field, frozen
from torch import Tensor

from specflow.caches.buffer import KVCache
from specflow.caches.layers import Part, layers_of, parts_of
from specflow.caches.prune import prune_cache

MARKS: Final = 16
"""How many marks a past keeps: one behind the prompt, and enough for the drafts of one step."""


@final
@frozen(eq=False)
class _Mark:
    """What each part needs to come back to when the past covered `length` tokens; None where cropping is the way."""

    length: int
    saved: tuple[object | None, ...]


@final
@define(eq=False)
class Past:
    """A cache, which may be changed, the number of tokens it covers, and the marks it can be taken back to."""

    cache: object
    length: int
    _parts: list[Part] = field(factory=list, init=False)
    _marks: list[_Mark] = field(factory=list, init=False)
    _rows_at: frozenset[int] = field(default=frozenset(), init=False)

    def __attrs_post_init__(self) -> None:
        self._parts = self._found()

    @property
    def needs_marks(self) -> bool:
        """Whether some of the cache can only go back to a mark."""
        return not all(part.crops for part in self._parts)

    @property
    def is_marked(self) -> bool:
        """Whether there is a mark to go back to."""
        return bool(self._marks)

    @property
    def holds_rows(self) -> bool:
        """Whether all of the cache is rows in the order they were read in, any of which can be kept: see `keep`."""
        return all(part.holds_rows for part in self._parts)

    def mark(self) -> None:
        """Make a way back to here. It costs a copy of the parts that cannot be cropped, and nothing else."""
        saved = _Mark(self.length, tuple([part.mark() for part in self._parts]))
        self._marks = [*self._marks[:1], *self._marks[1:][2 - MARKS :], saved]

    def thin(self, length: int) -> None:
        """Drop the marks that a text which stands up to `length` needs no more."""
        older = [mark for mark in self._marks[1:] if mark.length <= length]
        self._marks = [mark for mark in self._marks if mark not in older[:-1]]

    def go_back(self, keep: int) -> bool:
        """Cover at most `keep` tokens, as many as can be; whether there was any way to do it."""
        discard = self.length - keep
        if discard <= min([part.spare for part in self._parts], default=0):
            for part in self._parts:
                part.crop(discard)
            self.length -= discard
            return True
        while self._marks and self._marks[-1].length > keep:
            self._marks.pop()
        return bool(self._marks) and self._restore(self._marks.pop())

    def extend(self, cache: object, length: int) -> None:
        """Cover what the model has just read."""
        self.cache, self.length = cache, length
        self._rows_at = self._rows_at | {length} if _is_tuple_of_rows(cache, length) else frozenset()
        self._parts = self._found()

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Cover the first `start` tokens and, of those behind them, only the `rows`, counted from there, in order."""
        for part in self._parts:
            part.keep(start, rows)
        self.length = start + len(rows)

    def _found(self) -> list[Part]:
        layers = layers_of(self.cache)
        if layers is not None:
            return parts_of(layers)
        if isinstance(self.cache, KVCache):
            return [_Buffer(self.cache)]
        # A tuple whose tensors have a row for each token; one length could be a coincidence.
        return [_Pairs(self)] if len(self._rows_at) > 1 else [_Whole(self)]

    def _restore(self, mark: _Mark) -> bool:
        """Go back to `mark`, which is used up; False where a window no longer records as much."""
        discard, pairs = self.length - mark.length, list(zip(self._parts, mark.saved, strict=True))
        if any(saved is None and part.spare < discard for part, saved in pairs):
            return False
        for part, saved in pairs:
            if saved is None:
                part.crop(discard)
            else:
                part.restore(saved)
        self.length = mark.length
        return True


@final
@define(eq=False)
class _Buffer:
    """A cache whose rollback is a number."""

    cache: KVCache
    crops: bool = True
    holds_rows: bool = True
    spare: float = inf

    def crop(self, discard: int, /) -> None:
        self.cache.rollback(self.cache.length - discard)

    def mark(self) -> object | None:
        return None

    def restore(self, saved: object, /) -> None:
        pass

    def keep(self, start: int, rows: Sequence[int], /) -> None:
        self.cache.keep(start, rows)


@final
@define(eq=False)
class _Pairs:
    """A tuple of keys and values for each layer, which are not written in place."""

    past: Past
    crops: bool = True
    holds_rows: bool = False
    spare: float = inf

    def crop(self, discard: int, /) -> None:
        self.past.cache = prune_cache(cast(tuple[tuple[Tensor, ...], ...], self.past.cache), discard)

    def mark(self) -> object | None:
        return None

    def restore(self, saved: object, /) -> None:
        pass

    def keep(self, start: int, rows: Sequence[int], /) -> None:
        pass


@final
@define(eq=False)
class _Whole:
    """A cache of which nothing is known: it goes back to a copy of all of it."""

    past: Past
    crops: bool = False
    holds_rows: bool = False
    spare: float = 0

    def crop(self, discard: int, /) -> None:
        pass

    def mark(self) -> object | None:
        return deepcopy(self.past.cache)

    def restore(self, saved: object, /) -> None:
        self.past.cache = saved

    def keep(self, start: int, rows: Sequence[int], /) -> None:
        pass


def _is_tuple_of_rows(cache: object, length: int) -> bool:
    """Whether this is a tuple of layers, each a tuple of tensors with one row for each token."""
    return isinstance(cache, tuple) and all(
        isinstance(layer, tuple)
        and all(isinstance(part, Tensor) and part.dim() > 1 and part.shape[-2] == length for part in layer)
        for layer in cache
    )
