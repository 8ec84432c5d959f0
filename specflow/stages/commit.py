"""Commit: cut the new tokens where the text ends, and count what stands."""

from __future__ import annotations

from typing import Final

from specflow.stages.order import a_commitment, an_adjustment
from specflow.state import TEXT, Adjusted, Committed, Count, DecodeState, Drafted, Finished, Reason, Tally


def commit(adjusted: Adjusted) -> Committed:
    """The text after this step, cut at the earliest stop token or at the limit, with the statistics of what was kept.

    A stop beats the limit where both fall on one token. Drafts after the cut, or in other branches than the
    one that is cut, are neither drafted nor accepted: the statistics are those of a decode that ended there.

    >>> from specflow import Dice, GreedyProcessor, Match, chain, start
    >>> from specflow.stages import Verify
    >>> from specflow.testing import TableModel
    >>> verify = Verify(TableModel(5, seed=1), GreedyProcessor(), Match(Dice()))
    >>> verified = verify(Drafted(start((0,), 9, stop=(4,)).unwrap(), chain((4, 2))))
    >>> committed = commit(Adjusted(verified, bonus=None))
    >>> committed.tokens, committed.reason.value
    ((4,), 'stop token')
    """
    an_adjustment("adjusted", adjusted)
    drafted = adjusted.verified.drafted
    state, said = drafted.state, adjusted.tokens
    new, reason = said[: state.room], adjusted.reason
    if len(new) < len(said):
        reason = None
    stop = next((i for i, token in enumerate(new) if token in state.request.stop), None)
    if stop is not None:
        new, reason = new[: stop + 1], Reason.STOP
    elif reason is None and len(new) == state.room:
        reason = Reason.LIMIT
    tally = state.tally + _tally(drafted, adjusted.verified.path, len(new))
    return Committed(adjusted, DecodeState(state.request, state.tokens + new, state.pace, tally), reason)


def advance(committed: Committed) -> DecodeState | Finished:
    """The next state, or the end of the text.

    >>> from specflow import Dice, GreedyProcessor, Match, chain, start
    >>> from specflow.stages import Verify
    >>> from specflow.testing import TableModel
    >>> verify = Verify(TableModel(5, seed=1), GreedyProcessor(), Match(Dice()))
    >>> verified = verify(Drafted(start((0,), 9).unwrap(), chain((4, 3))))
    >>> advance(commit(Adjusted(verified, bonus=2))).tokens
    (0, 4, 2)
    """
    a_commitment("committed", committed)
    return committed.state if committed.reason is None else Finished(committed.state, committed.reason)


UNDRAFTED: Final = Tally(1)


def _tally(drafted: Drafted, path: tuple[int, ...], kept: int) -> Tally:
    if not drafted.proposals:
        return UNDRAFTED
    judged = path[:kept] if kept <= len(path) else range(len(drafted.proposals))
    sources = [drafted.proposals[i].source for i in judged]
    taken = [drafted.proposals[i].source for i in path[:kept]]
    counts = tuple([(name, Count(sources.count(name), taken.count(name))) for name in sorted(set(sources))])
    refused = kept > len(path) and bool(drafted.children(path[-1] if path else TEXT))
    return Tally(1, counts, (1,) * (len(taken) + refused), (1,) * len(taken))
