"""A model as a pure function of tokens, read from the beginning each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from attrs import Factory, field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.guards.ids import ids_of, text_of
from specflow.paths import path_by_path
from specflow.predictors.reader import Reader
from specflow.predictors.trial import Caches, Trials
from specflow.state import Proposal, Tokens, parents_of


@final
@frozen(eq=False)
class UncachedPredictor:
    """A model without a memo: it reads the whole text each time. The same function as `CachedPredictor`, slower.

    It remembers nothing, so that threads may share it, one pass at a time. `DecodeError` as in `CachedPredictor`.
    """

    model: Module
    _trials: Trials = field(
        init=False, repr=False, default=Factory(lambda self: Trials(Caches(Reader.of(self.model)), ()), takes_self=True)
    )

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each draft; a tree path by path."""
        tokens = text_of(tokens)
        parents_of(drafts)
        ids_of("drafts", [draft.token for draft in drafts])
        return path_by_path(self._last)(tokens, drafts)

    def _last(self, tokens: Tokens, last: int) -> Tensor:
        with self._trials.reader.guard:
            self._trials.forget()
            self._trials.meet()
            return self._trials.in_parts(tokens, last, self._trials.read_afresh)

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing is remembered, so there is nothing to forget."""
        text_of(tokens)
