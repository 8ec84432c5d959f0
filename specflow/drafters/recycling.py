"""Token recycling: what the target said would follow, wherever it was read, is kept and drafted from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from os import PathLike
from struct import Struct
from threading import Lock
from typing import Final, final

import numpy
import torch
from attrs import define, field, frozen
from safetensors.numpy import save

from specflow.distribution import PointMass
from specflow.drafters.followers import REACH, Followers, are_shares, followers_of, is_follower, is_followers
from specflow.drafters.likeliest import Candidate, likeliest_first
from specflow.errors import DecodeError
from specflow.files import checksum, content_of, no_file, write
from specflow.guards.checks import a, or_none, shown, valid, whole
from specflow.guards.ids import ids_of, text_of
from specflow.prefix import tokens_of
from specflow.state import Proposal, Tokens

PAIR: Final = Struct("<if")
FORMAT: Final = "specflow recycled 1"
ARRAYS: Final = {
    "lengths": torch.int32,
    "contexts": torch.int32,
    "widths": torch.int32,
    "tokens": torch.int32,
    "chances": torch.float32,
}
REMEDY: Final = "restore it from a copy, or let a new table learn"


@final
@define(eq=False)
class Recycled:
    """The k tokens that the target found most probable after each context of 1 to `n` tokens, where it last read it.

    `after` answers from the longest context that is known, and from `before` where none is: a table to begin with,
    such as the target's `Bigrams`. `learn` replaces what was known of a context. The stage `Recycle` teaches all that a
    step read, rejected drafts too.

    At `max_contexts` the context that was learned longest ago is forgotten. A context takes about 400 bytes. Threads
    may share a table: who learns waits for the others, who reads for nobody, and sees each context as it was before or
    after. 1 ≤ vocab_size ≤ 2³¹, and k, n and max_contexts are at least 1, else `DecodeError`.
    Source: Luo et al. 2408.08696 (token recycling), whose contexts have one token, and whose table keeps no chances.

    >>> table = Recycled(vocab_size=10)
    >>> table.learn([(5, 6)], [[(7, 0.5), (8, 0.25)]])
    >>> table.after((1, 5, 6)), table.after((9, 6)), table.after((9,))
    ([(7, 0.5), (8, 0.25)], [(7, 0.5), (8, 0.25)], ())
    """

    vocab_size: int = field(validator=valid(whole(1, "give the target's vocab_size", most=2**31)))
    k: int = field(default=8, validator=valid(whole(1, "keep one follower at least", most=2**31)))
    n: int = field(default=2, validator=valid(whole(1, "look at one token at least", most=2**31)))
    max_contexts: int = field(default=2**20, validator=valid(whole(1, "keep one context at least")))
    before: Followers | None = field(default=None, validator=valid(or_none(is_followers)))
    _known: OrderedDict[Tokens, bytes] = field(init=False, factory=OrderedDict, repr=False)
    _writing: Lock = field(init=False, factory=Lock, repr=False)

    def __len__(self) -> int:
        """How many contexts are known."""
        return len(self._known)

    def after(self, tokens: Tokens, /) -> Sequence[tuple[int, float]]:
        """What may follow a text, the likeliest first. `DecodeError` for what holds no ids."""
        tail = ids_of("tokens", tokens_of(tokens)[-self.n :])
        for length in range(len(tail), 0, -1):
            row = self._known.get(tail[-length:])
            if row is not None:
                return list(PAIR.iter_unpack(row))
        return () if self.before is None or not tail else self.before.after(tail)

    def learn(self, contexts: Sequence[Tokens], followers: Sequence[Sequence[tuple[int, float]]]) -> None:
        """`followers[i]`, pairs of token and chance, the likeliest first, are what follows `contexts[i]`.

        The first k are kept. Tokens outside the vocabulary are left out, and end a context. `DecodeError`, with nothing
        learned, for what are no contexts, tokens or chances, and where there are not as many of both.
        """
        given = _several("contexts", contexts), _several("followers", followers)
        if len(given[0]) != len(given[1]):
            received = f"{len(given[0])} and {len(given[1])}"
            raise DecodeError("followers", "contexts and followers differ in number", received, "give some for each")
        tails = [ids_of("contexts", context)[-self.n :] for context in given[0]]
        rows = [self._packed(row) for row in given[1]]
        with self._writing:
            for tail, row in zip(tails, rows, strict=True):
                if row:
                    self._put_all(tail, row)

    def save(self, path: str | PathLike[str]) -> None:
        """Write what is known to a safetensors file, whole or not at all, as `NGramStorage.save` does.

        `before` is not written.
        """
        with self._writing:
            known = list(self._known.items())
        pairs = [list(PAIR.iter_unpack(row)) for _, row in known]
        arrays = {
            "lengths": numpy.array([len(context) for context, _ in known], numpy.int32),
            "contexts": numpy.array([token for context, _ in known for token in context], numpy.int32),
            "widths": numpy.array([len(row) for row in pairs], numpy.int32),
            "tokens": numpy.array([token for row in pairs for token, _ in row], numpy.int32),
            "chances": numpy.array([chance for row in pairs for _, chance in row], numpy.float32),
        }
        tensors = {name: torch.from_numpy(each) for name, each in arrays.items()}
        metadata = {"format": FORMAT, "vocab_size": str(self.vocab_size)}
        write(path, save(arrays, metadata | {"sha256": checksum(metadata, tensors)}))

    def load(self, path: str | PathLike[str]) -> None:
        """Replace what is known by what `save` wrote; of more than `max_contexts`, n or k what this table keeps.

        `DecodeError`, with the table in hand as it was, for a file that is damaged, no such table, or of another
        vocabulary.
        """
        metadata, arrays = content_of(path, REMEDY)
        sha = metadata.pop("sha256", None)
        if metadata.get("format") != FORMAT:
            raise no_file(path, "holds no recycled rows", "give one that `save` wrote")
        if metadata.get("vocab_size") != str(self.vocab_size):
            happened = f"is of a vocabulary of {metadata.get('vocab_size')} tokens, and not {self.vocab_size}"
            raise no_file(path, happened, "load it into a table of its own target")
        if {name: each.dtype for name, each in arrays.items() if each.dim() == 1} != ARRAYS:
            raise no_file(path, "does not hold the arrays of a table", REMEDY)
        if sha != checksum(metadata, arrays):
            raise no_file(path, "is damaged, its checksum does not match", REMEDY)
        lengths, contexts, widths, tokens, chances = [arrays[name].tolist() for name in ARRAYS]
        sums = sum(lengths) == len(contexts) and sum(widths) == len(tokens) == len(chances)
        if not sums or len(lengths) != len(widths) or min((*lengths, *widths, 1)) < 1:
            raise no_file(path, "contradicts itself", REMEDY)
        read = Recycled(self.vocab_size, self.k, self.n, self.max_contexts)
        keys = [tuple(contexts[i:j]) for i, j in pairwise(accumulate(lengths, initial=0))]
        pairs = list(zip(tokens, chances, strict=True))
        rows = [read._packed(pairs[i:j]) for i, j in pairwise(accumulate(widths, initial=0))]
        for key, row in zip(keys, rows, strict=True):
            if len(key) <= self.n and row:
                read._put(key, row)
        with self._writing:
            self._known = read._known

    def _put_all(self, tail: Tokens, row: bytes) -> None:
        """What follows each ending of `tail` that is of the vocabulary."""
        for length in range(1, len(tail) + 1):
            if not 0 <= tail[-length] < self.vocab_size:
                break
            self._put(tail[-length:], row)

    def _put(self, context: Tokens, row: bytes) -> None:
        self._known[context] = row
        self._known.move_to_end(context)  # what is learned again waits anew to be forgotten
        if len(self._known) > self.max_contexts:
            self._known.popitem(last=False)

    def _packed(self, row: object) -> bytes:
        """The first k of a row's followers."""
        pairs = []
        for pair in _several("followers", row):
            if not is_follower(pair):
                remedy = "give pairs of a token and its chance"
                raise DecodeError("followers", "a follower is no token with a chance", shown(pair), remedy)
            token, chance = pair
            if token < self.vocab_size:
                pairs.append(PAIR.pack(token, chance))
        return b"".join(pairs[: self.k])


