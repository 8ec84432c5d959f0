"""Trees from lookups: what followed when the text was like this before, and what the target says after a token."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Final, NamedTuple, final

from attrs import field, frozen

from specflow.distribution import PointMass
from specflow.drafters.followers import REACH, Followers, followers_of, is_followers, trust
from specflow.drafters.suffix import Reading, SuffixDrafter
from specflow.guards.checks import drafts, or_none, valid
from specflow.prefix import tokens_of
from specflow.state import TEXT, Proposal, Tokens

PLACES: Final = 64  # how many earlier occurrences of a token are looked at, the latest
LONGEST: Final = 16  # how far back a match is followed; a longer one is not told from it


class Place(NamedTuple):
    """Where the text had the same `length` last tokens before: it went on with `tokens[end]`."""

    end: int
    length: int


class _Candidate(NamedTuple):
    """A token that waits to be drafted, the likeliest first and the older of equals."""

    unlikely: float
    order: int
    token: int
    parent: int
    source: str
    path: Tokens
    places: list[Place]


@final
@frozen
class LookupTree:
    """Drafts what followed earlier occurrences of the text's end, and what `followers` say, the likeliest first.

    A draft's followers are the up to `branches` different tokens that came after the longest matches of the text and
    the path so far, and those that `followers` know: the target's own `Bigrams`, or a table that learns, `Recycled`.
    The copy that `SuffixDrafter` would follow is the first of the text's own matches, so that edited texts are copied
    across their edits.

    With a longest match of m tokens the first follower is guessed to be taken with c = `trust(m)`, the i-th other one
    with (1 - c) / 2^(i+2), and one of chance p that `followers` name with p (1 - c) / 2, or p where there is no match;
    a token that is both has the sum. A draft's chance is the product down its path, so that each number of first drafts
    has the most expected tokens, as far as the guesses are right. They were fitted to what SmolLM2-135M accepts.

    A function of the text, and of what `followers` know meanwhile, over a memo of the last few texts as `SuffixDrafter`
    has it, and as safe to share. `branches` ≥ 1, else `DecodeError`.
    Source: Hu et al. 2411.10666 (SAM decoding) and Luo et al. 2408.08696 (token recycling); the scores are ours.

    >>> stream = LookupTree()((5, 6, 7, 5, 8, 5))
    >>> [(draft.token, draft.parent, round(draft.chance, 3)) for draft, _ in zip(stream, range(3))]
    [(8, -1, 0.182), (6, -1, 0.102), (5, 0, 0.08)]
    """

    followers: Followers | None = field(default=None, validator=valid(or_none(is_followers)))
    branches: int = field(default=4, validator=valid(drafts))
    _suffix: SuffixDrafter = field(init=False, factory=SuffixDrafter, eq=False, repr=False)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        tokens = tokens_of(tokens)
        if not tokens:
            return
        text = self._suffix.read(tokens)
        order = count()
        waiting: list[_Candidate] = []

        def wait(parent: int, path: Tokens, places: list[Place], chance: float) -> None:
            for token, (share, source) in self._followers(tokens, path, places).items():
                heappush(waiting, _Candidate(-chance * share, next(order), token, parent, source, path, places))

        copy = text.copy
        matches = [place for place in _matches(tokens, text) if place.end != copy.end]
        wait(TEXT, (), [Place(copy.end, copy.worth), *matches] if copy.worth else matches, 1.0)
        for i in count():
            if not waiting:
                return
            unlikely, _, token, parent, source, path, places = heappop(waiting)
            yield Proposal(token, PointMass(token), parent, source, -unlikely)
            longer = [Place(end + 1, length + 1) for end, length in places if _at(tokens, path, end) == token]
            wait(i, (*path, token), longer or [Place(end, 1) for end in text.latest(token, PLACES)], -unlikely)

    def _followers(self, tokens: Tokens, path: Tokens, places: list[Place]) -> dict[int, tuple[float, str]]:
        """token → the guessed probability that it is taken after the path, and where it is from."""
        shares: dict[int, tuple[float, str]] = {}
        rest = 1.0
        for end, length in places:
            token = _at(tokens, path, end)
            if token in shares:
                continue
            share = rest / 2 ** (len(shares) + 2) if shares else trust(length)
            shares[token] = share, "suffix"
            if len(shares) == 1:
                rest = 1 - share
            if len(shares) == self.branches:
                break
        if self.followers is not None:
            free = rest / 2 if shares else 1.0
            for token, chance in followers_of(self.followers, (*tokens[-REACH:], *path)[-REACH:]):
                share, source = shares.get(token, (0.0, "follower"))
                shares[token] = share + free * chance, source
        return shares


def _at(tokens: Tokens, path: Tokens, position: int) -> int:
    """The token at a position of the text followed by the path, so that a loop is continued."""
    return tokens[position] if position < len(tokens) else path[position - len(tokens)]


def _matches(tokens: Tokens, text: Reading) -> list[Place]:
    """Where the end of the text was before, the longest match first, and of equals the latest."""
    places = []
    for end in text.latest(tokens[-1], PLACES + 1)[1:]:  # the latest is the text's end itself
        length, longest = 1, min(end, LONGEST)
        while length < longest and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        places.append(Place(end, length))
    return sorted(places, key=lambda place: -place.length)
