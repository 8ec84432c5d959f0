"""What was read of the last few texts: taken out for a pass, put back whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Final, Generic, NamedTuple, Protocol, final

from attrs import define, evolve, field
from torch import Tensor
from typing_extensions import TypeVar

from specflow.caches import Past, lasting
from specflow.guards.ids import ids_of
from specflow.prefix import NEAR, begins, common_prefix, parting
from specflow.state import Proposal, Tokens, parents_of
from specflow.trees import path_along

DRAFTS: Final = 16
"""How many tokens a model that drafts may have read of its own drafts: it is fed them one by one, as text is."""


class GoesBack(Protocol):
    """What a model holds of a text that it read, as a `Past` does; a deep copy of it is another text's."""

    length: int

    @property
    def needs_marks(self) -> bool:
        """Whether some of it can only go back to a mark."""
        ...

    def keep(self, start: int, rows: Sequence[int]) -> None:
        """Cover the first `start` tokens and, of those after them, only the `rows`, counted from there, in order."""
        ...

    def go_back(self, keep: int) -> bool:
        """Cover at most `keep` tokens, as many as can be; whether there was any way to do it."""
        ...


P = TypeVar("P", bound=GoesBack, default=Past)


def nobody() -> None:
    """Whose a memo is that anyone may go on with."""


@final
class Tree(NamedTuple):
    """Drafts that are read: their ids, and what each follows.

    A memo keeps nothing else of them: laws and logits are the caller's, and large, and may hang on a graph.
    """

    drafted: Tokens = ()
    parents: tuple[int, ...] = ()

    @classmethod
    def of(cls, drafts: Sequence[Proposal]) -> Tree:
        """Those of drafts. `DecodeError` for what are none, and for one that does not come after its parent."""
        parents = parents_of(drafts)
        return cls(ids_of("drafts", [draft.token for draft in drafts]), parents)


NO_TREE: Final = Tree()


@final
@define(eq=False)
class Memo(Generic[P]):
    """What was read of one text: a cache, and what it covers.

    The last `ahead` of its tokens were drafts when they were read, and so was the `tree` after them. `owner()` is who
    goes on with it; None where anyone may.
    """

    past: P
    region: object
    tokens: list[int] = field(factory=list)
    ahead: int = 0
    tree: Tree = NO_TREE
    owner: Callable[[], object] = nobody

    def covers(self, tokens: Tokens) -> int:
        """How many of the first of `tokens` it covers, those that the path which they take through its tree adds."""
        if not begins(self.tokens, tokens):
            return common_prefix(self.tokens, tokens)
        return len(self.tokens) + len(self._path(tokens))

    def features(self: Memo[Past], tokens: Tokens, last: int) -> Tensor | None:
        """The features [last, F] of the last `last` tokens of a text, if it covers all of it; a copy."""
        if self.covers(tokens) < len(tokens):
            return None
        beyond = [len(self.tokens) + i for i in self._path(tokens)] if len(tokens) > len(self.tokens) else []
        straight = range(len(tokens) - last, len(tokens) - len(beyond))
        return self.past.features[[*straight, *beyond][-last:]]

    def settle(self, tokens: Tokens) -> None:
        """Of the tree that was read last, keep the path that `tokens` took; nothing where they begin otherwise."""
        if self.tree.drafted:
            path = self._path(tokens) if begins(self.tokens, tokens) else []
            self.past.keep(len(self.tokens), path)
            self.tokens += [self.tree.drafted[i] for i in path]
            self.tree = NO_TREE

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

    def _path(self, tokens: Tokens) -> list[int]:
        drafted, parents = self.tree.drafted, self.tree.parents
        return path_along(drafted, parents, tokens[len(self.tokens) :]) if drafted else []


