"""How the parts of a cache go back: by cropping, as far as they can, or to a mark.

Where a part holds a row for each token, going back is cropping. A dynamic sliding window can be cropped by as much as
it records beyond its window. Any other part (a recurrent state, a ring written in place, a cache of an unknown kind)
has lost what came before, so it goes back to a mark: a copy of just that part, taken before the tokens in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from math import inf
from typing import Final, TypeAlias, cast, final

from attrs import define
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

from specflow.caches.buffer import KVCache
from specflow.caches.rows import Roomy
from specflow.caches.shelf import Row

Layer: TypeAlias = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer

TupleCache: TypeAlias = tuple[tuple[Tensor, ...], ...]
"""One (keys, values) pair a layer, each [batch, heads, tokens, size]."""

RECORD: Final = 128
"""How many tokens beyond its window a sliding layer records at least, so that it can be cropped by as many."""

# Exact types: a subclass may keep what cropping does not reach.
OF_LAYERS: Final = (DynamicCache, StaticCache, QuantizedCache)  # nothing but their layers changes
REBINDING: Final = (QuantoQuantizedLayer, HQQQuantizedLayer, Fp8QuantizedLayer)  # no tensor is written in place
GROWING: Final = (DynamicLayer, DynamicIndexedLayer, DynamicSlidingWindowLayer, DummyLayer)
ATTENTION: Final = (*GROWING, Roomy, StaticLayer, StaticIndexedLayer, StaticSlidingWindowLayer)
"""The kinds of layers that hold keys and values of attention, and nothing else."""


@final
@define(eq=False)
class Part:
    """What stands at `place[number]`: a layer of a cache, or a whole cache. It goes back by cropping, or to a mark."""

    place: list[object]
    number: int
    crops: bool

    @property
    def held(self) -> object:
        """The part itself."""
        return self.place[self.number]

    @property
    def holds_rows(self) -> bool:
        """Whether it is rows in the order they were read in, any of which can be kept: see `keep`."""
        return type(self.held) in (Roomy, KVCache, Row, DummyLayer)

    @property
    def spare(self) -> float:
        """How many of its last tokens can be cropped now."""
        return spare_of(self.held) if self.crops else 0

    def crop(self, discard: int) -> None:
        """Forget the last tokens, at most `spare` of them."""
        held = self.held
        if isinstance(held, KVCache | Row):
            held.rollback(held.length - discard)
        elif self.crops and isinstance(held, tuple):
            self.place[self.number] = without_last(held, discard)
        elif self.crops and isinstance(held, CacheLayerMixin) and held.is_initialized:  # some layers may stay unused
            held.crop(-discard)

    def mark(self) -> object | None:
        """A copy to go back to; None where cropping is the way."""
        if self.crops:
            return None
        return copy(self.held) if type(self.held) in REBINDING else deepcopy(self.held)

    def restore(self, saved: object) -> None:
        """Be what it was when this was marked; the mark is used up."""
        self.place[self.number] = saved

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Keep the first `start` tokens and, of those after them, only the `rows`, counted from there, in order."""
        if isinstance(self.held, Roomy | KVCache | Row):
            self.held.keep(start, rows)


def parts_of(layers: list[Layer]) -> list[Part]:
    """The parts of a cache that is nothing but these layers. They grow in a buffer, or record, from now on."""
    for i, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            record(layer)
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = Roomy.of(layer)
    return [Part(cast(list[object], layers), i, _crops(layer)) for i, layer in enumerate(layers)]


def layers_of(cache: object) -> list[Layer] | None:
    """The layers of a cache that is nothing but its layers; None for any other."""
    return cache.layers if isinstance(cache, Cache) and type(cache) in OF_LAYERS else None


def spare_of(held: object) -> float:
    """How many of its last tokens a part that crops can be cropped by now."""
    if type(held) is DynamicSlidingWindowLayer:
        rows = 0 if held.keys is None else held.keys.shape[-2]
        return inf if rows == held.get_seq_length() else max(0, rows - held.sliding_window + 1)
    if type(held) is StaticSlidingWindowLayer and held.get_seq_length() > held.max_cache_len:
        return 0
    return inf


def without_last(cache: TupleCache, discard: int) -> TupleCache:
    """A cache of tuples without its last tokens, over the same storage."""
    return tuple(tuple(part[..., : part.shape[-2] - discard, :] for part in layer) for layer in cache)


def record(layer: DynamicSlidingWindowLayer) -> None:
    """Let the layer hold between `RECORD` and 2 · `RECORD` tokens beyond its window, where there are as many.

    By itself it forgets what leaves the window at once; with `record_past` it forgets nothing until it is cropped.
    """
    layer.record_past = True
    most = layer.sliding_window - 1 + RECORD
    if layer.keys is not None and layer.values is not None and layer.keys.shape[-2] > most + RECORD:
        layer.keys, layer.values = layer.keys[..., -most:, :], layer.values[..., -most:, :]


def _crops(layer: Layer) -> bool:
    """Whether a layer goes back by cropping, at least by a little, at any length."""
    return type(layer) in ATTENTION and (type(layer) is not StaticSlidingWindowLayer or layer.is_croppable)
