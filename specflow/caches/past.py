"""The `Past` of a predictor's memo: a cache, what it covers, and how it goes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

from attrs import define, field, setters
from torch import Tensor

from specflow.caches.buffer import KVCache, move_up, wider
from specflow.caches.lasting import lasting
from specflow.caches.layers import Part, layers_of, parts_of
from specflow.caches.shelf import Row

MARKS: Final = 16
"""How many marks a past keeps: one after the prompt, and enough for the drafts of one step."""


def _placed(cache: object) -> list[object]:
    return [cache]


@final
@define(eq=False, on_setattr=setters.NO_OP)  # some of it is set in every pass, and none of it by users
class Past:
    """A cache, which may be changed, the number of tokens it covers, and the marks it can be taken back to."""

    _place: list[object] = field(converter=_placed, alias="cache")
    length: int
    _parts: list[Part] = field(init=False)
    _marks: dict[int, tuple[object | None, ...]] = field(factory=dict, init=False)
    """By the length that was covered then, shortest first: the mark of each part; None where cropping is the way."""
    _rows_at: frozenset[int] = field(default=frozenset(), init=False)
    _features: Tensor | None = field(default=None, init=False)
    """Rows [n, F] of which the first `length` are of the tokens covered, where a model is asked for its features."""

    def __attrs_post_init__(self) -> None:
        self._parts = self._found()

    @property
    def cache(self) -> object:
        """The cache as it is now."""
        return self._place[0]

    @property
    def features(self) -> Tensor:
        """The features [length, F] of the tokens that are covered, as they lie: who keeps some copies them."""
        assert self._features is not None
        return self._features[: self.length]

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
        with lasting():
            self._marks[self.length] = tuple([part.mark() for part in self._parts])
        for length in [*self._marks][1 : 1 - MARKS]:
            del self._marks[length]

    def thin(self, length: int) -> None:
        """Drop the marks that a text which stands up to `length` needs no more."""
        for older in [marked for marked in [*self._marks][1:] if marked <= length][:-1]:
            del self._marks[older]

    def go_back(self, keep: int) -> bool:
        """Cover at most `keep` tokens, as many as can be; whether there was any way to do it."""
        discard = self.length - keep
        if discard <= min([part.spare for part in self._parts], default=0):
            for part in self._parts:
                part.crop(discard)
            self.length = keep
            return True
        while self._marks:
            marked, saved = self._marks.popitem()
            if marked <= keep:
                return self._restore(marked, saved)
        return False

    def extend(self, cache: object, length: int, features: Tensor | None = None) -> None:
        """Cover what the model has just read, whose features [k, F] are kept with it."""
        if features is not None:
            self._hold(features, length)
        self._place[0], self.length = cache, length
        self._rows_at = self._rows_at | {length} if _is_tuple_of_rows(cache, length) else frozenset()
        self._parts = self._found()

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Cover the first `start` tokens and, of those after them, only the `rows`, counted from there, in order."""
        for part in self._parts:
            part.keep(start, rows)
        if self._features is not None:
            move_up([self._features], start, rows)
        self.length = start + len(rows)

    def _hold(self, features: Tensor, length: int) -> None:
        """Write the features of what now ends a text of `length` tokens."""
        if self._features is None or length > len(self._features):
            held = features[:0] if self._features is None else self._features
            self._features = wider(held, length)
        self._features[length - len(features) : length] = features

    def _found(self) -> list[Part]:
        layers = layers_of(self.cache)
        if layers is not None:
            return parts_of(layers)
        # A tuple whose tensors have a row for each token goes back by cropping; one length could be a coincidence.
        return [Part(self._place, 0, isinstance(self.cache, KVCache | Row) or len(self._rows_at) > 1)]

    def _restore(self, length: int, saved: tuple[object | None, ...]) -> bool:
        """Go back to a mark; False where a window no longer records as much."""
        discard, pairs = self.length - length, list(zip(self._parts, saved, strict=True))
        if any(was is None and part.spare < discard for part, was in pairs):
            return False
        for part, was in pairs:
            if was is None:
                part.crop(discard)
            else:
                part.restore(was)
        self.length = length
        return True


def _is_tuple_of_rows(cache: object, length: int) -> bool:
    """Whether this is a tuple of layers, each a tuple of tensors with one row for each token."""
    return isinstance(cache, tuple) and all(
        isinstance(layer, tuple)
        and all(isinstance(part, Tensor) and part.dim() > 1 and part.shape[-2] == length for part in layer)
        for layer in cache
    )
