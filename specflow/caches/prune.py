"""A cache without its last tokens, the given one left as it was: the spec's `prune_cache`."""

from __future__ import annotations

import sys
from copy import copy
from typing import overload

from torch import Tensor
from transformers import Cache, DynamicCache

from specflow.caches.layers import GROWING, TupleCache, spare_of, without_last
from specflow.errors import DecodeError
from specflow.guards.checks import a, shown, whole


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
    discard, name = num_tokens_to_discard, "num_tokens_to_discard"
    whole(-sys.maxsize, "give 0 or more")(name, discard)
    if discard < 0:
        raise DecodeError(name, "a negative number of tokens cannot be discarded", discard, "give 0 or more")
    if isinstance(cache, tuple):
        held = min([part.shape[-2] for layer in cache for part in _rows_of(layer)], default=0)
    else:
        a(Cache, "give a DynamicCache, or a tuple of (keys, values) for each layer")("cache", cache)
        held = cache.get_seq_length()
    if discard > held:
        raise DecodeError(name, f"the cache holds only {held} tokens", discard, f"discard at most {held}")
    if isinstance(cache, tuple):
        return without_last(cache, discard)
    stuck = {type(layer).__name__ for layer in cache.layers if type(layer) not in GROWING or discard > spare_of(layer)}
    if type(cache) is not DynamicCache:
        stuck = {type(cache).__name__}
    if discard and stuck:
        received = ", ".join(sorted(stuck))
        raise DecodeError("cache", "the cache cannot go back and stay as it was", received, "read the text again")
    pruned = copy(cache)
    pruned.layers = [copy(layer) for layer in cache.layers]
    if discard:
        for layer in pruned.layers:
            layer.crop(-discard)
    return pruned


def _rows_of(layer: object) -> tuple[Tensor, ...]:
    if not isinstance(layer, tuple | list) or not all(isinstance(part, Tensor) and part.ndim > 1 for part in layer):
        remedy = "give a pair of tensors a layer"
        raise DecodeError("cache", "a layer holds no keys and values", shown(layer), remedy)
    return tuple(layer)
