"""The target's own samples along a draft, each drawn when a rule asks for it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import final

from attrs import define, field

from specflow.guards.checks import does, valid
from specflow.randomness import Sampling, draws
from specflow.state import Scored

is_randomness = valid(does("randomness that takes decisions", "give Dice(), or use Match", "draw", "accept"))
is_sampling = valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw"))


@final
@define(eq=False)
class Samples:
    """One token of the target's law after each draft that `by_samples` holds of, in the order of a walk.

    On a device all along a stretch are drawn at the first, and copied at once. Close it when the walk is over: what was
    drawn for nothing is taken back (`specflow.randomness.draws`).
    """

    rng: Sampling
    scored: Scored
    by_samples: Callable[[int], bool]
    _ahead: list[int] = field(init=False, factory=list)
    _drawing: Generator[int, None, None] | None = field(init=False, default=None)

    def after(self, here: int) -> int:
        """The sample after draft `here`, or after the text."""
        if self._drawing is None or not self._ahead or self._ahead[0] != here:
            self.close()
            stretch, first = self.scored.stretch(here)
            end = first + 1
            while end < len(stretch.way) and self.by_samples(stretch.way[end]):
                end += 1
            self._ahead = list(stretch.way[first:end])
            self._drawing = draws(self.rng, stretch.laws, stretch.start, range(first, end))
        del self._ahead[0]
        return next(self._drawing)

    def close(self) -> None:
        """Draw no more."""
        if self._drawing is not None:
            self._drawing.close()
        self._drawing = None
