"""A model that reads many texts in one pass: a predictor over a memo with a row for each."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import final

from attrs import Factory, define, field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.batch.hub import Asked, Reply, Shared
from specflow.batch.ragged import Piece, new_past, read_together
from specflow.batch.sharing import Waiting, in_turns, note_pass
from specflow.batch.trial import reads_together
from specflow.caches import Shelves
from specflow.errors import said
from specflow.guards.checks import a, each, or_none, valid, whole
from specflow.guards.finite import NOTICED, argmax, is_near
from specflow.guards.ids import reading_of, text_of
from specflow.policies import CostMeter
from specflow.policies.meter import wait_for
from specflow.predictors.cached import CachedPredictor, asked_for, limits_of, shared_meter
from specflow.predictors.features import Features
from specflow.predictors.memo import Memo, Memos, Tree
from specflow.predictors.reader import Reader
from specflow.predictors.trial import ANY_PIECES, Caches, Region, Trials
from specflow.predictors.watch import Kinds
from specflow.protocols import Limits
from specflow.state import Proposal, Tokens
from specflow.trees import is_chain


@final
@define(eq=False)
class BatchPredictor:
    """A model with a memo for many texts: in `together` one pass answers all who ask. Else it reads one text, as
    `CachedPredictor` does.

    `predict(text, drafts)` gives logits [n + 1, V]. Law: who else is in the batch changes nothing (exactly in exact
    arithmetic, within rounding in floats): it is what a fresh pass over that prefix alone gives, or an error.

    Up to `slots` texts are read in one pass, and the memos of as many are kept: keys and values of slots × context
    tokens at most, or of `tokens` tokens, where that is given. A text starts from the longest prefix that any memo
    holds, of its own, of an ended text, or, by a copy, of one that goes on. Where several begin with the same prompt
    the others wait until one has read it. A pass reads at most `piece` tokens of a prompt, so that a long one does not
    hold up the others.

    The model is a stock one of transformers. Texts are read together where it takes masks and positions and holds rows
    of keys and values, sliding windows among them, and where that gave what fresh passes give on random texts, tried
    once a model object. What cannot be read so is read one by one, and so are texts whose pass fails, so that what is
    wrong with one of them is raised in its decode alone; a warning says once where no text was to blame.

    `meter` is told what a pass over k tokens of each text takes, so that `CostAware` weighs what a draft costs in a
    full batch; unless another one is given, it is `meter_of(model, slots)`. `features` are what `CachedPredictor`
    shows, too.

    `DecodeError` as in `CachedPredictor`; in `together` what is wrong with one text is raised in its decode alone.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    >>> from specflow.batch import together
    >>> predict = BatchPredictor(model.double(), slots=2)
    >>> reads = [lambda text=text: predict(text, ()).shape for text in ((5, 6), (7, 8, 9))]
    >>> sorted(together(reads, slots=2))
    [(0, torch.Size([1, 32])), (1, torch.Size([1, 32]))]
    """

    model: Module
    slots: int = field(default=8, validator=valid(whole(1, "read one text at least")))
    piece: int = field(default=512, validator=valid(whole(1, "read one token of a prompt at least")))
    tokens: int | None = field(
        default=None, validator=valid(or_none(whole(1, "give room for a number of tokens, or None")))
    )
    meter: CostMeter = field(
        default=Factory(lambda self: shared_meter(self.model, self.slots), takes_self=True),
        validator=valid(a(CostMeter, "give a CostMeter, or leave it out")),
        repr=False,
    )
    shown: Features | None = field(default=None, alias="features")
    _alone: CachedPredictor = field(init=False, repr=False)
    _reader: Reader = field(init=False, repr=False)
    _trials: Trials = field(init=False, repr=False)
    _memos: Memos = field(init=False, repr=False)
    _kinds: dict[Kinds, _Kind] = field(init=False, factory=dict, repr=False)
    _now: _Kind = field(init=False, repr=False)
    _waiting: Waiting = field(init=False, factory=Waiting, repr=False)
    _warned: bool = field(init=False, default=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._alone = self._who_reads_alone()
        self._reader = Reader.of(self.model, self.shown)
        self._trials = Trials(Caches(self._reader))
        self._memos = Memos(int(self.slots), self.tokens)

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        return limits_of(self.model)

    @property
    def held(self) -> int:
        """Of how many tokens, drafts among them, keys and values are kept now."""
        return self._memos.held

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        return Shared(self.read)(tokens, drafts)

    def features(self, tokens: Tokens, last: int, /) -> Tensor:
        """What the chosen layers held at each of the last `last` tokens of a text: [last, F], as `CachedPredictor`.

        What was not read yet is read in a pass that is shared, as in a call.
        """
        tokens, last = reading_of(tokens, last)
        asked_for(self.shown)
        found = self._kept(tokens, last)
        if found is None:
            self(tokens, ())
            found = self._kept(tokens, last)
        return self._alone.features(tokens, last) if found is None else found

    def read(self, asked: Sequence[Asked], /) -> list[Reply]:
        """The answer to each who asks: its logits, its error, or None while its prompt is being read."""
        each(a(Asked, "give the Asked that came"))("asked", asked)
        return in_turns(self._read, asked, self.slots)

    def forget(self) -> None:
        """Forget all that was read, after a change of the model that cannot be noticed."""
        with self._reader.guard:
            self._memos.clear()
            self._trials.forget()
            self._alone.forget()

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing: what a text rejected is forgotten when it is read next, or when its place is wanted."""
        text_of(tokens)

    def _read(self, asked: Sequence[Asked]) -> list[Reply]:
        replies: list[Reply] = [None] * len(asked)
        parts: dict[int, _Part] = {}
        with self._reader.guard:
            self._meet()
            for i, one in enumerate(asked):
                try:
                    tokens, tree = self._looked_at(one)
                    if not self._may_join(len(tokens) + len(tree.drafted), is_chain(tree.parents)):
                        self._warn("it cannot read them together")
                        replies[i] = self._alone(tokens, one.drafts)
                    elif not self._is_being_read(one, tokens, parts.values()):
                        parts[i] = self._part(one, tokens, tree)
                except Exception as error:  # whatever it is, it is this text's
                    replies[i] = error
            self._memos.make_room(len(parts))
            began = self.meter.now()
            passed, failure = self._passed([*parts.values()])
            for rows in passed[:1]:
                wait_for(rows)
            if all(rows is not None for rows in passed):
                self._note(parts.values(), began)
            for i, rows in zip(parts, passed, strict=True):
                part = parts[i]
                if rows is None or not _is_finite(rows):
                    replies[i] = self._by_itself(part)
                    continue
                part.memo.tokens += part.piece.ids[: part.text]
                if part.tree is not None:
                    part.memo.tree = part.tree
                    replies[i] = rows
                self._memos.put(part.memo)
            if failure is not None and not any(isinstance(replies[i], Exception) for i in parts):
                self._warn(f"a pass over {len(parts)} of them failed, and each alone did not ({failure})")
        return replies

    def _kept(self, tokens: Tokens, last: int) -> Tensor | None:
        """The features [last, F] of a text that a row covers; None where none does."""
        with self._reader.guard:
            self._meet()
            joins = self._may_join(len(tokens), chain=True)
            return self._memos.features(tokens, last, self._now.region) if joins else None

    def _meet(self) -> None:
        """Forget what was read of another model than this now is."""
        if not self._trials.meet():
            return
        if self._trials.renewed:
            self._memos.clear()
            self._kinds.clear()
            self._alone = self._who_reads_alone()  # the older one may never look again, and holds the older weights
        kind = self._trials.kind
        # Each its own, so that decodes in different modes, which are read in turns, do not forget each other's.
        self._now = self._kinds.setdefault(kind, _Kind(Region(0, kind)))

    def _who_reads_alone(self) -> CachedPredictor:
        return CachedPredictor(self.model, memos=self.slots, features=self.shown)

    def _looked_at(self, asked: Asked) -> tuple[Tokens, Tree]:
        """The text and its drafts. `DecodeError` for ids that the model does not have."""
        tokens, tree = text_of(asked.tokens), Tree.of(asked.drafts)
        self._reader.refuse_strange(tokens + tree.drafted)
        return tokens, tree

    def _may_join(self, length: int, chain: bool) -> bool:
        """Whether a text of this length is read rightly beside others."""
        trials = self._trials
        if trials.regime(length).feeding is not ANY_PIECES or trials.region(length).over:
            return False
        return all(self._joined(over, chain) for over in (0, *trials.horizons) if over < length)

    def _joined(self, over: int, chain: bool) -> bool:
        """The same of texts of more than `over` tokens. Who reads trees reads chains, too."""
        joins = self._now.joins
        if (over, True) not in joins:
            joins[over, True] = reads_together(self._reader, over, trees=True)
        if chain and not joins[over, True] and (over, False) not in joins:
            joins[over, False] = reads_together(self._reader, over, trees=False)
        return joins[over, True] or (chain and joins[over, False])

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            name = type(self.model).__name__
            warnings.warn(f"some texts over {name} are read one by one: {why}", stacklevel=2)

    def _is_being_read(self, asked: Asked, tokens: Tokens, parts: Iterable[_Part]) -> bool:
        """Whether it is worth a pass of waiting: another text of this one reads what this begins with."""
        known = self._memos.covered(tokens, self._now.region)
        return self._waiting.waits(asked, tokens, known, [(part.asked.tokens, part.finishes) for part in parts])

    def _part(self, asked: Asked, tokens: Tokens, tree: Tree) -> _Part:
        """What of a text is read in this pass: the next piece of it, or all that is new, and the drafts."""
        region = self._now.region
        memo = self._memos.take(tokens, region, owner=asked.by)
        memo = memo or Memo(new_past(self._reader, self._now.shelves), region, owner=asked.by)
        past = memo.past
        piece = tokens[past.length :]
        if len(piece) > self.piece:
            ids = piece[: self.piece]
            return _Part(asked, memo, Piece(past, ids, tuple(range(-1, len(ids) - 1)), 1), len(ids))
        drafted = tree.drafted
        whole = (*range(-1, len(piece) - 1), *[len(piece) + parent for parent in tree.parents])
        return _Part(asked, memo, Piece(past, piece + drafted, whole, len(drafted) + 1), len(piece), tree)

    def _passed(self, parts: Sequence[_Part]) -> tuple[Sequence[Tensor | None], str | None]:
        """The rows of each part, by one pass; where that failed None for each, and what it said."""
        try:
            return (read_together(self._reader, [part.piece for part in parts]) if parts else ()), None
        except Exception as error:  # whose fault it is shows when each is read by itself
            return [None] * len(parts), said(error)  # the error itself would hold the memory of the pass

    def _note(self, parts: Collection[_Part], began: float) -> None:
        """What a text's tokens cost in a batch, told by a pass that reads nobody's prompt."""
        if parts and all(part.text <= 2 and part.finishes for part in parts):
            note_pass(self.meter, self.slots, [len(part.piece.ids) for part in parts], began)

    def _by_itself(self, part: _Part) -> Reply:
        try:
            return self._alone(part.asked.tokens, part.asked.drafts)
        except Exception as error:
            return error


def _is_finite(rows: Tensor) -> bool:
    """Whether rows are finite, where they are on the host: else that is seen where a token of theirs arrives."""
    return not is_near(rows) or NOTICED not in argmax(rows)


@final
@frozen(eq=False)
class _Kind:
    """What there is for the texts of one kind of model: their region, their shelves, and which of them are joined."""

    region: Region
    shelves: Shelves = field(factory=Shelves)
    joins: dict[tuple[int, bool], bool] = field(factory=dict)


@final
@frozen(eq=False)
class _Part:
    """What is read of one text in a pass: a `piece`, the first `text` ids of which are text and the others drafts.

    Those are the whole `tree`; it is None where more of the text is read in later passes.
    """

    asked: Asked
    memo: Memo
    piece: Piece
    text: int
    tree: Tree | None = None

    @property
    def finishes(self) -> bool:
        """Whether all of the text is read."""
        return self.tree is not None
