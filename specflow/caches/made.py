"""What is known of a cache that somebody made."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import final

from attrs import field, frozen
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, StaticLayer

from specflow.caches.layers import ATTENTION, layers_of
from specflow.errors import DecodeError
from specflow.guards.checks import calls, shown, valid


def _makes_caches(name: str, value: object) -> None:
    if not (isinstance(value, type) and value.__module__ != "builtins"):  # a class of caches makes them
        calls("a maker of caches", "give a function that makes a cache")(name, value)


@final
@frozen
class LossyCache:
    """A way to make a cache that rounds what it holds, such as transformers' `QuantizedCache`, and is wanted for it.

    What is read over such a cache differs from a fresh pass, and may depend on how the text was fed: a speculative
    text is near the autoregressive one and need not equal it. Without this name a predictor refuses the cache.

    >>> from transformers import LlamaConfig, QuantizedCache
    >>> make = LossyCache(lambda: QuantizedCache("fp8", LlamaConfig(num_hidden_layers=1)))
    >>> type(make()).__name__
    'QuantizedCache'
    """

    make: Callable[[], object] = field(validator=valid(_makes_caches))

    def __call__(self) -> object:
        made = self.make()
        if made is None or isinstance(made, Number | str | bytes | tuple | list | Tensor):
            remedy = "return a cache, such as a QuantizedCache"
            raise DecodeError("make", "what is made is no cache", shown(made), remedy)
        return made


def is_plain(cache: object) -> bool:
    """Whether all that this cache holds are keys and values of attention, in layers of transformers that keep them."""
    layers = layers_of(cache)
    return layers is not None and all(type(layer) in ATTENTION for layer in layers)


def is_empty(cache: object) -> bool:
    """Whether a cache covers nothing yet, as far as it can be told."""
    return not any(
        layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else any(layer.has_previous_state.values())
        for layer in layers_of(cache) or ()
        if not isinstance(layer, DummyLayer)
    )


def offloads(cache: object) -> bool:
    """Whether a cache keeps its layers on the CPU while they are not used, which transformers does from CUDA alone."""
    return isinstance(cache, Cache) and cache.offloading


def capacity(cache: object) -> int | None:
    """How many tokens a cache of fixed size takes; None where there is no limit."""
    sizes = [
        layer.max_cache_len
        for layer in layers_of(cache) or ()
        if isinstance(layer, StaticLayer) and (layer.is_croppable or not layer.is_sliding)
    ]
    return min(sizes, default=None)
