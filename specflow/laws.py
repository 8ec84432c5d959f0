"""The target's laws after several drafts: made at once, or as a rule asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, final

from attrs import define, field

from specflow.distribution import Distribution
from specflow.guards.checks import MOST, calls, valid, whole


class Laws(Protocol):
    """The laws after each row of logits, in order. A tuple is one: all of its laws are made already."""

    def __len__(self) -> int:
        """How many rows there were."""
        ...

    def __getitem__(self, row: int, /) -> Distribution:
        """The law after this row."""
        ...


@final
@define(eq=False)
class Lazily:
    """Laws that are made when they are asked for, each after all those before it, and each once.

    It is what a processor returns that cannot be asked about just any text: whoever judges drafts asks for the law
    after a draft only once the draft stands, so that the processor hears of no text that its own laws make impossible.

    >>> from specflow.distribution import PointMass
    >>> laws = Lazily(3, lambda row: PointMass(7 + row))
    >>> laws[1], laws.made
    (PointMass(token=8), [PointMass(token=7), PointMass(token=8)])
    """

    rows: int = field(validator=valid(whole(0, "give the number of rows", MOST)))
    make: Callable[[int], Distribution] = field(validator=valid(calls("a maker of laws", "give a function of a row")))
    made: list[Distribution] = field(factory=list, init=False)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int, /) -> Distribution:
        row = row if row >= 0 else row + self.rows
        if not 0 <= row < self.rows:
            raise IndexError(row)
        while len(self.made) <= row:
            self.made.append(self.make(len(self.made)))
        return self.made[row]
