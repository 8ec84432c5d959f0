"""Draft: propose tokens that may follow, as a chain or as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from attrs import field, frozen

from specflow.asked import proposal_of, stream_of
from specflow.errors import DecodeError
from specflow.guards.checks import a, calls, each, named, shown, valid
from specflow.policies.fixed import Fixed
from specflow.state import BEFORE, TEXT, DecodeState, Drafted, Drafter, GammaPolicy, Proposal, a_state
from specflow.trees import parent_of, parents_of, preorder, without

_are_proposals = each(a(Proposal, "return what was taken from the stream"))


@final
@frozen
class Draft:
    """Takes as many proposals from the drafter as the gamma policy wants and as there is room for.

    No path is longer than room - 1, so that the bonus token fits, and each ends at a stop token, which is kept. The
    drafts of a tree are put in depth-first order, so that the likeliest path lies together. A drafter with nothing to
    say makes γ = 0, and the step is one of autoregressive decoding. `DecodeError`, naming the source, for what is not a
    proposal, for one that does not come after its parent, and for a token that is not in the vocabulary.

    >>> from itertools import repeat
    >>> from specflow import Fixed, start
    >>> Draft(lambda tokens: repeat(Proposal(tokens[-1])), Fixed(2))(start((0, 1), 4).unwrap()).tokens
    (1, 1)
    """

    drafter: Drafter = field(validator=valid(calls("a drafter", "give a function of the tokens so far")))
    gamma: GammaPolicy = field(
        default=Fixed(), validator=valid(calls("a gamma policy", "give Fixed(5), or a function of stream and state"))
    )

    def __call__(self, state: DecodeState, /) -> Drafted:
        a_state("state", state)
        stream = self._that_fits(stream_of(self.drafter, self.drafter(state.tokens)), state)
        took: object = self.gamma(stream, state)
        match took:
            case (tuple() | list() as proposals, tuple() as pace):
                _are_proposals("gamma", proposals)
                if pace is not state.pace:
                    state = DecodeState(state.request, state.tokens, pace, state.tally)
                return Drafted(state, preorder(_up_to_the_end(proposals, state.request.stop)))
        happened = f"the policy {named(self.gamma)} returns no proposals and pace"
        raise DecodeError("gamma", happened, shown(took), "return (the proposals taken, state.pace)")

    def _that_fits(self, stream: Iterator[object], state: DecodeState) -> Iterator[Proposal]:
        """The stream up to where it cannot be of use: too deep for the room, or a chain after a stop token."""
        vocab_size, stop, room = state.request.vocab_size, state.request.stop, state.room - 1
        if room <= 0:
            return
        depths: list[int] = []
        for number, value in enumerate(stream):
            proposal = proposal_of(self.drafter, value, vocab_size)
            parent = parent_of(proposal, number)
            depths.append(1 if parent == TEXT else depths[parent] + 1)
            if depths[-1] > room:
                return
            yield proposal
            if proposal.parent == BEFORE and (depths[-1] == room or proposal.token in stop):
                return


def _up_to_the_end(drafts: Sequence[Proposal], stop: frozenset[int]) -> Sequence[Proposal]:
    """Drafts without those behind a stop token: a policy takes them where it takes a tree."""
    if stop.isdisjoint([draft.token for draft in drafts]):
        return drafts
    behind: set[int] = set()
    for i, parent in enumerate(parents_of(drafts)):
        if parent != TEXT and (parent in behind or drafts[parent].token in stop):
            behind.add(i)
    return without(drafts, behind)


def draft_nothing(state: DecodeState) -> Drafted:
    """γ = 0: with it a step is one of autoregressive decoding.

    >>> from specflow.state import Request
    >>> draft_nothing(DecodeState(Request((1,), 2), (1,))).proposals
    ()
    """
    return Drafted(state, ())
