"""Commit: cut the new tokens where the text ends, and count what stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from attrs import evolve

from specflow.state import Adjusted, Committed, Count, DecodeState, Finished, Proposal, Reason, Tally


def commit(adjusted: Adjusted) -> Committed:
    """The text after this step, cut at the earliest stop token or at the limit, with the statistics of what was kept.

    A stop beats the limit where both fall on one token. Drafts behind the cut are neither drafted nor accepted: the
    statistics are those of a decode that ended there.
    """
    drafted = adjusted.verified.drafted
    state = drafted.state
    new, reason = adjusted.tokens[: state.room], adjusted.reason
    if len(new) < len(adjusted.tokens):
        reason = None
    stop = next((i for i, token in enumerate(new) if token in state.request.stop), None)
    if stop is not None:
        new, reason = new[: stop + 1], Reason.STOP
    elif reason is None and len(new) == state.room:
        reason = Reason.LIMIT
    tally = state.tally + _tally(drafted.proposals, adjusted.verified.accepted, len(new))
    return Committed(adjusted, evolve(state, tokens=state.tokens + new, tally=tally), reason)


def advance(committed: Committed) -> DecodeState | Finished:
    """The next state, or the end of the text."""
    return committed.state if committed.reason is None else Finished(committed.state, committed.reason)


def _tally(proposals: Sequence[Proposal], accepted: int, kept: int) -> Tally:
    if not proposals:
        return Tally(1)
    judged = proposals[:kept] if kept <= accepted else proposals
    drafted = Counter(proposal.source for proposal in judged)
    taken = Counter(proposal.source for proposal in judged[:accepted])
    return Tally(1, tuple(sorted((name, Count(count, taken[name])) for name, count in drafted.items())))