def _several(name: str, value: object) -> Sequence[object]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise DecodeError(name, f"{name} are not several", shown(value), "give a list")
    return value


SHARES: Final = (0.5, 0.16, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)
"""How often a token's first, second, … follower in a table is the one that comes."""


@final
@frozen
class RecyclingTree:
    """Walks a static tree over a table: which followers are drafted depends on their ranks alone.

    `shares` is the shape of the tree: `shares[r]` is the guessed chance that the follower of rank r is taken, so their
    number is the most followers that a draft has. A draft's chance is the product down its path, and the likeliest is
    drafted first: each number of first drafts is the tree of so many with the most expected tokens, as far as the
    guesses are right. Where fewer followers are known a branch is left out. `LookupTree(table)` goes by the chances
    that the table tells instead, and looks into the text.

    A function of the text and of what the table knows while it is drafted. `DecodeError` for shares that are not in
    (0, 1], that grow, or that are more than 1 together.
    Source: Luo et al. 2408.08696, whose tree was fixed by hand.

    >>> table = Recycled(vocab_size=10)
    >>> table.learn([(5,), (7,)], [[(7, 0.5), (8, 0.25)], [(5, 0.9)]])
    >>> drafter = RecyclingTree(table, shares=(0.5, 0.2))
    >>> [(draft.token, draft.parent, draft.chance) for draft, _ in zip(drafter((5,)), range(3))]
    [(7, -1, 0.5), (5, 0, 0.25), (8, -1, 0.2)]
    """

    table: Followers = field(validator=valid(is_followers))
    shares: tuple[float, ...] = field(default=SHARES, validator=valid(are_shares))
    source: str = field(default="recycled", validator=valid(a(str, "name the drafter")))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        def followers(text: Tokens) -> Iterator[Candidate]:
            for (token, _), share in zip(followers_of(self.table, text), self.shares, strict=False):
                yield Candidate(token, share, self.source)

        yield from likeliest_first(text_of(tokens)[-REACH:], followers, lambda text, token: (*text, token)[-REACH:])
