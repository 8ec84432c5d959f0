"""How many tokens to draft: gamma policies, values that take proposals from a drafter's lazy stream."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import final

from attrs import field, frozen

from specflow.errors import DecodeError
from specflow.state import DecodeState, Pace, Proposal


def _at_least_one(instance: object, attribute: object, gamma: int) -> None:
    if gamma < 1:
        raise DecodeError("gamma", "gamma is below 1", gamma, "draft at least one token")


@final
@frozen
class Fixed:
    """The same γ at each step: up to `gamma` proposals, fewer where the stream ends. γ ≥ 1, else `DecodeError`.

    >>> from specflow import PointMass, Proposal, Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> stream = (Proposal(token, PointMass(token)) for token in (4, 5, 6))
    >>> [proposal.token for proposal in Fixed(2)(stream, state)[0]]
    [4, 5]
    """

    gamma: int = field(default=5, validator=_at_least_one)

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        return tuple(islice(stream, self.gamma)), state.pace
