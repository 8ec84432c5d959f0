"""A cache without its last tokens, the given one left as it was: the spec's `prune_cache`."""

from __future__ import annotations

import sys
from copy import copy, deepcopy
from typing import TypeVar, overload

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from specflow.caches.layers import GROWING, REBINDING, TupleCache, layers_of, spare_of, without_last
from specflow.errors import DecodeError, said
from specflow.guards.checks import a, shown, whole

T = TypeVar("T")


@overload
def prune_cache(cache: TupleCache, num_tokens_to_discard: int) -> TupleCache: ...
@overload
def prune_cache(cache: DynamicCache, num_tokens_to_discard: int) -> DynamicCache: ...
def prune_cache(cache: TupleCache | DynamicCache, num_tokens_to_discard: int) -> TupleCache | DynamicCache:
    """A cache without its last `num_tokens_to_discard` tokens; the given one is left as it was.

    The new cache shares storage with the given one where neither writes to it in place, and has a copy of the rest.
    Discarding 0 tokens gives an equal cache. `DecodeError` for a negative number, for more tokens than there are, for
    caches that cannot go back (a sliding window past its window, recurrent states, static buffers), and for tuples
    whose tensors do not all have a row for each token.

    >>> import torch
    >>> keys = torch.zeros(1, 2, 5, 4)
    >>> prune_cache(((keys, keys),), 3)[0][0].shape[-2]
    2
    """
    name = "num_tokens_to_discard"
    whole(-sys.maxsize, "give 0 or more")(name, num_tokens_to_discard)
    discard = int(num_tokens_to_discard)
    if discard < 0:
        raise DecodeError(name, "a negative number of tokens cannot be discarded", discard, "give 0 or more")
    if isinstance(cache, tuple):
        _refuse_beyond(_rows(cache), discard)
        return without_last(cache, discard)
    a(Cache, "give a DynamicCache, or a tuple of (keys, values) for each layer")("cache", cache)
    if discard:
        _refuse_stuck(cache, discard)
        _refuse_beyond([layer.get_seq_length() for layer in _used(cache)], discard)
    layers = layers_of(cache)
    if layers is None:
        return _copied(cache)
    pruned = copy(cache)
    pruned.layers = [copy(layer) if type(layer) in (*GROWING, *REBINDING) else _copied(layer) for layer in layers]
    if discard:
        for layer in _used(pruned):
            layer.crop(-discard)
    return pruned


def _refuse_stuck(cache: Cache, discard: int) -> None:
    stuck = {type(layer).__name__ for layer in layers_of(cache) or () if _is_stuck(layer, discard)}
    if type(cache) is not DynamicCache:
        stuck = {type(cache).__name__}
    if stuck:
        received = ", ".join(sorted(stuck))
        raise DecodeError("cache", "the cache cannot go back and stay as it was", received, "read the text again")


def _is_stuck(layer: object, discard: int) -> bool:
    return type(layer) not in GROWING or discard > spare_of(layer)


def _refuse_beyond(lengths: list[int], discard: int) -> None:
    held = min(lengths, default=0)
    if discard > held:
        happened, remedy = f"the cache holds only {held} tokens", f"discard at most {held}"
        raise DecodeError("num_tokens_to_discard", happened, discard, remedy)


def _used(cache: Cache) -> list[DynamicLayer]:
    """The growing layers that hold something: some stay unused, such as those that read another one's keys."""
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and layer.is_initialized]


def _copied(part: T) -> T:
    try:
        return deepcopy(part)
    except Exception as error:  # of a part that we do not know, anything
        happened, remedy = f"the cache cannot be copied ({said(error)})", "read the text under torch.no_grad()"
        raise DecodeError("cache", happened, type(part).__name__, remedy) from error


def _rows(cache: TupleCache) -> list[int]:
    """How many rows each tensor of a cache has: as many as there are tokens, or they are no keys and values."""
    rows = [part.shape[-2] for layer in cache for part in _parts(layer)]
    if len({*rows}) > 1:
        happened = "the cache holds tensors of several lengths"
        raise DecodeError(
            "cache", happened, shown(sorted({*rows})), "give keys and values [batch, heads, tokens, size]"
        )
    return rows


def _parts(layer: object) -> tuple[Tensor, ...]:
    if not isinstance(layer, tuple | list) or not all(isinstance(part, Tensor) and part.ndim > 1 for part in layer):
        remedy = "give a pair of tensors a layer"
        raise DecodeError("cache", "a layer holds no keys and values", shown(layer), remedy)
    return tuple(layer)
