"""The tail of a step, once: stop, commit, observe, what else comes after, such as `PruneCache`, advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from attrs import field, frozen

from specflow.guards.checks import calls, does, each, valid
from specflow.protocols import Prunable
from specflow.stages.commit import advance, commit
from specflow.stages.observe import Observer, unobserved
from specflow.stages.order import a_commitment
from specflow.stages.stop import Condition, StopWhen, never
from specflow.state import Adjusted, Committed, DecodeState, Finished

_is_observer = calls("an observer", "give a function of what was committed")
_is_stage = calls("a stage", "give one that takes what was committed, such as PruneCache((predictor,))")


@final
@frozen
class PruneCache:
    """Tells each provider which text stands, so that rejected positions are freed now rather than at the next read.

    Law: leaving it out never changes a token.

    >>> from specflow import Dice, GreedyProcessor, run, speculative_step, start
    >>> from specflow.drafters import propose_nothing
    >>> from specflow.testing import TableModel
    >>> class Told:
    ...     def __init__(self): self.texts = []
    ...     def prune(self, tokens): self.texts.append(tokens)
    >>> memo = Told()
    >>> step = speculative_step(propose_nothing, TableModel(5, seed=1), GreedyProcessor(), Dice(), prune=(memo,))
    >>> run(step, start((0,), 2).unwrap()).state.tokens, memo.texts
    ((0, 4, 2), [(0, 4), (0, 4, 2)])
    """

    providers: tuple[Prunable, ...] = field(
        validator=valid(each(does("a provider that forgets", "give the predictors themselves", "prune")))
    )

    def __call__(self, committed: Committed, /) -> Committed:
        a_commitment("committed", committed)
        for provider in self.providers:
            provider.prune(committed.state.tokens)
        return committed


def ending(
    until: Condition = never, observe: Observer = unobserved, *after: Callable[[Committed], Committed]
) -> Callable[[Adjusted], DecodeState | Finished]:
    """How every step ends: where `until` comes true, or at a stop token or the limit; seen by `observe` as it stands.

    `after` are stages that learn from what was committed or forget what was not, in order. If `observe` raises, the
    step has not happened: no text, nothing learned. `DecodeError` for what is not a condition, observer or stage.

    >>> from specflow import Dice, GreedyProcessor, Match, chain, start
    >>> from specflow.stages import Adjust, Verify
    >>> from specflow.testing import TableModel
    >>> from specflow.state import Drafted
    >>> verify = Verify(TableModel(5, seed=1), GreedyProcessor(), Match(Dice()))
    >>> verified = verify(Drafted(start((0,), 9).unwrap(), chain((4, 3))))
    >>> end = ending(until=lambda state: state.tokens[-1] == 4)
    >>> verified.then(Adjust(Dice())).then(end).reason.value
    'stop condition'
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
