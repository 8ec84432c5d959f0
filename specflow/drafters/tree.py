"""Trees from lookups: what followed when the text was like this before, and what the target says after a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, final

from attrs import field, frozen

from specflow.distribution import PointMass
from specflow.drafters.followers import REACH, Followers, followers_of, is_followers, trust
from specflow.drafters.likeliest import Candidate, best_first
from specflow.drafters.suffix import Reading, SuffixDrafter
from specflow.guards.checks import drafts, or_none, valid
from specflow.prefix import tokens_of
from specflow.state import Proposal, Tokens

PLACES: Final = 64  # how many earlier occurrences of a token are looked at, the latest
LONGEST: Final = 16  # how far back a match is followed; a longer one is not told from it


class Place(NamedTuple):
    """Where the text had the same `length` last tokens before: it went on with `tokens[end]`."""

    end: int
    length: int


class _Branch(NamedTuple):
    """Some drafts after the text, and where the text had its end and them before."""

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

        def followers(branch: _Branch) -> Iterable[Candidate]:
            return self._followers(tokens, *branch)

        def after(branch: _Branch, token: int) -> _Branch:
            path, places = branch
            longer = [Place(end + 1, length + 1) for end, length in places if _at(tokens, path, end) == token]
            return _Branch((*path, token), longer or [Place(end, 1) for end in text.latest(token, PLACES)])

        copy = text.copy
        matches = [place for place in _matches(tokens, text) if place.end != copy.end]
        start = [Place(copy.end, copy.worth), *matches] if copy.worth else matches
        yield from best_first(_Branch((), start), followers, after)

    def _followers(self, tokens: Tokens, path: Tokens, places: list[Place]) -> Iterable[Candidate]:
        """What may come after the path."""
        found: dict[int, Candidate] = {}
        rest = 1.0
        for end, length in places:
            token = _at(tokens, path, end)
            if token in found:
                continue
            found[token] = Candidate(token, rest / 2 ** (len(found) + 2) if found else trust(length), "suffix")
            if len(found) == 1:
                rest = 1 - found[token].chance
            if len(found) == self.branches:
                break
        if self.followers is not None:
            free = rest / 2 if found else 1.0
            for token, chance in followers_of(self.followers, (*tokens[-REACH:], *path)[-REACH:]):
                _, share, source = found.get(token, Candidate(token, 0.0, "follower"))
                found[token] = Candidate(token, share + free * chance, source)
        return found.values()


def _at(tokens: Tokens, path: Tokens, position: int) -> int:
    """The token at a position of the text followed by the path, so that a loop is continued."""
    return tokens[position] if position < len(tokens) else path[position - len(tokens)]


def _matches(tokens: Tokens, text: Reading) -> list[Place]:
    """Where the end of the text was before, the longest match first, and of equals the latest."""
    places, longest = [], tokens[-LONGEST:]
    for end in text.latest(tokens[-1], PLACES + 1)[1:]:  # the latest is the text's end itself
        length, most = 1, min(end, LONGEST)
        if tokens[end - most : end] == longest:  # as where a text repeats itself
            length = most
        while length < most and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        places.append(Place(end, length))
    return sorted(places, key=lambda place: -place.length)
