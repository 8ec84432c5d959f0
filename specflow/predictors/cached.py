"""A model as a pure function of tokens. Its KV cache is a memo: it saves work and never changes a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

import torch
from attrs import Factory, define, field, setters
from torch import Tensor
from torch.nn import Module

from specflow.caches import LossyCache, Past
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, calls, or_none, shown, valid, whole
from specflow.guards.finite import arrived, checked, on_arrival
from specflow.guards.ids import reading_of, text_of
from specflow.paths import path_by_path
from specflow.policies import CostMeter, meter_of
from specflow.policies.meter import wait_for
from specflow.predictors.features import Features
from specflow.predictors.memo import DRAFTS, Memo, Memos, Tree
from specflow.predictors.reader import Reader, context_of, vocabulary_of
from specflow.predictors.trial import ANY_PIECES, FEEDINGS, Caches, Feeding, Trials
from specflow.protocols import Choose, Limits
from specflow.state import Proposal, Tokens
from specflow.trees import is_chain

REREAD: Final = 32
"""How many tokens may be read again with the next draft before they get a pass of their own."""


def limits_of(model: Module) -> Limits:
    """What a model tells of its limits; a module without a config or embeddings has none that we know of.

    `DecodeError` for what is no module.

    >>> limits_of(torch.nn.Linear(2, 2))
    Limits(vocab_size=None, context=None)
    """
    a(Module, "load a model, with specflow.models.load")("model", model)
    return Limits(vocabulary_of(model), context_of(model))


def shared_meter(model: object, slots: int = 1) -> CostMeter:
    """That of all who read the model; what is no model is refused by whoever reads it."""
    return meter_of(model, slots) if isinstance(model, Module) else CostMeter()


@final
@define(eq=False)
class CachedPredictor:
    """A model with a memo: it feeds the model only what its cache does not cover.

    `predict(text, drafts)` gives logits [n + 1, V], on the model's device: of what follows the text, and of what
    follows the text and the path down to each of the n drafts. Law: a memo never changes a result (exactly in exact
    arithmetic, within rounding in floats); it is that of a fresh pass over that prefix alone, or an error. The model,
    its config and its mode stay as they were.

    How a model can be fed is tried before it reads its first text, once for a model object (`predictors.trial`); one
    that can only be read from the beginning is read so each time. Where a cache cannot be cropped, it goes back to a
    mark, and what has been accepted since then is read again together with the next draft.

    Drafts that are a tree are read in one pass where the model can be told what each token sees, which is tried with
    the first tree; else, and over caches that are more than rows of keys and values, path by path.

    The caches of up to `memos` texts are kept, the least recently used one is dropped, so that texts in turns are not
    read again; each takes its memory. Any number of threads may share a predictor: the model's own lock lets one of
    them in at a time, whatever predictor it comes through. A pass that fails or is interrupted loses its cache and
    never leaves a wrong one.

    What was read is forgotten when the model has changed, as far as `predictors.watch` sees it: written weights,
    another adapter, dtype or device. After any other change (weights written through `.data`, say) call `forget`.

    With `features`, numbers of layers or a function that returns modules, it also shows what those layers held at each
    token (`predictor.features`), which drafters can read: rows that are kept with the memo.

    `meter` hears what its passes take, by the tokens that were drafted, so that `CostAware(predictor.meter)` knows what
    a draft costs. Unless another one is given, all who read this model object share it (`policies.meter_of`). What it
    says is never part of a result.

    `make_cache` makes the cache to start from; by default the model makes its own. `DecodeError` for what is no model
    that reads ids alone and is a function of them, for ids that it does not have, where a text outgrows a cache of
    fixed size, where such a cache changes the logits and is no `LossyCache`, where it offloads from anything but CUDA,
    where the model gives no logits, or logits that are not finite, naming the position. On a device nothing is copied
    to look for those: they are noticed where a token that was chosen from them arrives (`specflow.guards.finite`).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from specflow import chain
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> predict = CachedPredictor(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).double())
    >>> rows = predict((3, 4), chain((5, 6)))
    >>> rows.shape, torch.allclose(predict((3, 4, 5), ())[0], rows[1])
    (torch.Size([3, 16]), True)
    """

    model: Module
    make_cache: Callable[[], object] | None = field(
        default=None, validator=valid(or_none(calls("a maker of caches", "give a function that makes a cache")))
    )
    memos: int = field(default=4, validator=valid(whole(1, "keep the cache of one text at least")))
    shown: Features | None = field(default=None, alias="features")
    meter: CostMeter = field(
        default=Factory(lambda self: shared_meter(self.model), takes_self=True),
        validator=valid(a(CostMeter, "give a CostMeter, or leave it out")),
        repr=False,
    )
    _reader: Reader = field(init=False, repr=False)
    _caches: Caches = field(init=False, repr=False)
    _trials: Trials = field(init=False, repr=False)
    _memos: Memos = field(init=False, repr=False)
    _unread: int = field(init=False, default=0, repr=False, on_setattr=setters.NO_OP)
    """How many tokens before the drafts this pass has had to read; `MOST` where the text is a new one."""

    def __attrs_post_init__(self) -> None:
        self._reader = Reader.of(self.model, self.shown)
        takes_none = self._reader.cache_name is None
        if takes_none and self.make_cache is not None:
            name, remedy = type(self.model).__name__, "leave make_cache out"
            raise DecodeError("make_cache", "the model takes no cache", name, remedy)
        self._memos = Memos(int(self.memos))
        self._caches = Caches(self._reader, self.make_cache)
        self._trials = Trials(self._caches, () if takes_none else FEEDINGS)

    @property
    def limits(self) -> Limits:
        """What a text over this memo can take: the limits of the model as it is now, and the room in a fixed cache."""
        known = limits_of(self.model)
        sizes = [known.context, self._caches.room]
        return Limits(known.vocab_size, min((size for size in sizes if size is not None), default=None))

    @property
    def feeding(self) -> Feeding:
        """How the model is fed a short text. It is tried, if it was not yet."""
        with self._reader.guard:
            self._meet()
            return self._trials.regime(1).feeding

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        tokens, tree = text_of(tokens), Tree.of(drafts)
        with self._reader.guard:
            self._unread, began = 0, self.meter.now()
            if is_chain(tree.parents):
                rows = self._last(tokens + tree.drafted, len(tree.drafted) + 1)
            else:
                rows = self._tree(tokens, tuple(drafts), tree)
            if self._unread <= DRAFTS:
                wait_for(rows)
                self.meter.note(len(tree.drafted) + 1, self.meter.since(began))
            return rows

    def features(self, tokens: Tokens, last: int, /) -> Tensor:
        """What the chosen layers held at each of the last `last` tokens of a text: [last, F], a copy.

        Law: they are those of a fresh pass over each prefix, whatever was read before. What a memo covers is not read
        again: after a step all but the step's last token. `DecodeError` where no `features` were asked for, and as in a
        call.
        """
        tokens, last = reading_of(tokens, last)
        asked_for(self.shown)
        with self._reader.guard:
            self._meet()
            return self._trials.in_parts(tokens, last, self._features)

    def forget(self) -> None:
        """Forget all that was read, after a change of the model that cannot be noticed."""
        with self._reader.guard:
            self._memos.clear()
            self._trials.forget()

    def read_ahead(self, tokens: Tokens, most: int, choose: Choose, /) -> Tokens:
        """`most` ≥ 1 tokens that follow, each chosen from the logits after those before it, and copied all at once.

        Fewer where a cache of fixed size, or a horizon of the model, does not let as many be read; and one where the
        model cannot be fed one token at a time over its cache. `DecodeError` as in a call.
        """
        tokens = text_of(tokens)
        whole(1, "read one token ahead at least", most=2**31)("most", most)
        most = int(most)
        calls("a choice of a token", "give a function of logits and a position")("choose", choose)
        with self._reader.guard:
            self._meet()
            row = self._rows(tokens, 1)[0]
            rows, ids = [row], [chosen_id(choose, row, len(tokens))]
            feeding = self._trials.regime(len(tokens)).feeding
            if feeding.most and feeding.least == 1 and most > 1:
                with self._memos.of(tokens, self._trials.region(len(tokens)), 0) as memo:
                    further = self._furthest(tokens, most) if len(memo.tokens) == len(tokens) else 0
                    for length in range(len(tokens) + 1, further + 1):
                        rows.append(self._extend(memo.past, ids[-1].reshape(1, 1), 1, feeding)[0])
                        ids.append(chosen_id(choose, rows[-1], length))
                    chosen = _arrived(ids, rows, len(tokens))
                    memo.tokens += chosen[:-1]
                return chosen
        return _arrived(ids, rows, len(tokens))

    def _last(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] after each of the last `last` prefixes of a text."""
        with self._reader.guard:
            self._meet()
            return self._trials.in_parts(tokens, last, self._rows)

    def _tree(self, tokens: Tokens, drafts: tuple[Proposal, ...], tree: Tree) -> Tensor:
        """Logits [n + 1, V] after `tokens` and after each draft of a tree."""
        with self._reader.guard:
            self._meet()
            if len(tokens) > 1 and self._may_read_trees(len(tokens) + len(drafts)):
                rows = self._tree_at_once(tokens, tree)
                if rows is not None:
                    return checked(rows, len(tokens))
            rows = path_by_path(self._last)(tokens, drafts)
            self._may_read_trees(len(tokens) + 1)  # tried now, with the prompt, and not in a pass that is timed
            return rows

    def _tree_at_once(self, tokens: Tokens, tree: Tree) -> Tensor | None:
        """The same in one pass; None over a cache whose rows cannot be kept one by one."""
        self._reader.refuse_strange(tree.drafted)
        region = self._trials.region(len(tokens))
        with self._memos.of(tokens, region) as memo:
            missing = len(tokens) - len(memo.tokens)
            self._unread = max(self._unread, missing - 1)
            if missing <= 1 + REREAD:
                return self._tree_over(memo, tokens, tree)
        self._rows(tokens[:-1], 1)
        with self._memos.of(tokens, region) as memo:
            return self._tree_over(memo, tokens, tree)

    def _tree_over(self, memo: Memo, tokens: Tokens, tree: Tree) -> Tensor | None:
        """The same over a memo that covers most of the text."""
        if not (memo.tokens and memo.past.holds_rows):
            return None
        piece = tokens[memo.past.length :]
        self._reader.refuse_strange(piece)
        ids = self._reader.ids([piece + tree.drafted])
        whole = [*range(-1, len(piece) - 1), *[len(piece) + parent for parent in tree.parents]]
        logits = self._reader.extend(memo.past, ids, len(tree.drafted) + 1, whole)
        memo.tokens += piece
        memo.ahead, memo.tree = 0, tree
        return logits

    def prune(self, tokens: Tokens, /) -> None:
        """Forget what is seen not to be a prefix of `tokens`, if that costs nothing; other texts stay as they are.

        Only the end is looked at, where drafts were rejected: the next reading compares the whole text.
        """
        tokens = text_of(tokens)
        with self._reader.guard:
            self._memos.prune(tokens)

    def _meet(self) -> None:
        """Forget what was read of another model than this now is."""
        if self._trials.meet() and self._trials.renewed:  # memos of another kind are in another region
            self._memos.clear()

    def _rows(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] of rows that lie in one region of the model."""
        feeding = self._trials.regime(len(tokens)).feeding
        if not feeding.most:
            return self._trials.read_afresh(tokens, last)
        new = max(last, feeding.least)
        room = self._caches.room
        if room is not None and len(tokens) > room:  # before a memo is taken out
            remedy = "make a larger cache, or start from `limits`"
            raise DecodeError("make_cache", f"the text outgrows a cache of {room} tokens", len(tokens), remedy)
        with self._memos.of(tokens, self._trials.region(len(tokens)), new) as memo:
            if not memo.tokens:
                memo.past = Past(self._caches.new(), 0)
            before = len(tokens) - new
            missing = before - len(memo.tokens)
            self._unread = max(self._unread, missing if memo.tokens else MOST)
            if self._memos.goes_back and missing > REREAD and self._trials.region(before) == memo.region:
                self._read(memo, tokens[:before], 1, feeding)
            return self._read(memo, tokens, last, feeding)

    def _features(self, tokens: Tokens, last: int) -> Tensor:
        """Features [last, F] of rows that lie in one region of the model."""
        if not self._trials.regime(len(tokens)).feeding.most:
            return self._trials.features_afresh(tokens, last)
        region = self._trials.region(len(tokens))
        found = self._memos.features(tokens, last, region)
        if found is None:
            self._rows(tokens, 1)
            found = self._memos.features(tokens, last, region)
            assert found is not None
        return found

    def _read(self, memo: Memo, tokens: Tokens, last: int, feeding: Feeding) -> Tensor:
        """Read `tokens`, whose beginning the memo covers, in the pieces that the model can be fed."""
        self._reader.refuse_strange(tokens[len(memo.tokens) :])
        rows = []
        for end in feeding.ends(len(memo.tokens), len(tokens), last):
            piece = tokens[len(memo.tokens) : end]
            rows.append(self._extend(memo.past, self._reader.ids([piece]), min(last, len(piece)), feeding))
            memo.tokens += piece
        memo.ahead = last - 1
        return torch.cat(rows)[-last:] if len(rows) > 1 else rows[0]

    def _extend(self, past: Past, ids: Tensor, last: int, feeding: Feeding) -> Tensor:
        """Logits [last, V] of the text that `past` begins and `ids` [1, k] end."""
        if past.length and past.needs_marks and (last > 1 or self._memos.goes_back or not past.is_marked):
            past.mark()
        given = past.cache
        logits = self._reader.extend(past, ids, last, told=feeding.told)
        if past.cache is None and given is None:  # a few models keep the cache that they make to themselves
            past.extend(self._caches.to_be_given(), 0)
            return self._extend(past, ids, last, feeding)
        return logits

    def _furthest(self, tokens: Tokens, most: int) -> int:
        """How long a text may become that is read on by itself from `tokens`."""
        ends = (self.limits.context, *self._trials.horizons)
        further = [end for end in ends if end is not None and end >= len(tokens)]
        return min([len(tokens) + most - 1, *further])

    def _may_read_trees(self, length: int) -> bool:
        """Whether the model reads trees; its cache must hold rows, too."""
        if self._trials.regime(length).feeding != ANY_PIECES or isinstance(self.make_cache, LossyCache):
            return False
        return self._trials.reads_trees(length)


def asked_for(features: Features | None) -> None:
    """`DecodeError` where a predictor was not told which features it shall show."""
    if features is None:
        remedy = "make the predictor with some: CachedPredictor(model, features=(2, 14, 25))"
        raise DecodeError("features", "the predictor was made without features", "None", remedy)


def chosen_id(choose: Choose, logits: Tensor, position: int) -> Tensor:
    """What a choice from `logits` [V] comes to: an id []. `DecodeError` for anything else."""
    token: object = choose(logits, position)
    if not isinstance(token, Tensor) or token.numel() != 1 or token.is_floating_point() or token.is_meta:
        raise DecodeError("choose", "a choice is no id", shown(token), "return a tensor that holds one id")
    return token.reshape(())


def _arrived(ids: list[Tensor], rows: list[Tensor], length: int) -> Tokens:
    """The chosen ids on the host, in one copy. `DecodeError` for one chosen from logits that are not finite."""
    sent: list[int] = on_arrival(torch.stack(ids), torch.stack(rows)).tolist()
    return tuple(arrived(sent, length - 1))
