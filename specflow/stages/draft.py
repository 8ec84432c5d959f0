"""Draft: propose tokens that may follow."""

from __future__ import annotations

from itertools import islice
from typing import final

from attrs import evolve, frozen

from specflow.gamma import Fixed
from specflow.state import DecodeState, Drafted, Drafter, GammaPolicy


@final
@frozen
class Draft:
    """Takes as many proposals from the drafter as the gamma policy wants and as there is room for.

    γ ≤ room - 1, so that the bonus token fits. A drafter with nothing to say makes γ = 0, and the step is one of
    autoregressive decoding.
    """

    drafter: Drafter
    gamma: GammaPolicy = Fixed()

    def __call__(self, state: DecodeState, /) -> Drafted:
        stream = islice(self.drafter(state.tokens), max(0, state.room - 1))
        proposals, pace = self.gamma(stream, state)
        return Drafted(evolve(state, pace=pace), proposals)


def draft_nothing(state: DecodeState) -> Drafted:
    """γ = 0: with it a step is one of autoregressive decoding.

    >>> from specflow.state import Request
    >>> draft_nothing(DecodeState(Request((1,), 2), (1,))).proposals
    ()
    """
    return Drafted(state, ())
