"""How a layer of transformers' caches goes back: by cropping, as far as it can, or to a mark.

Where a layer holds a row for each token, going back is cropping. A dynamic sliding window can be cropped by as much as
it records beyond its window. Any other layer (a recurrent state, a ring written in place) has lost what came before, so
it goes back to a mark: a copy of just that layer, taken before the tokens in question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from math import inf
from typing import Final, Protocol, TypeAlias, cast, final

from attrs import define
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

from specflow.caches.rows import Roomy

Layer: TypeAlias = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer

RECORD: Final = 128
"""How many tokens beyond its window a sliding layer records at least, so that it can be cropped by as many."""


class Part(Protocol):
    """A part of a cache, and how it goes back."""

    @property
    def crops(self) -> bool:
        """Whether it goes back by cropping, at least by a little, at any length."""
        ...

    @property
    def holds_rows(self) -> bool:
        """Whether it is rows in the order they were read in, any of which can be kept: see `keep`."""
        ...

    @property
    def spare(self) -> float:
        """How many of its last tokens can be cropped now."""
        ...

    def crop(self, discard: int, /) -> None:
        """Forget the last tokens, at most `spare` of them."""
        ...

    def mark(self) -> object | None:
        """What `restore` needs to come back to here; None where cropping is the way."""
        ...

    def restore(self, saved: object, /) -> None:
        """Be what it was when this was marked; the mark is used up."""
        ...

    def keep(self, start: int, rows: Sequence[int], /) -> None:
        """Keep the first `start` tokens and, of those behind them, only the `rows`, counted from there, in order."""
        ...


@final
@define(eq=False)
class Rows:
    """A layer with a row for each token."""

    layer: CacheLayerMixin | DummyLayer
    crops: bool = True

    @property
    def holds_rows(self) -> bool:
        """Whether any of its rows can be kept: those of a layer that grows in a buffer of ours."""
        return type(self.layer) in (Roomy, DummyLayer)

    @property
    def spare(self) -> float:
        """All of them."""
        return inf

    def crop(self, discard: int, /) -> None:
        """Forget the last rows."""
        _crop(self.layer, discard)

    def mark(self) -> object | None:
        """Cropping is the way back."""
        return None

    def restore(self, saved: object, /) -> None:
        """Never asked."""

    def keep(self, start: int, rows: Sequence[int], /) -> None:
        """Keep some of the rows."""
        if isinstance(self.layer, Roomy):
            self.layer.keep(start, rows)


@final
@define(eq=False)
class Window:
    """A sliding window: it can be cropped as long as it holds enough beyond its window."""

    layer: DynamicSlidingWindowLayer | StaticSlidingWindowLayer
    holds_rows: bool = False

    @property
    def crops(self) -> bool:
        """Whether it records beyond its window."""
        return isinstance(self.layer, DynamicSlidingWindowLayer) or self.layer.is_croppable

    @property
    def spare(self) -> float:
        """What it records beyond its window; all of it while the text is shorter."""
        return spare_of(self.layer)

    def crop(self, discard: int, /) -> None:
        """Forget the last rows."""
        _crop(self.layer, discard)

    def mark(self) -> object | None:
        """Cropping is the way back."""
        return None

    def restore(self, saved: object, /) -> None:
        """Never asked."""

    def keep(self, start: int, rows: Sequence[int], /) -> None:
        """Never asked: it holds no rows that could be kept."""


@final
@define(eq=False)
class State:
    """A layer that has lost what came before: a recurrent state, a ring written in place, rows that are rounded."""

    layers: list[Layer]
    number: int
    crops: bool = False
    holds_rows: bool = False
    spare: float = 0

    def crop(self, discard: int, /) -> None:
        """Nothing can be cropped."""

    def mark(self) -> object | None:
        """A copy of the layer."""
        layer = self.layers[self.number]
        return copy(layer) if type(layer) in REBINDING else deepcopy(layer)

    def restore(self, saved: object, /) -> None:
        """Put the copy in the layer's place."""
        self.layers[self.number] = cast(Layer, saved)

    def keep(self, start: int, rows: Sequence[int], /) -> None:
        """Never asked: it holds no rows that could be kept."""


def parts_of(layers: list[Layer]) -> list[Part]:
    """The parts of a cache that is nothing but these layers. They grow in a buffer, or record, from now on."""
    for i, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            record(layer)
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = Roomy.of(layer)
    return [KINDS.get(type(layer), State)(layers, i) for i, layer in enumerate(layers)]


def layers_of(cache: object) -> list[Layer] | None:
    """The layers of a cache that is nothing but its layers; None for any other."""
    return cache.layers if isinstance(cache, Cache) and type(cache) in OF_LAYERS else None


def spare_of(layer: Layer) -> float:
    """How many of its last tokens a layer can be cropped by now."""
    if type(layer) is DynamicSlidingWindowLayer:
        held = 0 if layer.keys is None else layer.keys.shape[-2]
        return inf if held == layer.get_seq_length() else max(0, held - layer.sliding_window + 1)
    if type(layer) is StaticSlidingWindowLayer:
        return inf if layer.is_croppable and layer.get_seq_length() <= layer.max_cache_len else 0
    return inf if type(layer) in KINDS else 0


def record(layer: DynamicSlidingWindowLayer) -> None:
    """Let the layer hold between `RECORD` and 2 · `RECORD` tokens beyond its window, where there are as many.

    By itself it forgets what leaves the window at once; with `record_past` it forgets nothing until it is cropped.
    """
    layer.record_past = True
    most = layer.sliding_window - 1 + RECORD
    if layer.keys is not None and layer.values is not None and layer.keys.shape[-2] > most + RECORD:
        layer.keys, layer.values = layer.keys[..., -most:, :], layer.values[..., -most:, :]


def _crop(layer: Layer, discard: int) -> None:
    if getattr(layer, "is_initialized", True):  # a model may leave some layers of its cache unused
        layer.crop(-discard)


def _rows(layers: list[Layer], i: int) -> Part:
    return Rows(cast(CacheLayerMixin, layers[i]))


def _window(layers: list[Layer], i: int) -> Part:
    window = Window(cast(DynamicSlidingWindowLayer, layers[i]))
    return window if window.crops else State(layers, i)


# Exact types: a subclass may keep what cropping does not reach.
OF_LAYERS: Final = (DynamicCache, StaticCache, QuantizedCache)  # nothing but their layers changes
REBINDING: Final = (QuantoQuantizedLayer, HQQQuantizedLayer, Fp8QuantizedLayer)  # no tensor is written in place

KINDS: Final[Mapping[type, Callable[[list[Layer], int], Part]]] = {
    **dict.fromkeys((Roomy, DynamicLayer, DynamicIndexedLayer, StaticLayer, StaticIndexedLayer, DummyLayer), _rows),
    DynamicSlidingWindowLayer: _window,
    StaticSlidingWindowLayer: _window,
}
"""The kinds of layers that can be cropped."""

ATTENTION: Final = frozenset(KINDS)
"""The kinds of layers that hold keys and values of attention, and nothing else."""
