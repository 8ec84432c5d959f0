"""The same γ at each step, and the schedule of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, final

from attrs import field, frozen

from specflow.errors import DecodeError
from specflow.guards.checks import drafts, valid
from specflow.policies.choice import are_numbers
from specflow.state import DecodeState, Pace, Proposal, parents_of
from specflow.trees import depths


@final
@frozen
class Fixed:
    """The same γ at each step: up to `gamma` proposals, fewer where the stream ends. γ ≥ 1, else `DecodeError`.

    Of a tree it takes the first γ drafts.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> stream = (Proposal(token) for token in (4, 5, 6))
    >>> [proposal.token for proposal in Fixed(2)(stream, state)[0]]
    [4, 5]
    """

    gamma: int = field(default=5, validator=valid(drafts))

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        return tuple(islice(stream, self.gamma)), state.pace


class HeuristicPace(NamedTuple):
    """What `Heuristic` carries between steps: γ, the longest path that was drafted, and what the tally was."""

    gamma: float
    deepest: float
    drafted: float
    accepted: float


@final
@frozen
class Heuristic:
    """The schedule of transformers: γ + 2 when all drafts of the last step were accepted, else γ - 1.

    Of a tree, when a longest path was. γ stays in [1, `gamma_max`]; a step that drafted nothing leaves it. A pace
    of another policy, or one that this text's tally cannot have come from, is a fresh start. Threads may share it.
    1 ≤ `gamma` ≤ `gamma_max`, else `DecodeError`.
    Source: transformers, `num_assistant_tokens_schedule="heuristic"`, which has no maximum of its own.

    >>> from specflow.state import Request
    >>> state = DecodeState(Request((1,), 9), (1,))
    >>> Heuristic(gamma=3)((Proposal(token) for token in range(9)), state)[1]
    HeuristicPace(gamma=3, deepest=3, drafted=0, accepted=0)
    """

    gamma: int = field(default=5, validator=valid(drafts))
    gamma_max: int = field(default=40, validator=valid(drafts))

    def __attrs_post_init__(self) -> None:
        if self.gamma_max < self.gamma:
            happened = f"gamma_max is below the first gamma of {self.gamma}"
            raise DecodeError("gamma_max", happened, self.gamma_max, "give them in order")

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        tally, gamma = state.tally, self.gamma
        match state.pace:
            case HeuristicPace(before, deepest, drafted, accepted) if are_numbers(state.pace):
                judged, stood = tally.drafted - drafted, tally.accepted - accepted
                if 0 <= stood <= judged:
                    change = 0 if judged == 0 else 2 if stood >= min(judged, deepest) else -1
                    gamma = min(max(int(before) + change, 1), self.gamma_max)
        taken = tuple(islice(stream, gamma))
        deepest = max(depths(parents_of(taken)), default=-1) + 1
        return taken, HeuristicPace(gamma, deepest, tally.drafted, tally.accepted)
