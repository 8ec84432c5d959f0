"""A cache without its last tokens, the given one left as it was: the spec's `prune_cache`."""

from __future__ import annotations

import sys
from copy import copy
from typing import TypeAlias, overload

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer

from specflow.caches.layers import Layer, spare_of
from specflow.caches.rows import Roomy
from specflow.errors import DecodeError
from specflow.guards.checks import a, shown, whole

TupleCache: TypeAlias = tuple[tuple[Tensor, ...], ...]
"""One (keys, values) pair a layer, each [batch, heads, tokens, size]."""


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
    return isinstance(layer, DynamicLayer | DummyLayer) and type(layer) is not Roomy and discard <= spare_of(layer)
