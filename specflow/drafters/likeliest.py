"""Best-first trees: whoever says what may follow a place, and how likely, has a tree of drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple, TypeGuard, TypeVar

from specflow.distribution import PointMass
from specflow.drafters.followers import is_chance
from specflow.errors import DecodeError
from specflow.guards.checks import calls, is_id, named, shown
from specflow.state import TEXT, Proposal

P = TypeVar("P")


class Candidate(NamedTuple):
    """A token that may be drafted, the guessed chance that it comes where it is offered, and who offers it."""

    token: int
    chance: float
    source: str = "draft"


def likeliest_first(
    start: P, followers: Callable[[P], Iterable[Candidate]], after: Callable[[P, int], P]
) -> Iterator[Proposal[PointMass]]:
    """A tree of certain drafts, each the likeliest of all that may be drafted after those before it.

    chance(draft) = Π of the candidates' chances down its path

    So the first n drafts are the n with the most expected tokens, for every n, as far as the guesses are right; of
    equals the one that was offered first comes first. A place is any value that says where one is: `start` after the
    text, `followers(place)` what may come there, and `after(place, token)` the place behind that. They are asked about
    a draft once it was taken, and so about nothing that nobody wants. Each token is offered once at a place.

    `DecodeError` for what are no functions, and for what they answer that are no candidates.
    Source: Li et al. 2406.16858 (EAGLE-2), section 4.2, where it chooses among what was expanded.

    >>> def successors(number):
    ...     return Candidate(number + 1, 0.5), Candidate(number + 2, 0.3)
    >>> drafts = likeliest_first(7, successors, lambda number, token: token)
    >>> [(draft.token, draft.parent, draft.chance) for draft, _ in zip(drafts, range(4))]
    [(8, -1, 0.5), (9, -1, 0.3), (9, 0, 0.25), (10, 0, 0.15)]
    """
    calls("what follows", "give a function of a place")("followers", followers)
    calls("what comes after", "give a function of a place and a token")("after", after)
    return best_first(start, lambda place: _offered(followers, place), after)


def best_first(
    start: P, followers: Callable[[P], Iterable[Candidate]], after: Callable[[P, int], P]
) -> Iterator[Proposal[PointMass]]:
    """The same, for those who answer nothing but candidates: what they say is not looked at."""
    order, waiting = count(), list[tuple[float, int, int, P, Candidate]]()

    def wait(parent: int, place: P, chance: float) -> None:
        for candidate in followers(place):
            heappush(waiting, (-chance * candidate.chance, next(order), parent, place, candidate))

    wait(TEXT, start, 1.0)
    for number in count():
        if not waiting:
            return
        unlikely, _, parent, place, (token, _, source) = heappop(waiting)
        yield Proposal(token, PointMass(token), parent, source, -unlikely)
        wait(number, after(place, token), -unlikely)


def _offered(followers: Callable[[P], Iterable[Candidate]], place: P) -> Iterator[Candidate]:
    offered: object = followers(place)
    if not isinstance(offered, Iterable):
        happened, remedy = f"{named(followers)} does not say what follows", "return candidates"
        raise DecodeError("followers", happened, shown(offered), remedy)
    for candidate in offered:
        if not _is_candidate(candidate):
            happened = f"{named(followers)} offers what is no token with a chance"
            raise DecodeError("followers", happened, shown(candidate), 'give Candidate(token, chance, "me")')
        yield candidate


def _is_candidate(value: object) -> TypeGuard[Candidate]:
    if not isinstance(value, Candidate):
        return False
    token, chance, source = value
    return is_id(token) and is_chance(chance) and type(source) is str
