"""Draft: propose tokens that may follow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import final

from attrs import evolve, field, frozen

from specflow.asked import proposal_of, stream_of
from specflow.checks import a, calls, named, shown, valid
from specflow.errors import DecodeError
from specflow.gamma import Fixed
from specflow.state import DecodeState, Drafted, Drafter, GammaPolicy, Proposal

a_state = a(DecodeState, "give a state, such as start(prompt, 32).unwrap()")


@final
@frozen
class Draft:
    """Takes as many proposals from the drafter as the gamma policy wants and as there is room for.

    γ ≤ room - 1, so that the bonus token fits, and nothing is taken behind a stop token, which is kept. A drafter with
    nothing to say makes γ = 0, and the step is one of autoregressive decoding. `DecodeError`, naming the source, for
    what is no proposal, for a token that is no id of the vocabulary, and for a point mass of another token.
    """

    drafter: Drafter = field(validator=valid(calls("a drafter", "give a function of the tokens so far")))
    gamma: GammaPolicy = field(
        default=Fixed(), validator=valid(calls("a gamma policy", "give Fixed(5), or a function of stream and state"))
    )

    def __call__(self, state: DecodeState, /) -> Drafted:
        a_state("state", state)
        stream = islice(stream_of(self.drafter, self.drafter(state.tokens)), max(0, state.room - 1))
        took: object = self.gamma(self._looked_at(stream, state), state)
        match took:
            case (tuple() | list() as proposals, tuple() as pace):
                return Drafted(evolve(state, pace=pace), tuple(proposals))
        happened = f"the policy {named(self.gamma)} returns no proposals and pace"
        raise DecodeError("gamma", happened, shown(took), "return (the proposals taken, state.pace)")

    def _looked_at(self, stream: Iterator[object], state: DecodeState) -> Iterator[Proposal]:
        vocab_size, stop = state.request.vocab_size, state.request.stop
        for value in stream:
            proposal = proposal_of(self.drafter, value, vocab_size)
            yield proposal
            if proposal.token in stop:
                return


def draft_nothing(state: DecodeState) -> Drafted:
    """γ = 0: with it a step is one of autoregressive decoding.

    >>> from specflow.state import Request
    >>> draft_nothing(DecodeState(Request((1,), 2), (1,))).proposals
    ()
    """
    a_state("state", state)
    return Drafted(state, ())
