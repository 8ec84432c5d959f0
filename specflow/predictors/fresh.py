"""A model as a pure function of tokens, read from the beginning each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.guards.finite import checked
from specflow.guards.ids import ids_of, text_of
from specflow.paths import path_by_path
from specflow.predictors.reader import Reader
from specflow.predictors.trial import Caches, Stretch, Trials
from specflow.state import Proposal, Tokens, parents_of


@final
@frozen(eq=False)
class UncachedPredictor:
    """A model without a memo: it reads the whole text each time. The same function as `CachedPredictor`, slower.

    It remembers nothing, so that threads may share it, one pass at a time. `DecodeError` as in `CachedPredictor`.
    """

    model: Module
    _reader: Reader = field(init=False, repr=False)
    _trials: Trials = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        reader = Reader.of(self.model)
        object.__setattr__(self, "_reader", reader)
        object.__setattr__(self, "_trials", Trials(Caches(reader), ()))

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] behind `tokens`, and behind them and the path down to each draft; a tree path by path."""
        tokens = text_of(tokens)
        parents_of(drafts)
        ids_of("drafts", [draft.token for draft in drafts])
        return path_by_path(self._last)(tokens, drafts)

    def _last(self, tokens: Tokens, last: int) -> Tensor:
        reader, trials = self._reader, self._trials
        reader.refuse_strange(tokens)
        with reader.guard:
            trials.meet(reader.watch.look())
            parts = trials.parts(len(tokens), last)
            rows = [read_afresh(reader, tokens[:end], wanted, trials.stretch(end)) for end, wanted in parts]
        return checked(rows[0] if len(rows) == 1 else torch.cat(rows), len(tokens))

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing is remembered, so there is nothing to forget."""
        text_of(tokens)


def read_afresh(reader: Reader, tokens: Tokens, last: int, stretch: Stretch) -> Tensor:
    """Logits [last, V] by passes over whole texts: one where its rows are right together, else one for each row."""
    if stretch.feeding.together:
        return reader.read_afresh(reader.ids([tokens]), last)[0]
    rows = []
    for end in range(len(tokens) - last + 1, len(tokens) + 1):
        if stretch.forgetful:
            reader.read_afresh(reader.ids([tokens[:1]]), 1)
        rows.append(reader.read_afresh(reader.ids([tokens[:end]]), 1)[0])
    return torch.cat(rows)
