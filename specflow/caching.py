"""Taking a KV cache back to what it covered before: the spec's `prune_cache`, and the `Past` behind a predictor's memo.

Three kinds of layers exist. Where a layer holds a row for each token, going back is cropping. A dynamic sliding window
can be cropped by as much as it records beyond its window. Any other layer (a recurrent state, a ring written in place)
has lost what came before, so it goes back to a mark: a copy of just that layer, taken before the tokens in question.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from math import inf
from numbers import Number
from typing import Final, final, overload

from attrs import define, field, frozen
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    Fp8QuantizedLayer,
    HQQQuantizedLayer,
    LinearAttentionCacheLayerMixin,
    QuantoQuantizedLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from typing_extensions import override

from specflow.checks import a, calls, shown, valid, whole
from specflow.errors import DecodeError
from specflow.kv_cache import BLOCK, KVCache

TupleCache = tuple[tuple[Tensor, ...], ...]
"""One (keys, values) pair a layer, each [batch, heads, tokens, size]."""

Layer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer

MARKS: Final = 16
"""How many marks a past keeps: one behind the prompt, and enough for the drafts of one step."""

RECORD: Final = 128
"""How many tokens beyond its window a sliding layer records at least, so that it can be cropped by as many."""


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


# Exact types: a subclass may keep what cropping does not reach.
OF_LAYERS: Final = (DynamicCache, StaticCache, QuantizedCache)  # nothing but their layers changes
ROW_PER_TOKEN: Final = (Roomy, DynamicLayer, DynamicIndexedLayer, StaticLayer, StaticIndexedLayer, DummyLayer)
REBINDING: Final = (QuantoQuantizedLayer, HQQQuantizedLayer, Fp8QuantizedLayer)  # no tensor is written in place


@overload
def prune_cache(cache: TupleCache, num_tokens_to_discard: int) -> TupleCache: ...
@overload
def prune_cache(cache: DynamicCache, num_tokens_to_discard: int) -> DynamicCache: ...
def prune_cache(cache: TupleCache | DynamicCache, num_tokens_to_discard: int) -> TupleCache | DynamicCache:
    """A cache without its last `num_tokens_to_discard` tokens; the given one is left as it was.

    The new cache shares storage with the given one, and neither writes to it in place. Discarding 0 tokens gives an
    equal cache. `DecodeError` for a negative number, for more tokens than there are, and for caches that cannot go
    back (a sliding window past its window, recurrent states, static buffers).

    >>> import torch
    >>> keys = torch.zeros(1, 2, 5, 4)
    >>> prune_cache(((keys, keys),), 3)[0][0].shape[-2]
    2
    """
    whole(-sys.maxsize, "give 0 or more")("num_tokens_to_discard", num_tokens_to_discard)
    if num_tokens_to_discard < 0:
        raise DecodeError(
            "num_tokens_to_discard",
            "a negative number of tokens cannot be discarded",
            num_tokens_to_discard,
            "give 0 or more",
        )
    if isinstance(cache, tuple):
        _refuse_no_rows(cache)
        held = min((part.shape[-2] for layer in cache for part in layer), default=0)
        _refuse_more_than(held, num_tokens_to_discard)
        return tuple(tuple(part[..., : part.shape[-2] - num_tokens_to_discard, :] for part in layer) for layer in cache)
    a(Cache, "give a DynamicCache, or a tuple of (keys, values) for each layer")("cache", cache)
    _refuse_more_than(cache.get_seq_length(), num_tokens_to_discard)
    stuck = sorted({type(layer).__name__ for layer in cache.layers if not _sheds(layer, num_tokens_to_discard)})
    if type(cache) is not DynamicCache:
        stuck = [type(cache).__name__]
    if num_tokens_to_discard and stuck:
        raise DecodeError(
            "cache", "the cache cannot go back and stay as it was", ", ".join(stuck), "read the text again"
        )
    pruned = copy(cache)
    pruned.layers = [copy(layer) for layer in cache.layers]
    if num_tokens_to_discard:
        for layer in pruned.layers:
            layer.crop(-num_tokens_to_discard)
    return pruned


def _refuse_no_rows(cache: tuple[object, ...]) -> None:
    for layer in cache:
        if not isinstance(layer, tuple | list) or not all(isinstance(part, Tensor) and part.ndim > 1 for part in layer):
            raise DecodeError(
                "cache", "a layer holds no keys and values", shown(layer), "give a pair of tensors a layer"
            )


def _refuse_more_than(held: int, discard: int) -> None:
    if discard > held:
        raise DecodeError(
            "num_tokens_to_discard", f"the cache holds only {held} tokens", discard, f"discard at most {held}"
        )


def _sheds(layer: Layer, discard: int) -> bool:
    """Whether a copy of this layer can be cropped while the layer stays as it is."""
    return isinstance(layer, DynamicLayer | DummyLayer) and type(layer) is not Roomy and discard <= _spare(layer)


def _makes_caches(name: str, value: object) -> None:
    if not (isinstance(value, type) and value.__module__ != "builtins"):  # a class of caches makes them
        calls("a maker of caches", "give a function that makes a cache")(name, value)


@final
@frozen
class LossyCache:
    """A way to make a cache that rounds what it holds, such as transformers' `QuantizedCache`, and is wanted for it.

    What is read over such a cache differs from a fresh pass, and may depend on how the text was fed: a speculative
    text is near the autoregressive one and need not equal it. Without this name a predictor refuses the cache.
    """

    make: Callable[[], object] = field(validator=valid(_makes_caches))

    def __call__(self) -> object:
        made = self.make()
        if made is None or isinstance(made, Number | str | bytes | tuple | list | Tensor):
            raise DecodeError(
                "make", "what is made is no cache", shown(made), "return a cache, such as a QuantizedCache"
            )
        return made


def is_plain(cache: object) -> bool:
    """Whether all that this cache holds are keys and values of attention, in layers of transformers that keep them."""
    kinds = (*ROW_PER_TOKEN, DynamicSlidingWindowLayer, StaticSlidingWindowLayer)
    return _layers(cache) is not None and all(type(layer) in kinds for layer in _layers(cache) or ())


def is_empty(cache: object) -> bool:
    """Whether a cache covers nothing yet, as far as it can be told."""
    return not any(
        layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else any(layer.has_previous_state.values())
        for layer in _layers(cache) or ()
        if not isinstance(layer, DummyLayer)
    )


def offloads(cache: object) -> bool:
    """Whether a cache keeps its layers on the CPU while they are not used, which transformers does from CUDA alone."""
    return isinstance(cache, Cache) and cache.offloading


def capacity(cache: object) -> int | None:
    """How many tokens a cache of fixed size takes; None where there is no limit."""
    sizes = [
        layer.max_cache_len
        for layer in _layers(cache) or ()
        if isinstance(layer, StaticLayer) and (layer.is_croppable or not layer.is_sliding)
    ]
    return min(sizes, default=None)


@final
@frozen(eq=False)
class _Mark:
    """What of a past cannot be had by cropping, as it was when the past covered `length` tokens."""

    length: int
    layers: tuple[Layer | None, ...]
    whole: object | None


@final
@define(eq=False)
class Past:
    """A cache, which may be changed, the number of tokens it covers, and the marks it can be taken back to."""

    cache: object
    length: int
    _marks: list[_Mark] = field(factory=list, init=False)
    _rows_at: frozenset[int] = field(default=frozenset(), init=False)

    @property
    def needs_marks(self) -> bool:
        """Whether some of the cache can only go back to a mark."""
        layers = _layers(self.cache)
        if layers is not None:
            return not all(map(_crops, layers))
        return not (self._is_tuple_of_rows or isinstance(self.cache, KVCache))

    @property
    def is_marked(self) -> bool:
        """Whether there is a mark to go back to."""
        return bool(self._marks)

    def mark(self) -> None:
        """Make a way back to here. It costs a copy of the layers that cannot be cropped, and nothing else."""
        layers = _layers(self.cache)
        if layers is None:
            saved = _Mark(self.length, (), deepcopy(self.cache))
        else:
            saved = _Mark(self.length, tuple([None if _crops(layer) else _copied(layer) for layer in layers]), None)
        self._marks = [*self._marks[:1], *self._marks[1:][2 - MARKS :], saved]

    def thin(self, length: int) -> None:
        """Drop the marks that a text which stands up to `length` needs no more."""
        older = [mark for mark in self._marks[1:] if mark.length <= length]
        self._marks = [mark for mark in self._marks if mark not in older[:-1]]

    def go_back(self, keep: int) -> bool:
        """Cover at most `keep` tokens, as many as can be; whether there was any way to do it."""
        discard = self.length - keep
        if discard <= self._spare:
            self._crop(discard)
            return True
        while self._marks and self._marks[-1].length > keep:
            self._marks.pop()
        return bool(self._marks) and self._restore(self._marks.pop())

    def extend(self, cache: object, length: int) -> None:
        """Cover what the model has just read."""
        self.cache, self.length = cache, length
        self._rows_at = self._rows_at | {length} if _is_tuple_of_rows(cache, length) else frozenset()
        layers = _layers(cache) or []
        for i, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer:
                _record(layer)
            if type(layer) is DynamicLayer and layer.is_initialized:
                layers[i] = Roomy.of(layer)

    @property
    def holds_rows(self) -> bool:
        """Whether all of the cache is rows in the order they were read in, any of which can be kept: see `keep`."""
        layers = _layers(self.cache)
        if layers is not None:
            return all(type(layer) in (Roomy, DummyLayer) for layer in layers)
        return isinstance(self.cache, KVCache)

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Cover the first `start` tokens and, of those behind them, only the `rows`, counted from there, in order."""
        if isinstance(self.cache, KVCache):
            self.cache.keep(start, rows)
        for layer in _layers(self.cache) or ():
            if isinstance(layer, Roomy):
                layer.keep(start, rows)
        self.length = start + len(rows)

    @property
    def _spare(self) -> float:
        """How many of the last tokens can be cropped."""
        layers = _layers(self.cache)
        if layers is not None:
            return min(map(_spare, layers), default=0)
        return inf if self._is_tuple_of_rows or isinstance(self.cache, KVCache) else 0

    @property
    def _is_tuple_of_rows(self) -> bool:
        """Whether the cache is a tuple whose tensors have a row for each token. One length could be a coincidence."""
        return len(self._rows_at) > 1

    def _crop(self, discard: int) -> None:
        if isinstance(self.cache, tuple):
            self.cache = prune_cache(self.cache, discard)
        if isinstance(self.cache, KVCache):
            self.cache.rollback(self.length - discard)
        for layer in _layers(self.cache) or ():
            _crop(layer, discard)
        self.length -= discard

    def _restore(self, mark: _Mark) -> bool:
        """Go back to `mark`, which is used up; False where a window no longer records as much."""
        if mark.whole is not None:
            self.cache, self.length = mark.whole, mark.length
            return True
        assert isinstance(self.cache, Cache)
        discard, layers = self.length - mark.length, self.cache.layers
        if any(saved is None and _spare(layer) < discard for layer, saved in zip(layers, mark.layers, strict=True)):
            return False
        for i, saved in enumerate(mark.layers):
            if saved is None:
                _crop(layers[i], discard)
            else:
                layers[i] = saved
        self.length = mark.length
        return True


