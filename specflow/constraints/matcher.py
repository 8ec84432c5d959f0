"""What knows a grammar: a matcher at a place in a text, a value; and how one is made of an engine that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol, final

from attrs import define, field
from torch import Tensor

from specflow.guards.checks import calls, does, valid
from specflow.state import Tokens


class Matcher(Protocol):
    """A place in a text that obeys a grammar so far: what may come next. It never changes.

    What it answers must depend on the tokens before that place alone. Stop tokens are none of its concern: it says
    whether the text may end, and whoever asks knows by which tokens.
    """

    def mask(self) -> Tensor:
        """Which tokens may come next, as bools [V] on the host; there may be more or fewer than the model knows."""
        ...

    def after(self, token: int, /) -> Matcher | None:
        """The place after one more token; None where the grammar forbids it."""
        ...

    def forced(self) -> Tokens:
        """Tokens that come next whatever is chosen, as far as that is known; none where there is a choice.

        They are drafts and nothing depends on them: wrong ones make it slow.
        """
        ...

    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        ...


class Engine(Protocol):
    """A matcher that changes: it goes on by tokens and back again, as those of libraries do. See `Matcher`."""

    def mask(self) -> Tensor:
        """Which tokens may come next, as bools [V] on the host, in a tensor of its own."""
        ...

    def take(self, token: int, /) -> bool:
        """Go on by a token and say True; False, and nothing changes, where the grammar forbids it."""
        ...

    def back(self, count: int, /) -> None:
        """Go back by so many tokens."""
        ...

    def forced(self) -> Tokens:
        """Tokens that come next whatever is chosen, or none."""
        ...

    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        ...


def following(make: Callable[[], Engine]) -> Matcher:
    """The matcher at the beginning of a text, of an engine that `make` makes.

    One engine serves all places of the text and its branches: it goes to the place that is asked about, back by what
    the two do not share and on by the rest. One that fails is made anew. Threads may share it.

    >>> from specflow.constraints.grammar import Grammar
    >>> grammar = Grammar.regex("(ab)*", (b"a", b"b", b"ab", b""), stop=(3,))  # made of an engine
    >>> first = grammar.start()
    >>> second = first.after(0)
    >>> second.mask().tolist(), first.mask().tolist(), second.forced()
    ([False, True, False, False], [True, False, True, False], (1,))
    """
    return _Place(_Followed(make), None, -1, 0)


_is_engine = does("an engine", "make an Engine", "mask", "take", "back", "forced", "may_end")


@final
@define(eq=False)
class _Place:
    """A matcher: the place after `token`, which stands after the place `before`."""

    followed: _Followed
    before: _Place | None
    token: int
    depth: int

    def mask(self) -> Tensor:
        with self.followed.at(self) as engine:
            return engine.mask()

    def after(self, token: int, /) -> _Place | None:
        with self.followed.at(self) as engine:
            if not engine.take(token):
                return None
            place = _Place(self.followed, self, token, self.depth + 1)
            self.followed.stack.append(place)
            return place

    def forced(self) -> Tokens:
        with self.followed.at(self) as engine:
            return engine.forced()

    def may_end(self) -> bool:
        with self.followed.at(self) as engine:
            return engine.may_end()


@final
@define(eq=False)
class _Followed:
    """An engine, and the places that it has gone through since the beginning; the last is where it is."""

    make: Callable[[], Engine] = field(validator=valid(calls("what makes an engine", "give a function of nothing")))
    engine: Engine | None = None
    stack: list[_Place] = field(factory=list)
    lock: Lock = field(factory=Lock, repr=False)

    @contextmanager
    def at(self, place: _Place) -> Iterator[Engine]:
        """The engine, gone to this place. After an error, or an interruption, nobody knows where it is."""
        with self.lock:
            try:
                yield self._gone_to(place)
            except BaseException:
                self.engine = None
                self.stack.clear()
                raise

    def _gone_to(self, place: _Place) -> Engine:
        if self.engine is None:
            made = self.make()
            _is_engine("make", made)
            self.engine = made
        engine = self.engine
        ahead: list[_Place] = []
        while place.before is not None and not (
            place.depth <= len(self.stack) and self.stack[place.depth - 1] is place
        ):
            ahead.append(place)
            place = place.before
        if len(self.stack) > place.depth:
            engine.back(len(self.stack) - place.depth)
            del self.stack[place.depth :]
        for next_place in reversed(ahead):
            engine.take(next_place.token)
            self.stack.append(next_place)
        return engine
