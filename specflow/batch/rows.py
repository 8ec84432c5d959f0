"""What is kept of the texts of a batch: a memo for each, the longest prefix to start from, and no more than there is
room for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import final
from weakref import ref

from attrs import define, field
from greenlet import greenlet

from specflow.predictors.memo import Memo
from specflow.prefix import begins, common_prefix
from specflow.state import Tokens


@final
@define(eq=False)
class Row:
    """A memo, and the decode whose it is. It is free when that has ended, or was never known."""

    memo: Memo
    _by: Callable[[], object] = field(default=lambda: None)

    @property
    def by(self) -> object:
        """Who goes on with it; None where anyone may."""
        by = self._by()
        return None if isinstance(by, greenlet) and by.dead else by

    def belongs(self, by: object) -> None:
        """It is `by`'s from now on."""
        self._by = ref(by) if isinstance(by, greenlet) else lambda: None


@final
@define(eq=False)
class Rows:
    """The rows of up to `most` texts, of up to `tokens` tokens together where that is given, the newest first."""

    most: int
    tokens: int | None
    kept: list[Row] = field(init=False, factory=list)

    def clear(self) -> None:
        """Forget all."""
        self.kept.clear()

    def put(self, row: Row) -> None:
        """Keep a row; what there is no room for is dropped, the free and the oldest first."""
        self.kept.insert(0, row)
        while len(self.kept) > 1 and self._is_full:
            self.kept.remove(next((old for old in self.kept[:0:-1] if old.by is None), self.kept[-1]))

    def take(self, tokens: Tokens, by: object, new: int = 1) -> Row | None:
        """What covers most of a text but not its last `new` tokens; None where nothing does.

        A decode goes on with its own row, or with a free one that only drafts would be forgotten of; of any other it
        goes on with a copy.
        """
        best, most = None, 0
        for row in self.kept:
            row.memo.settle(tokens)
            covered = _shared(row.memo, tokens)
            if covered > most or (best is not None and covered == most and row.by is by is not None):
                best, most = row, covered
        if best is None:
            return None
        if (best.by is None or best.by is by) and best.memo.goes_on(most):
            self.kept.remove(best)
        else:
            best = Row(deepcopy(best.memo))
        own = [row for row in self.kept if by is not None and row.by is by]
        for row in own:  # what it has parted with
            row.belongs(None)
        return best if best.memo.go_back(min(most, len(tokens) - new)) else None

    def covered(self, tokens: Tokens) -> int:
        """How many of the first of `tokens` some row covers."""
        return max([_shared(row.memo, tokens) for row in self.kept], default=0)

    @property
    def held(self) -> int:
        """How many tokens all of them cover, drafts among them."""
        return sum(row.memo.past.length for row in self.kept)

    @property
    def _is_full(self) -> bool:
        return len(self.kept) > self.most or (self.tokens is not None and self.held > self.tokens)


def _shared(memo: Memo, tokens: Tokens) -> int:
    """How many of the first of `tokens` a memo covers."""
    return len(memo.tokens) if begins(memo.tokens, tokens) else common_prefix(memo.tokens, tokens)
