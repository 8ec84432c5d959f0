"""Fates: what became of each draft of a step, for all who show it."""

from __future__ import annotations

from enum import Enum

from specflow.state import TEXT, Committed


class Fate(Enum):
    """What became of a draft."""

    ACCEPTED = "accepted"
    """It became text."""

    REJECTED = "rejected"
    """It could have come next, and the text went another way."""

    NOT_REACHED = "not reached"
    """It follows a rejected draft, or comes after the end of the text."""


def fates(committed: Committed) -> tuple[Fate, ...]:
    """What became of each draft that the step began with, in the order in which they were proposed."""
    verified, kept = committed.adjusted.verified, len(committed.tokens)
    taken, went_on_from = {*verified.path[:kept]}, {*(TEXT, *verified.path)[:kept]}
    return tuple(
        [
            Fate.ACCEPTED if i in taken else Fate.REJECTED if parent in went_on_from else Fate.NOT_REACHED
            for i, parent in enumerate(verified.drafted.parents)
        ]
    )
