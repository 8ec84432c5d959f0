"""Losing the target's law on purpose, and never unnoticed: no other stage takes what a lossy one returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeAlias, final

from attrs import frozen
from typing_extensions import TypeVar

from specflow.errors import DecodeError
from specflow.guards.checks import calls, named, shown
from specflow.state import DecodeState, Finished, Step

R = TypeVar("R", covariant=True)
U = TypeVar("U")


@final
@frozen(eq=False)
class Lossy(Generic[R]):
    """A record that a lossy stage has touched.

    No other stage takes it, so type checkers refuse the stage in what is typed as a `Step`. `map` applies stages to
    what is inside and keeps the mark, up to the end of the step, which then is a `LossyStep`.

    >>> Lossy(3).map(lambda value: value + 1).value
    4
    """

    value: R

    def map(self, stages: Callable[[R], U], /) -> Lossy[U]:
        """What the stages make of the record, still marked."""
        calls("stages", "give a function of the record")("stages", stages)
        return Lossy(stages(self.value))


LossyStep: TypeAlias = Callable[[DecodeState], Lossy[DecodeState | Finished]]
"""One round of decoding whose text does not have the target's law. `run` and `unfold` refuse it."""


def accept_loss(step: LossyStep) -> Step:
    """The same step, for a caller who knows what it is: the one place where a lossy decoder becomes one that runs."""
    calls("a lossy step", "give a LossyStep, such as lossy_unadjusted_step(…)")("step", step)

    def accepted(state: DecodeState) -> DecodeState | Finished:
        outcome: object = step(state)
        if not isinstance(outcome, Lossy):
            remedy = "use the step as it is, if it is lossless"
            raise DecodeError("step", f"the step {named(step)} returns nothing lossy", shown(outcome), remedy)
        return outcome.value  # type: ignore[no-any-return] # `run` looks at it

    return accepted
