"""What knows which tokens may follow a text: one protocol for tables that are made once, that learn, and corpora."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Final, Protocol, TypeGuard

from specflow.errors import DecodeError
from specflow.guards.checks import does, each, is_id, named, number, shown
from specflow.state import Tokens

REACH: Final = 16
"""How many of the last tokens those are asked about who know followers."""


class Followers(Protocol):
    """What knows which tokens may follow a text: a model's `Bigrams`, what was `Recycled`, a `Corpus`."""

    def after(self, tokens: Tokens, /) -> Sequence[tuple[int, float]]:
        """Tokens that may follow, each with its chance, the likeliest first; none where nothing is known.

        The chances are guesses, and are 1 together at most.
        """
        ...


is_followers: Final = does("what knows followers", "give Bigrams, or Recycled(vocab_size)", "after")


def followers_of(provider: Followers, tokens: Tokens) -> Sequence[tuple[int, float]]:
    """What `provider` says may follow. `DecodeError` for what are not tokens with their chances."""
    said: object = provider.after(tokens)
    if not isinstance(said, Sequence) or not all(map(is_follower, said)):
        happened = f"{named(type(provider))} does not say what follows"
        raise DecodeError("followers", happened, shown(said), "return pairs of a token and its chance")
    return said


def is_follower(pair: object) -> TypeGuard[tuple[int, float]]:
    """Whether this is a token with a chance.

    >>> is_follower((3, 0.5)), is_follower((3, 2.0)), is_follower(3)
    (True, False, False)
    """
    return isinstance(pair, tuple) and len(pair) == 2 and is_id(pair[0]) and is_chance(pair[1])


def is_chance(value: object) -> bool:
    """Whether a value is a probability, as far as rounding goes.

    >>> is_chance(0.5), is_chance(2), is_chance(float("nan")), is_chance(True)
    (True, False, False, False)
    """
    if isinstance(value, float):  # as most are; a number of any kind takes longer to tell
        return 0 <= value <= 1.001
    return type(value) is not bool and isinstance(value, Real) and 0 <= float(value) <= 1.001


def trust(length: int) -> float:
    """The guessed chance that a text whose last `length` tokens occurred before goes on as it did there.

    c = (length - 0.6) / (length + 1.2), fitted to what SmolLM2-135M accepts.

    >>> round(trust(1), 3), round(trust(8), 3)
    (0.182, 0.804)
    """
    return (length - 0.6) / (length + 1.2)


def are_shares(name: str, shares: object) -> None:
    """Guessed chances of the first, second, … follower: the largest first, and 1 together at most."""
    each(number("a share is not between 0 and 1", "give guessed chances", lambda share: 0 < share <= 1))(name, shares)
    given = tuple(shares) if isinstance(shares, tuple | list) else ()
    if not given or list(given) != sorted(given, reverse=True) or sum(given) > 1.001:
        happened = "shares are none, grow, or are more than 1 together"
        raise DecodeError(name, happened, shown(shares), "give chances, the largest first")
