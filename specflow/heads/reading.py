"""A head as a pure function of tokens: what it read is a memo, which saves work and never changes a result."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from threading import RLock
from typing import Final, TypeAlias, final

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor
from torch.nn import Module

from specflow.asked import features_of
from specflow.caches import Past, lasting
from specflow.errors import DecodeError
from specflow.guards.checks import described, does, is_whole, named, valid, whole
from specflow.guards.ids import ids_of, text_of
from specflow.heads.head import Head, Vocabulary
from specflow.predictors.memo import DRAFTS, Tree
from specflow.prefix import TEXTS, common_prefix
from specflow.protocols import Limits, ReadsFeatures, checked_limits
from specflow.state import Proposal, Tokens, parents_of
from specflow.trees import depths, lineage

TOGETHER: Final = 512
"""How many tokens of a text a head reads in one pass."""

Drafts: TypeAlias = tuple[tuple[int, int], ...]
"""Drafts that were read, as (token, parent)."""


@final
@define(eq=False)
class Memo:
    """What a head made of a text and of drafts after it: `states` [1 + drafts, H], after the text and each of them.

    `past` covers a place for each token but the first, then one for each draft.
    """

    past: Past
    tokens: list[int]
    states: Tensor
    drafts: Drafts = ()

    def keep(self, places: int) -> None:
        """Cover only the first places of the text, and no draft."""
        if self.past.cache is not None:
            self.past.go_back(places)
        del self.tokens[places + 1 :]
        self.drafts = ()


def _is_head(name: str, value: object) -> None:
    """A module with what `Head` asks for."""
    does("a head", "give one, such as load_head reads", "begin", "enter", "advance", "say")(name, value)
    told = [getattr(value, told, None) for told in ("vocabulary", "reads", "width", "looks_back")]
    kinds, ahead = [Vocabulary, tuple, int, bool], getattr(value, "ahead", 0)
    tells = all(map(isinstance, told, kinds)) and (ahead is None or (is_whole(ahead) and ahead > 0))
    if not isinstance(value, Module) or not tells:
        happened, remedy = f"{name} does not tell what a head tells", "give a module, such as load_head reads"
        raise DecodeError(name, happened, f"a {type(value).__name__}", remedy)


@final
@define(eq=False)
class HeadPredictor:
    """What a head says: `predict(text, drafts)` gives logits [n + 1, V] after a text and after each of n drafts.

    The head reads what `target` held at all tokens of the text but the last, as `target.features` tells, and the
    tokens after them. The target is not asked about drafts: after those the head goes on from its own states. It is a
    predictor like any other, over the target's vocabulary: -∞ for tokens that the head never drafts.

    Law: a memo never changes a result (exactly in exact arithmetic, within rounding in floats). It is fed what is new
    in a text, and forgets what came otherwise. Up to `memos` texts are remembered, each with the drafts that were read
    after it last. Threads may share it. Call `forget` after a change of the head's weights.

    `DecodeError` for a text of one token, where there is nothing to read, for ids that the head has no embedding for,
    for more drafts in a row than it can make, and for a target whose features are not rows [last, width].

    >>> from specflow.heads import Jump, Vocabulary
    >>> from specflow.testing import TableModel
    >>> from torch.nn import Embedding, Linear
    >>> head = Jump(4, Vocabulary(5, 5), (0,), Embedding(5, 4), Linear(4, 5, bias=False)).double()
    >>> HeadPredictor(head, TableModel(5, width=4))((0, 4), ()).shape
    torch.Size([1, 5])
    """

    head: Head = field(validator=valid(_is_head))
    target: ReadsFeatures = field(
        validator=valid(does("a model that shows its layers", "give CachedPredictor(model, features=…)", "features"))
    )
    memos: int = field(default=TEXTS, validator=valid(whole(1, "keep what was read of one text at least")))
    _kept: list[Memo] = field(init=False, factory=list, repr=False)
    _lock: RLock = field(init=False, factory=RLock, repr=False)

    def __attrs_post_init__(self) -> None:
        self._target_limits()

    def _target_limits(self) -> Limits:
        """What the target can take now. `DecodeError` where it is of another vocabulary than the head."""
        limits = checked_limits(self.target.limits, "target")
        size = self.head.vocabulary.size
        if limits.vocab_size not in (None, size):
            remedy = "load the head with load_head(folder, model)"
            received = f"{size} and {limits.vocab_size}"
            raise DecodeError("head", "head and target have different vocabularies", received, remedy)
        return limits

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        return self.head.vocabulary.spread(self.rows(tokens, drafts, len(parents_of(drafts)) + 1))

    @property
    def limits(self) -> Limits:
        """What a text can take: the target's limits, over the head's vocabulary."""
        return Limits(self.head.vocabulary.size, self._target_limits().context)

    def reach(self, tokens: Tokens) -> int | None:
        """How many tokens in a row the head can draft after a text; None for any number.

        0 after a text that it cannot read: of one token, or with ids that it has no embedding for.
        """
        tokens, context = ids_of("tokens", text_of(tokens)), self._target_limits().context
        if len(tokens) == 1 or min(tokens) < 0 or max(tokens) >= self.head.vocabulary.known:
            return 0
        ends = self.head.ahead, None if context is None else max(0, context - len(tokens) + 1)
        return min((end for end in ends if end is not None), default=None)

    def rows(self, tokens: Tokens, drafts: Sequence[Proposal], last: int) -> Tensor:
        """Logits [last, D] over the head's own vocabulary, after the last `last` of the text and its drafts."""
        tokens, (drafted, parents) = text_of(tokens), Tree.of(drafts)
        whole(1, "ask for one row at least", len(drafts) + 1)("last", last)
        if len(tokens) == 1:
            remedy = "give a text of two tokens at least"
            raise DecodeError("tokens", "there is nothing for a head to read", "1 token", remedy)
        below = [0, *[depth + 1 for depth in depths(parents)]]
        self._check(ids_of("tokens", tokens) + drafted, max(below))
        while True:
            with self._lock:
                missing = self._missing(tokens)
            # Not under the lock: where texts are decoded together, another one goes on while this one waits.
            features = self._features(tokens[:-1], missing) if missing else None
            with self._lock, lasting(), torch.no_grad():
                memo = self._read(tokens, features)
                if memo is not None:
                    states = self._drafted(memo, tuple(zip(drafted, parents, strict=True)))
                    self._kept.insert(0, memo)
                    del self._kept[int(self.memos) :]
                    return self.head.say(states[-int(last) :], below[-int(last) :])

    def forget(self) -> None:
        """Forget all that was read, after a change of the head's weights."""
        with self._lock:
            self._kept.clear()

    def _check(self, ids: Tokens, ahead: int) -> None:
        """Refuses what the head cannot read or draft."""
        known, most = self.head.vocabulary.known, self.head.ahead
        strange = next((token for token in (min(ids), max(ids)) if not 0 <= token < known), None)
        if strange is not None:
            remedy = "use the tokenizer that belongs to the target"
            raise DecodeError("tokens", f"a token id is outside the head's vocabulary of {known}", strange, remedy)
        if most is not None and ahead >= most:
            received = f"{ahead} drafts in a row"
            raise DecodeError("drafts", f"the head drafts {most} tokens", received, "ask about fewer drafts in a row")

    def _features(self, tokens: Tokens, last: int) -> Tensor:
        """What the target held at each of the last `last` tokens, [last, width]."""
        rows = features_of(self.target, tokens, last)
        if rows.shape[1] == self.head.width:
            return rows
        happened = f"the target {named(self.target)} shows no rows of {self.head.width} numbers"
        remedy = f"give it features={self.head.reads}"
        raise DecodeError("target", happened, described(rows), remedy)

    def _best(self, tokens: Tokens) -> tuple[Memo | None, int]:
        """The memo that begins as a text does for longest, and how many places of it serve."""
        best, most = None, 0
        for memo in self._kept:
            shared = common_prefix(memo.tokens, tokens)
            if shared > most:
                best, most = memo, shared
        places = len(tokens) - 1
        if best is None or most < 2:
            return None, 0
        return best, places if most == len(tokens) == len(best.tokens) else min(most, places) - 1

    def _missing(self, tokens: Tokens) -> int:
        """How many of the last places have to be read."""
        missing = len(tokens) - 1 - self._best(tokens)[1]
        return missing if self.head.looks_back else min(missing, 1)

    def _read(self, tokens: Tokens, features: Tensor | None) -> Memo | None:
        """The memo of a text, its missing places read; None where more are missing than there are features for."""
        missing, (memo, kept) = self._missing(tokens), self._best(tokens)
        if missing > (0 if features is None else len(features)):
            return None
        if memo is None:
            memo = Memo(Past(self.head.begin(), 0), [*tokens[:1]], torch.empty(0))
        elif len(memo.tokens) - kept - 1 > DRAFTS:
            memo = deepcopy(memo)
        else:
            self._kept.remove(memo)  # it is put back whole: a pass that fails or is interrupted leaves none
        if missing:
            assert features is not None
            memo.keep(kept)
            states = self.head.enter(features[-missing:])
            for start in range(len(tokens) - 1 - missing, len(tokens) - 1, TOGETHER):
                piece, states = states[:TOGETHER], states[TOGETHER:]
                positions = torch.arange(start, start + len(piece), device=piece.device)
                ids = torch.tensor(tokens[start + 1 : start + 1 + len(piece)], device=piece.device)
                seen = torch.arange(start + len(piece), device=piece.device)
                hidden = seen > positions[:, None] if len(piece) > 1 else None
                memo.states = self.head.advance(piece, ids, positions, memo.past, hidden)[-1:]
            memo.tokens = [*tokens]
        return memo

    def _drafted(self, memo: Memo, tree: Drafts) -> Tensor:
        """The states [n + 1, H] after a text and each draft, those that are not known yet made now."""
        places, known = len(memo.tokens) - 1, common_prefix(memo.drafts, tree)
        if known < len(memo.drafts) and known < len(tree):
            if memo.past.cache is not None:
                memo.past.go_back(places + known)
            memo.drafts, memo.states = tree[:known], memo.states[: known + 1]
        parents = [parent for _, parent in tree]
        below, seen = depths(parents), lineage(parents)
        while known < len(tree):
            end = next((i for i in range(known, len(tree)) if parents[i] >= known), len(tree))
            device = memo.states.device
            before = memo.states[[parent + 1 for parent in parents[known:end]]]
            ids = torch.tensor([token for token, _ in tree[known:end]], device=device)
            positions = places + torch.tensor(below[known:end], device=device)
            hidden = F.pad(torch.from_numpy(~seen[known:end, :end]), (places, 0)).to(device)
            states = self.head.advance(before, ids, positions, memo.past, hidden)
            memo.states, memo.drafts, known = torch.cat((memo.states, states)), tree[:end], end
        return memo.states[: len(tree) + 1]
