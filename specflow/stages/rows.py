"""Rows: how much of the target's logits a stage learns from, so that a replay knows whether that was recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, final, runtime_checkable

from attrs import field, frozen

from specflow.guards.checks import a, calls, flag, valid, whole
from specflow.state import Committed


@final
@frozen
class Rows:
    """What a stage reads of the target's logits: the `most` largest of each row, 0 where it reads none.

    `along` says that it reads only rows along the text that stands, none after a rejected draft. `DecodeError` for
    values of other kinds.
    """

    most: int = field(validator=valid(whole(0, "give how many tokens of a row are read")))
    along: bool = field(default=False, validator=valid(flag))


@runtime_checkable
class ReadsRows(Protocol):
    """A stage that says what it reads of the target's logits, as `UpdateNgram` and `Recycle` do."""

    @property
    def rows(self) -> Rows:
        """What it reads."""
        ...


@final
@frozen(eq=False)
class Looks:
    """A stage of your own, and what it reads of the target's logits: with it a replay can serve the stage.

    The stage itself is what it was. `DecodeError` for what is no stage.

    >>> learn = Looks(lambda committed: committed, Rows(3))
    >>> learn.rows.most
    3
    """

    stage: Callable[[Committed], Committed] = field(validator=valid(calls("a stage", "give a function of a Committed")))
    rows: Rows = field(validator=valid(a(Rows, "give Rows(k) for a stage that looks at k tokens of each row")))

    def __call__(self, committed: Committed, /) -> Committed:
        return self.stage(committed)
