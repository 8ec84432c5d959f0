"""What was read of the last few texts: taken out for a pass, put back whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Final, final

from attrs import define, field

from specflow.caches import Past
from specflow.prefix import NEAR, begins, common_prefix, parting
from specflow.state import Proposal, Tokens, parents_of
from specflow.trees import path_along

DRAFTS: Final = 16
"""How many tokens a model that drafts may have read of its own drafts: it is fed them one by one, as text is."""


@final
@define(eq=False)
class Memo:
    """What was read of one text: a cache, and what it covers.

    The last `ahead` of its tokens were drafts when they were read, and so was the `tree` after them.
    """

    past: Past
    region: int
    tokens: list[int] = field(factory=list)
    ahead: int = 0
    tree: tuple[Proposal, ...] = ()

    def settle(self, tokens: Tokens) -> None:
        """Of the tree that was read last, keep the path that `tokens` took. Whether they begin alike is seen later."""
        if self.tree:
            path = path_along(self.tree, parents_of(self.tree), tokens[len(self.tokens) :])
            self.past.keep(len(self.tokens), path)
            self.tokens += [self.tree[i].token for i in path]
            self.tree = ()

    def goes_on(self, covered: int) -> bool:
        """Whether a text that shares the first `covered` tokens goes on with this one: only drafts are forgotten."""
        return len(self.tokens) - covered <= max(DRAFTS, self.ahead)

    def go_back(self, keep: int) -> bool:
        """Cover at most `keep` tokens; whether there was a way to do it."""
        if keep >= len(self.tokens):
            return True
        went = self.past.go_back(keep)
        del self.tokens[self.past.length :]
        return went


@final
@define(eq=False)
class Memos:
    """The memos of up to `most` texts, the newest first. A memo belongs to a `region` of lengths (`predictors.trial`).

    `goes_back` tells whether a memo was ever taken back that can only go back to a mark: from then on marks are made.
    """

    most: int
    goes_back: bool = False
    _kept: list[Memo] = field(init=False, factory=list)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    @contextmanager
    def of(self, tokens: Tokens, region: int, new: int = 1) -> Iterator[Memo]:
        """What covers most of a text, but not its last `new` tokens; a memo of nothing where there is none.

        It is put back when the block ends, and lost when the block raises: an exception or Ctrl-C inside the model must
        not leave a cache that covers who knows what.
        """
        memo = self._taken(tokens, region, new) or Memo(Past(None, 0), region)
        yield memo
        if memo.tokens:
            self._kept.insert(0, memo)
            del self._kept[self.most :]

    def prune(self, tokens: Tokens) -> None:
        """Forget what is seen not to be a prefix of `tokens` in the newest memo, if that is of this text."""
        if not self._kept:
            return
        memo = self._kept[0]
        memo.settle(tokens)
        keep = parting(memo.tokens, tokens)
        if not memo.goes_on(keep):  # another text's
            return
        if memo.past.needs_marks:
            memo.past.thin(keep)
        elif not memo.go_back(keep):
            self._kept.remove(memo)

    def _taken(self, tokens: Tokens, region: int, new: int) -> Memo | None:
        """The best memo, out of those that are kept.

        Where more than the drafts of a step would be forgotten of it, it is another text's, which goes on with a copy.
        """
        best, most = None, 0
        for memo in self._kept:
            if memo.region == region:
                memo.settle(tokens)
                known = memo.tokens
                covered = len(known) if begins(known, tokens) else common_prefix(known, tokens)
                if covered > most:
                    best, most = memo, covered
                if covered + NEAR >= len(tokens) and memo.goes_on(covered):
                    break
        if best is None:
            return None
        if best.goes_on(most) or (len(self._kept) == self.most and best is self._kept[-1]):  # else it is dropped next
            self._kept.remove(best)
        else:
            best = deepcopy(best)
        keep = min(most, len(tokens) - new)
        self.goes_back = self.goes_back or (keep < len(best.tokens) and best.past.needs_marks)
        return best if best.go_back(keep) else None
