"""A model as a pure function of tokens, read from the beginning each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from attrs import Factory, field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.guards.ids import reading_of, text_of
from specflow.paths import Rows, path_by_path
from specflow.predictors.cached import asked_for, limits_of
from specflow.predictors.features import Features
from specflow.predictors.memo import Tree
from specflow.predictors.reader import Reader
from specflow.predictors.trial import Caches, Trials
from specflow.protocols import Limits
from specflow.state import Proposal, Tokens


@final
@frozen(eq=False)
class UncachedPredictor:
    """A model without a memo: it reads the whole text each time. The same function as `CachedPredictor`, slower.

    It remembers nothing, so that threads may share it, one pass at a time. `DecodeError` as in `CachedPredictor`.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    >>> UncachedPredictor(model)((5, 6), ()).shape
    torch.Size([1, 32])
    """

    model: Module
    shown: Features | None = field(default=None, alias="features")
    _trials: Trials = field(
        init=False,
        repr=False,
        default=Factory(lambda self: Trials(Caches(Reader.of(self.model, self.shown)), ()), takes_self=True),
    )

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        return limits_of(self.model)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each draft; a tree path by path."""
        tokens = text_of(tokens)
        Tree.of(drafts)
        return path_by_path(self._last)(tokens, drafts)

    def features(self, tokens: Tokens, last: int, /) -> Tensor:
        """What the chosen layers held at each of the last `last` tokens of a text: [last, F]."""
        tokens, last = reading_of(tokens, last)
        asked_for(self.shown)
        return self._in_parts(tokens, last, self._trials.features_afresh)

    def _last(self, tokens: Tokens, last: int) -> Tensor:
        return self._in_parts(tokens, last, self._trials.read_afresh)

    def _in_parts(self, tokens: Tokens, last: int, rows: Rows) -> Tensor:
        with self._trials.reader.guard:
            self._trials.forget()
            self._trials.meet()
            return self._trials.in_parts(tokens, last, rows)

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing is remembered, so there is nothing to forget."""
        text_of(tokens)