@final
@define(eq=False)
class Memos(Generic[P]):
    """The memos of up to `most` texts, the newest first; of up to `tokens` tokens together, where that is given.

    A memo belongs to a `region` of texts (`predictors.trial`), and serves no others. `goes_back` tells whether a memo
    was ever taken back that can only go back to a mark: from then on marks are made.
    """

    most: int
    tokens: int | None = None
    goes_back: bool = False
    _kept: list[Memo[P]] = field(init=False, factory=list)

    def __iter__(self) -> Iterator[Memo[P]]:
        """Those that are kept."""
        return iter(self._kept)

    @property
    def held(self) -> int:
        """How many tokens all of them cover, drafts among them."""
        return sum(memo.past.length for memo in self._kept)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    @contextmanager
    def of(self: Memos[Past], tokens: Tokens, region: object, new: int = 1) -> Iterator[Memo[Past]]:
        """What covers most of a text, but not its last `new` tokens; a memo of nothing where there is none.

        It is put back when the block ends, and lost when the block raises: an exception or Ctrl-C inside the model must
        not leave a cache that covers who knows what.
        """
        memo = self.take(tokens, region, new) or Memo(Past(None, 0), region)
        yield memo
        if memo.tokens:
            self.put(memo)

    def covered(self, tokens: Tokens, region: object) -> int:
        """How many of the first of `tokens` some memo covers."""
        return max([memo.covers(tokens) for memo in self._kept if memo.region == region], default=0)

    def features(self: Memos[Past], tokens: Tokens, last: int, region: object) -> Tensor | None:
        """The features [last, F] of the last `last` tokens of a text; None where no memo covers all of it."""
        found = (memo.features(tokens, last) for memo in self._kept if memo.region == region)
        return next((features for features in found if features is not None), None)

    def take(
        self, tokens: Tokens, region: object, new: int = 1, owner: Callable[[], object] = nobody
    ) -> Memo[P] | None:
        """The memo that covers most of a text, but not its last `new` tokens, out of those that are kept.

        None where nothing is covered. A memo of somebody else goes on as it is, and so does one of which more than the
        drafts of a step would be forgotten: what is taken is a copy.
        """
        best: Memo[P] | None = None
        most, mine = 0, owner()
        for memo in self._kept:
            if memo.region == region:
                covered, is_mine = memo.covers(tokens), memo.owner() is mine
                if covered > most or (best is not None and covered == most and is_mine and best.owner() is not mine):
                    best, most = memo, covered
                if is_mine and covered >= len(memo.tokens) and covered + NEAR >= len(tokens):
                    break  # no other covers more that is worth the search
        if best is None:
            return None
        is_dropped_next = len(self._kept) == self.most and best is self._kept[-1]
        if best.owner() in (None, mine) and (best.goes_on(most) or is_dropped_next):
            self._kept.remove(best)
        else:
            with lasting():
                best = evolve(best, past=deepcopy(best.past), tokens=[*best.tokens])  # the region is the same
        if mine is not None:
            for memo in self._kept:  # what its owner has parted with
                if memo.owner() is mine:
                    memo.owner = nobody
        best.owner = owner
        best.settle(tokens)
        keep = min(most, len(tokens) - new)
        self.goes_back = self.goes_back or (keep < len(best.tokens) and best.past.needs_marks)
        return best if best.go_back(keep) else None

    def put(self, memo: Memo[P]) -> None:
        """Keep a memo. What there is no room for is dropped: the oldest that nobody owns, or else the oldest."""
        self._kept.insert(0, memo)
        while len(self._kept) > 1 and self._is_full:
            self._drop(self._kept[1:])

    def make_room(self, new: int) -> None:
        """Drop what there is no room for beside `new` memos that will be put."""
        while self._kept and len(self._kept) + new > self.most:
            self._drop(self._kept)

    def prune(self: Memos[Past], tokens: Tokens) -> None:
        """Forget what is seen not to be a prefix of `tokens` in the newest memo, if that is of this text."""
        if not self._kept:
            return
        memo = self._kept[0]
        keep = parting(memo.tokens, tokens)
        if not memo.goes_on(keep):  # another text's
            return
        if memo.tree.drafted:
            memo.settle(tokens)
            keep = parting(memo.tokens, tokens)
        if memo.past.needs_marks:
            memo.past.thin(keep)
        elif not memo.go_back(keep):
            self._kept.remove(memo)

    def _drop(self, some: Sequence[Memo[P]]) -> None:
        """Forget the oldest of them that nobody owns, or else the oldest."""
        self._kept.remove(next((memo for memo in reversed(some) if memo.owner() is None), some[-1]))

    @property
    def _is_full(self) -> bool:
        return len(self._kept) > self.most or (self.tokens is not None and self.held > self.tokens)
