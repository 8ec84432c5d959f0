"""Rolling a KV cache back: the spec's `prune_cache`, and the rollback that the predictor's memo is built on.

Three kinds of layers exist. An append-only layer holds a row per token, and forgetting is slicing. Any other layer
(a window that slides, a recurrent state, a buffer written in place) has lost what came before, so going back needs a
checkpoint: a copy of just those layers, taken before the tokens that may have to be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import final, overload

from attrs import frozen
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from specflow.errors import DecodeError

TupleCache = tuple[tuple[Tensor, ...], ...]
"""One (keys, values) pair a layer, each [batch, heads, tokens, size]."""

Layer = CacheLayerMixin | LinearAttentionCacheLayerMixin


@overload
def prune_cache(cache: TupleCache, num_tokens_to_discard: int) -> TupleCache: ...
@overload
def prune_cache(cache: DynamicCache, num_tokens_to_discard: int) -> DynamicCache: ...
def prune_cache(cache: TupleCache | DynamicCache, num_tokens_to_discard: int) -> TupleCache | DynamicCache:
    """A cache without its last `num_tokens_to_discard` tokens; the given one is left as it was.

    The new cache shares storage with the given one, and neither writes to it in place. Discarding 0 tokens gives an
    equal cache. `DecodeError` for a negative number, for more tokens than there are, and for layers that cannot go
    back (a sliding window past its window, recurrent states).

    >>> import torch
    >>> keys = torch.zeros(1, 2, 5, 4)
    >>> prune_cache(((keys, keys),), 3)[0][0].shape[-2]
    2
    """
    if num_tokens_to_discard < 0:
        raise DecodeError(
            "num_tokens_to_discard",
            "a negative number of tokens cannot be discarded",
            num_tokens_to_discard,
            "give 0 or more",
        )
    if isinstance(cache, tuple):
        held = min((part.shape[-2] for layer in cache for part in layer), default=0)
        _refuse_more_than(held, num_tokens_to_discard)
        return tuple(tuple(part[..., : part.shape[-2] - num_tokens_to_discard, :] for part in layer) for layer in cache)
    _refuse_more_than(cache.get_seq_length(), num_tokens_to_discard)
    if num_tokens_to_discard and not all(map(_can_go_back, cache.layers)):
        kinds = sorted({type(layer).__name__ for layer in cache.layers if not _can_go_back(layer)})
        raise DecodeError(
            "cache",
            "the cache has layers that have forgotten what came before",
            ", ".join(kinds),
            "read the text again",
        )
    pruned = copy(cache)
    pruned.layers = [copy(layer) for layer in cache.layers]
    if num_tokens_to_discard:
        for layer in pruned.layers:
            layer.crop(-num_tokens_to_discard)
    return pruned


def _refuse_more_than(held: int, discard: int) -> None:
    if discard > held:
        raise DecodeError(
            "num_tokens_to_discard", f"the cache holds only {held} tokens", discard, f"discard at most {held}"
        )


def _appends(layer: Layer) -> bool:
    """Whether forgetting the last tokens of this layer is slicing, always."""
    return type(layer) is DynamicLayer


def _can_go_back(layer: Layer) -> bool:
    """Whether this layer can be cropped in the state it is in: a window that is not yet full can."""
    if _appends(layer):
        return True
    return isinstance(layer, DynamicLayer) and layer.is_sliding and layer.get_seq_length() < layer.get_max_length()


@final
@frozen(eq=False)
class Checkpoint:
    """What of a cache cannot be recovered by slicing, as it was when it covered `length` tokens."""

    length: int
    layers: tuple[Layer | None, ...]
    whole: object | None


def is_append_only(cache: object) -> bool:
    """Whether rolling back is slicing, so that no checkpoint is needed."""
    match cache:
        case Cache():
            return all(map(_appends, cache.layers))
        case tuple():
            return True
        case _:
            return False


def checkpoint(cache: object, length: int) -> Checkpoint:
    """A way back to `cache` as it is now. It costs a copy of the layers that are not append-only, and nothing else."""
    if isinstance(cache, Cache):
        return Checkpoint(length, tuple([None if _appends(layer) else deepcopy(layer) for layer in cache.layers]), None)
    return Checkpoint(length, (), deepcopy(cache))


def restored(cache: object, covered: int, back: Checkpoint) -> object:
    """`cache`, which covers `covered` tokens and may be changed, as it was at the checkpoint, which is used up."""
    if not isinstance(cache, Cache):
        return back.whole
    layers = []
    for layer, saved in zip(cache.layers, back.layers, strict=True):
        if saved is None:
            layer.crop(back.length - covered)
        layers.append(layer if saved is None else saved)
    cache.layers = layers
    return cache


def cropped(cache: object, discard: int) -> object:
    """An append-only `cache`, which may be changed, without its last `discard` tokens."""
    if isinstance(cache, Cache):
        for layer in cache.layers:
            layer.crop(-discard)
        return cache
    assert isinstance(cache, tuple)
    return prune_cache(cache, discard)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens a and b share from their beginnings on, looking at the end first, where they mostly part.

    >>> common_prefix((1, 2, 3, 4), (1, 2, 9)), common_prefix((1,), (2,)), common_prefix((1, 2), (1, 2))
    (2, 0, 2)
    """
    top = min(len(a), len(b))
    if a[:top] == b[:top]:
        return top
    stride, low = 1, top - 1
    while low > 0 and a[:low] != b[:low]:
        stride *= 2
        low = max(0, low - stride)
    high = min(top, low + stride)  # the prefixes of length `low` agree, those of length `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
