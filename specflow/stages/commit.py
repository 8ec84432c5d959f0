"""Commit: cut the new tokens where the text ends, and count what stands."""

from __future__ import annotations

from collections.abc import Sequence
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
    sources = [proposal.source for proposal in drafted.proposals]
    return tally_of(sources, path, kept, bool(drafted.children((TEXT, *path)[-1])))


def tally_of(sources: Sequence[str], path: Sequence[int], kept: int, more: bool) -> Tally:
    """The tally of one step, whose drafts have these `sources`, and which added `kept` tokens to the text.

    The drafts on `path` stand, and `more` says whether something was drafted after the last of them.
    """
    taken, cut = path[:kept], kept <= len(path)
    judged = [sources[i] for i in (taken if cut else range(len(sources)))]
    stood = [sources[i] for i in taken]
    counts = [(name, Count(judged.count(name), stood.count(name))) for name in sorted({*judged})]
    rejected = more and not cut
    return Tally(1, tuple(counts), (1,) * (len(taken) + rejected), (1,) * len(taken))