def _layers(cache: object) -> list[Layer] | None:
    """The layers of a cache that is nothing but its layers; None for any other."""
    return cache.layers if isinstance(cache, Cache) and type(cache) in OF_LAYERS else None


def _is_tuple_of_rows(cache: object, length: int) -> bool:
    """Whether this is a tuple of layers, each a tuple of tensors with one row for each token."""
    return isinstance(cache, tuple) and all(
        isinstance(layer, tuple)
        and all(isinstance(part, Tensor) and part.dim() > 1 and part.shape[-2] == length for part in layer)
        for layer in cache
    )


def _crops(layer: Layer) -> bool:
    """Whether this layer goes back by cropping, at least by a little, at any length."""
    if type(layer) is StaticSlidingWindowLayer:
        return layer.is_croppable
    return type(layer) in (*ROW_PER_TOKEN, DynamicSlidingWindowLayer)


def _spare(layer: Layer) -> float:
    """How many of its last tokens this layer can be cropped by now."""
    if type(layer) in ROW_PER_TOKEN:
        return inf
    if type(layer) is DynamicSlidingWindowLayer:
        held = 0 if layer.keys is None else layer.keys.shape[-2]
        return inf if held == layer.get_seq_length() else max(0, held - layer.sliding_window + 1)
    if type(layer) is StaticSlidingWindowLayer:
        return inf if layer.get_seq_length() <= layer.max_cache_len else 0
    return 0


def _crop(layer: Layer, discard: int) -> None:
    if getattr(layer, "is_initialized", True):  # a model may leave some layers of its cache unused
        layer.crop(-discard)


def _copied(layer: Layer) -> Layer:
    return copy(layer) if type(layer) in REBINDING else deepcopy(layer)


def _record(layer: DynamicSlidingWindowLayer) -> None:
    """Let the layer hold between `RECORD` and 2 · `RECORD` tokens beyond its window, where there are as many.

    By itself it forgets what leaves the window at once; with `record_past` it forgets nothing until it is cropped.
    """
    layer.record_past = True
    most = layer.sliding_window - 1 + RECORD
    if layer.keys is not None and layer.values is not None and layer.keys.shape[-2] > most + RECORD:
        layer.keys, layer.values = layer.keys[..., -most:, :], layer.values[..., -most:, :]
