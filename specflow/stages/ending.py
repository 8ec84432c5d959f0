"""The tail of a step, once: stop, commit, observe, what else comes after, advance."""

from __future__ import annotations

from collections.abc import Callable

from specflow.guards.checks import calls
from specflow.stages.commit import advance, commit
from specflow.stages.observe import Observer, unobserved
from specflow.stages.stop import Condition, StopWhen, never
from specflow.state import Adjusted, Committed, DecodeState, Finished

_is_observer = calls("an observer", "give a function of what was committed")
_is_stage = calls("a stage", "give one that takes what was committed, such as PruneCache((predictor,))")


def ending(
    until: Condition = never, observe: Observer = unobserved, *after: Callable[[Committed], Committed]
) -> Callable[[Adjusted], DecodeState | Finished]:
    """How every step ends: where `until` comes true, or at a stop token or the limit; seen by `observe` as it stands.

    `after` are stages that learn from what was committed or forget what was not, in order. If `observe` raises, the
    step has not happened: no text, nothing learned. `DecodeError` for what is no condition, observer or stage.
    """
    _is_observer("observe", observe)
    for stage in after:
        _is_stage("after", stage)
    stop = StopWhen(until)

    def end(adjusted: Adjusted) -> DecodeState | Finished:
        committed = commit(stop(adjusted))
        observe(committed)
        for stage in after:
            committed = stage(committed)
        return advance(committed)

    return end
