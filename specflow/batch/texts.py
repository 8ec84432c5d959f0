"""Models that read several texts in one pass by themselves, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final, runtime_checkable

from attrs import frozen
from torch import Tensor

from specflow.caches import KVCache


@final
@frozen(eq=False)
class Text:
    """What one text has in a pass: `ids` [k] that follow what its cache covers, one by one or as a tree of `parents`.

    Logits are wanted after the last `last` of them; 0 is all.
    """

    ids: Tensor
    cache: KVCache
    parents: Sequence[int] | None
    last: int


class _Output(Protocol):
    @property
    def logits(self) -> Tensor: ...


@runtime_checkable
class ReadsTexts(Protocol):
    """A model that reads several texts in one pass."""

    def new_cache(self) -> KVCache:
        """The cache of a text of which nothing was read yet."""
        ...

    def __call__(self, *, texts: Sequence[Text], features: tuple[int, ...] = ()) -> _Output:
        """Logits [1, Σ last, V] of each text, one after the other. The cache of each then covers its ids.

        Where `features` name layers the output has features [1, Σ k, F], too: see `predictors.features.Told`.
        """
        ...
