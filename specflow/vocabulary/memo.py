"""What was read of the last few texts, so that one that grew is not read again."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, Protocol, TypeVar, final

from attrs import define, field

from specflow.guards.ids import Tokens, ids_of
from specflow.prefix import NEAR, TEXTS, common_prefix

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)


class Reading(Protocol[A_co]):
    """What was read of one text, token by token: whatever it answers is a function of the text."""

    tokens: list[int]

    def go_back(self, length: int, /) -> None:
        """Be what was read of the first `length` tokens."""
        ...

    def go_on(self, new: Tokens, /) -> A_co:
        """Read more tokens, and answer for the whole text."""
        ...


@final
@define(eq=False)
class Readings(Generic[A]):
    """Readings of the last few texts. A text goes on with one that it parted from not long ago; another is read anew.

    Threads may share it: a reading belongs to the thread that asks, and one that was interrupted is lost.
    """

    make: Callable[[], Reading[A]]
    _kept: list[Reading[A]] = field(init=False, factory=list)
    _lock: Lock = field(init=False, factory=Lock)

    def of(self, tokens: Tokens) -> A:
        """What a reading of these tokens answers."""
        with self._lock:
            known, reading = max(
                [(common_prefix(kept.tokens, tokens), i) for i, kept in enumerate(self._kept)],
                default=(0, -1),
            )
            taken = None
            if reading >= 0 and known and known + NEAR >= len(self._kept[reading].tokens):
                taken = self._kept.pop(reading)
        if taken is None:
            taken = self.make()
        taken.go_back(min(known, len(taken.tokens)))
        answer = taken.go_on(ids_of("tokens", tokens[len(taken.tokens) :]))
        with self._lock:
            self._kept[:] = [taken, *self._kept[: TEXTS - 1]]
        return answer
