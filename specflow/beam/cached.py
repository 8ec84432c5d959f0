"""A model that reads beams: one batched pass over texts of one length, and a KV cache whose rows follow the beams."""

from __future__ import annotations

from typing import final

import torch
from attrs import define, field
from torch import Tensor
from torch.nn import Module
from transformers import Cache

from specflow.caches import is_plain
from specflow.errors import DecodeError
from specflow.guards.checks import shown
from specflow.guards.finite import finite
from specflow.guards.ids import ids_of
from specflow.predictors.reader import Reader
from specflow.predictors.trial import Caches, Trials
from specflow.state import Tokens


@final
@define(eq=False)
class CachedBeamPredictor:
    """A model that reads beams in one batch, and feeds of each only the token that its KV cache does not cover.

    `predict(texts)` gives logits [B, V]. Where each text is one of the texts before and one more token, the rows of the
    cache are picked as the texts' parents are; anything else is read from the beginning, one text at a time. So is
    everything by a model whose cache is not keys and values of attention alone, that takes none, or that was found not
    to read rightly over it, one token at a time (`specflow.predictors.trial`).
    Law: the cache never changes a result (exactly in exact arithmetic, within rounding in floats).

    Threads may share it, one pass at a time; searches in turns read their texts again. What was read is forgotten when
    the model has changed, as in `CachedPredictor`.
    """

    model: Module
    _reader: Reader = field(init=False, repr=False)
    _trials: Trials = field(init=False, repr=False)
    _rows: dict[Tokens, int] = field(init=False, factory=dict, repr=False)
    _cache: Cache | None = field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        self._reader = Reader.of(self.model)
        self._trials = Trials(Caches(self._reader))

    def __call__(self, texts: tuple[Tokens, ...], /) -> Tensor:
        """Logits [B, V] of what follows each of the texts, which have one length."""
        texts = _texts(texts)
        with self._reader.guard:
            if self._trials.meet():
                self._rows = {}
            parents, cache = [self._rows.get(text[:-1]) for text in texts], self._cache
            # Emptied first: an exception inside the model must not leave a cache that covers who knows what.
            self._rows, self._cache = {}, None
            for text in texts:
                self._reader.refuse_strange(text)
            logits = self._read(texts, [row for row in parents if row is not None], cache)
        for row in logits:
            finite(row[None], len(texts[0]))
        return logits

    def _read(self, texts: tuple[Tokens, ...], parents: list[int], cache: Cache | None) -> Tensor:
        """Logits [B, V] of texts whose parents have these rows in `cache`, if it has them all."""
        reader, trials, length = self._reader, self._trials, len(texts[0])
        feeding = trials.regime(length).feeding
        told, follows = feeding.told, feeding.most > 0 and feeding.least == 1
        carries = length > 1 and trials.region(length) == trials.region(length - 1)
        if cache is not None and follows and carries and len(parents) == len(texts):
            cache.reorder_cache(torch.tensor(parents, device="cpu"))
            logits, after, _ = reader.read(reader.ids([text[-1:] for text in texts]), cache, length - 1, 1, told=told)
            return self._kept(texts, logits[:, 0], after)
        if len(texts) == 1 and follows:
            logits, after, _ = reader.read(reader.ids(texts), None, 0, 1, told=told)
            return self._kept(texts, logits[:, 0], after)
        return torch.cat([trials.read_afresh(text, 1) for text in texts])

    def _kept(self, texts: tuple[Tokens, ...], logits: Tensor, cache: object | None) -> Tensor:
        """The logits, once the cache is kept for the next texts, if its rows can be picked."""
        if isinstance(cache, Cache) and is_plain(cache):
            self._rows, self._cache = {text: row for row, text in enumerate(texts)}, cache
        return logits


def _texts(texts: object) -> tuple[Tokens, ...]:
    """Texts of one length, at least one of them and of at least one token."""
    remedy = "give a tuple of texts, all of one length"
    if not isinstance(texts, tuple | list) or not texts:
        raise DecodeError("texts", "these are not texts", shown(texts), remedy)
    several = tuple([ids_of("texts", text) for text in texts])
    lengths = sorted({len(text) for text in several})
    if lengths[0] == 0 or len(lengths) > 1:
        raise DecodeError("texts", "texts are empty, or of several lengths", f"lengths {lengths}", remedy)
    return several
