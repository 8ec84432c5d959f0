"""Judge: which of the drafts stand, by a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeAlias, final

from attrs import Factory, field, frozen

from specflow.distribution import Distribution
from specflow.errors import DecodeError
from specflow.guards.checks import calls, is_id, named, shown, valid
from specflow.lossy import Lossy
from specflow.processors import Processor
from specflow.stages.order import a_score
from specflow.stages.score import Score
from specflow.state import TEXT, Drafted, Predictor, Rule, S, Scored, Verdict, Verified

LossyRule: TypeAlias = Callable[[Scored], Lossy[Verdict[S]]]
"""A rule under which the text does not have the target's law."""

_is_rule = valid(calls("a rule", "give one, such as Reject(Dice())"))


@final
@frozen
class Judge(Generic[S]):
    """Lets a rule say which of the drafts stand. `DecodeError` for what is not a verdict.

    After an accepted stop token there is no correction: the text is over. Nor is there after accepted drafts that the
    processor lets nothing follow (`DeadEndError`): a condition ends the text there, or the next step fails.

    >>> from specflow import Dice, GreedyProcessor, Proposal, Reject, start
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start((0,), 9).unwrap(), (Proposal(4), Proposal(3)))
    >>> verified = Judge(Reject(Dice()))(Score(TableModel(5, seed=1), GreedyProcessor())(drafted))
    >>> verified.tokens, verified.correction
    ((4,), PointMass(token=2))
    """

    rule: Rule[S] = field(validator=_is_rule)

    def __call__(self, scored: Scored, /) -> Verified[S]:
        a_score("scored", scored)
        return _verified(scored, self.rule(scored), self.rule)


@final
@frozen
class LossyJudge(Generic[S]):
    """`Judge` by a rule under which the text does not have the target's law.

    >>> from specflow import Dice, GreedyProcessor, chain, start
    >>> from specflow.stages import LossyTypical, Score
    >>> from specflow.state import Drafted
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start((0,), 9).unwrap(), chain((4, 3)))
    >>> scored = Score(TableModel(5, seed=1), GreedyProcessor())(drafted)
    >>> LossyJudge(LossyTypical(Dice()))(scored).value.tokens
    (4,)
    """

    rule: LossyRule[S] = field(validator=_is_rule)

    def __call__(self, scored: Scored, /) -> Lossy[Verified[S]]:
        a_score("scored", scored)
        said: object = self.rule(scored)
        if not isinstance(said, Lossy):
            raise DecodeError("rule", f"the rule {named(self.rule)} is not lossy", shown(said), "use Judge(rule)")
        verdict: Verdict[S] = said.value
        return Lossy(_verified(scored, verdict, self.rule))


@final
@frozen
class Verify(Generic[S]):
    """`Score` and `Judge` in one, for those who need not look in between.

    >>> from specflow import Dice, GreedyProcessor, Proposal, Reject, start
    >>> from specflow.testing import TableModel
    >>> verify = Verify(TableModel(5, seed=1), GreedyProcessor(), Reject(Dice()))
    >>> verify(Drafted(start((0,), 9).unwrap(), (Proposal(4), Proposal(3)))).tokens
    (4,)
    """

    target: Predictor
    processor: Processor
    rule: Rule[S]
    _score: Score = field(
        init=False, eq=False, repr=False, default=Factory(lambda it: Score(it.target, it.processor), takes_self=True)
    )
    _judge: Judge[S] = field(
        init=False, eq=False, repr=False, default=Factory(lambda it: Judge(it.rule), takes_self=True)
    )

    def __call__(self, drafted: Drafted, /) -> Verified[S]:
        return self._judge(self._score(drafted))


def _verified(scored: Scored, verdict: Verdict[S], rule: object) -> Verified[S]:
    said: object = verdict
    if not isinstance(said, Verdict) or not _is_path(scored.drafted, said.path):
        happened = f"the rule {named(rule)} says nothing of which drafts stand"
        remedy = "return Verdict(path, correction), with a path of drafts from the text down"
        raise DecodeError("rule", happened, shown(said), remedy)
    path: tuple[int, ...] = said.path
    law: object = said.correction
    if law is not None and not isinstance(law, Distribution):
        happened = f"the correction of the rule {named(rule)} is not a law"
        raise DecodeError("rule", happened, shown(law), "give a PointMass or Categorical, or None for p itself")
    last = (TEXT, *path)[-1]
    if path and scored.drafted.proposals[last].token in scored.drafted.state.request.stop:
        law = None
    elif law is None and not scored.ends(last):
        law = scored.law(last)
    return Verified(scored, path, law)


def _is_path(drafted: Drafted, path: object) -> bool:
    return (
        isinstance(path, tuple)
        and all(is_id(i) and i < len(drafted.proposals) for i in path)
        and [drafted.parents[i] for i in path] == [TEXT, *path][:-1]
    )
