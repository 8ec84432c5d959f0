"""Record: an observer that keeps what each step did, and parts that tell it how long they took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from time import perf_counter
from typing import TypeVar, final

import torch
from attrs import Factory, define, field
from torch import Tensor

from specflow.asked import done_by
from specflow.distribution import Categorical, Distribution, PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import are_facts, calls, does, named, or_none, valid
from specflow.policies.meter import Clock, CostMeter
from specflow.predictors.rescore import margins_of
from specflow.stages.fates import fates
from specflow.stages.observe import Tokenizer
from specflow.stages.order import a_commitment
from specflow.state import Committed, Drafter, Predictor, Proposal, Reason, Tokens
from specflow.trace.parts import DraftTrace, StepTrace
from specflow.trace.trace import Trace
from specflow.trace.words import words_of

T = TypeVar("T")


@final
@define(eq=False)
class Recorder:
    """An observer that records a decode: `recorder.trace` is what it saw. The text stays what it is.

    It keeps what the stages hold anyway, and reads no model: of each draft its q and p, and of each new token the
    margin of the target's logits. Give it to a step as `observe`; it is of one text at a time, and begins anew with
    another one. `drafting(drafter)` and `reading(target)` are the same parts, timed; without them only whole steps are
    timed, from one to the next. On a GPU `clock` must wait for the device. `about` says what is decoded, for the
    reader: names of the model, the drafter, the rule, the processor. `DecodeError` for values of other kinds.

    >>> from specflow import Dice, GreedyProcessor, Reject, SuffixDrafter, run, speculative_step, start
    >>> from specflow.testing import TableModel
    >>> recorder, dice = Recorder(), Dice()
    >>> step = speculative_step(SuffixDrafter(), TableModel(3), GreedyProcessor(), dice, observe=recorder)
    >>> end = run(step, start((0, 1, 0), 6).unwrap())
    >>> recorder.trace.tokens == end.state.tokens, len(recorder.trace.steps) == end.state.tally.steps
    (True, True)
    """

    tokenizer: Tokenizer | None = field(
        default=None, validator=valid(or_none(does("a tokenizer", "give the target's, or None", "decode")))
    )
    about: Mapping[str, str] = field(factory=dict, validator=valid(are_facts))
    clock: Clock = field(default=perf_counter, validator=valid(calls("a clock", "give one, such as time.perf_counter")))
    _prompt: Tokens = field(init=False, default=())
    _text: Tokens = field(init=False, default=())
    _steps: list[StepTrace] = field(init=False, factory=list)
    _reason: Reason | None = field(init=False, default=None)
    _meter: CostMeter = field(init=False, default=Factory(lambda it: CostMeter(it.clock), takes_self=True))
    _ended: float | None = field(init=False, default=None)
    _began: float | None = field(init=False, default=None)
    _spent_drafting: float | None = field(init=False, default=None)
    _spent_reading: float | None = field(init=False, default=None)

    def __call__(self, committed: Committed, /) -> None:
        """Record a step that is about to stand."""
        a_commitment("committed", committed)
        began = self._ended if self._follows(committed.before.tokens) else self._began
        seconds = None if began is None else self._meter.since(began)
        self._steps.append(_step(committed, seconds, self._spent_drafting, self._spent_reading))
        self._text, self._reason = committed.state.tokens, committed.reason
        self._began = self._spent_drafting = self._spent_reading = None
        self._ended = self._meter.now()

    @property
    def trace(self) -> Trace:
        """What was recorded. `DecodeError` where no step was."""
        if not self._steps:
            remedy = "give the recorder to a step as `observe`, and run it"
            raise DecodeError("recorder", "no step was recorded", "nothing", remedy)
        ids = {*self._text, *[draft.token for step in self._steps for draft in step.drafts]}
        words = {} if self.tokenizer is None else words_of(self.tokenizer, ids)
        return Trace(self._prompt, tuple(self._steps), words, dict(self.about), self._reason)

    def drafting(self, drafter: Drafter) -> Drafter:
        """The same drafter; the time inside it is recorded."""
        calls("a drafter", "give a function of the tokens so far")("drafter", drafter)
        return done_by(self._drafting, drafter)

    def reading(self, target: Predictor) -> Predictor:
        """The same predictor; the time inside it is recorded."""
        calls("a predictor", "give one, such as a CachedPredictor")("target", target)

        def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
            began = self._begin()
            logits = target(tokens, drafts)
            self._spent_reading = (self._spent_reading or 0.0) + self._meter.since(began)
            return logits

        predict.__qualname__ = named(target)
        return predict

    def _drafting(self, work: Callable[[], T]) -> T:
        began = self._begin()
        try:
            return work()
        finally:
            self._spent_drafting = (self._spent_drafting or 0.0) + self._meter.since(began)

    def _begin(self) -> float:
        now = self._meter.now()
        self._began = now if self._began is None else self._began
        return now

    def _follows(self, before: Tokens) -> bool:
        """Whether a text goes on from what was recorded last; if not, what is not of it is forgotten."""
        if self._steps and before == self._text:
            return True
        while self._steps and before != self._text:
            self._text = self._text[: len(self._text) - len(self._steps.pop().tokens)]
        if not self._steps:
            self._prompt = self._text = before
        return False


def _step(committed: Committed, seconds: float | None, drafting: float | None, reading: float | None) -> StepTrace:
    verified, new = committed.adjusted.verified, tuple(map(int, committed.tokens))
    drafted = verified.drafted
    laws = [verified.scored.made(parent) for parent in drafted.parents]
    tokens = [int(proposal.token) for proposal in drafted.proposals]
    rows = zip(
        tokens,
        drafted.parents,
        _probabilities([proposal.q for proposal in drafted.proposals], tokens),
        _probabilities(laws, tokens),
        fates(committed),
        [f"{proposal.source}" for proposal in drafted.proposals],
        strict=True,
    )
    drafts = tuple([DraftTrace(*row) for row in rows])
    margins = [margin if isfinite(margin) else None for margin in margins_of(verified.logits[: len(new)])]
    return StepTrace(new, drafts, tuple(margins), seconds, drafting, reading)


def _probabilities(laws: Sequence[Distribution | None], tokens: Sequence[int]) -> list[float | None]:
    """What each law gives to its token, from a device all in one copy; None where nobody knows."""
    found: list[float | None] = []
    for law, token in zip(laws, tokens, strict=True):
        found.append(law.of(token) if isinstance(law, PointMass) else 0.0 if isinstance(law, Categorical) else None)
    read = [
        (i, law.probs[token])
        for i, (law, token) in enumerate(zip(laws, tokens, strict=True))
        if isinstance(law, Categorical) and token < len(law.probs)
    ]
    if read:
        numbers: list[float] = torch.stack([number.to(read[0][1]) for _, number in read]).tolist()
        for (i, _), number in zip(read, numbers, strict=True):
            found[i] = min(max(number, 0.0), 1.0) if isfinite(number) else None
    return found
