"""A lossy stage has no place in a lossless step. Only type-checked: each ignore is a claim."""

from __future__ import annotations

from typing import assert_type

from specflow import (
    Adjusted,
    DecodeState,
    Dice,
    Drafter,
    Finished,
    GreedyProcessor,
    Predictor,
    Reject,
    SharedNoise,
    Step,
    Verified,
    run,
    speculative_step,
)
from specflow.loop import once
from specflow.lossy import Lossy, LossyStep, accept_loss
from specflow.randomness import Sampling
from specflow.stages import (
    Adjust,
    Draft,
    Judge,
    LossyJudge,
    LossySkipAdjustment,
    LossyTypical,
    Score,
    Verify,
    commit,
    ending,
)
from specflow.steps import lossy_unadjusted_step


def refused(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, score, adjust = Draft(drafter), Score(target, GreedyProcessor()), Adjust(Dice())
    verify, skip, typical = Judge(Reject(Dice())), LossySkipAdjustment(Dice()), LossyJudge(LossyTypical(Dice()))
    state.then(draft).then(score).then(verify).then(skip).then(commit)  # type: ignore[attr-defined]
    state.then(draft).then(score).then(typical).then(adjust)  # type: ignore[attr-defined]
    state.then(draft).then(score).then(typical).then(skip)  # type: ignore[attr-defined]
    skip(state.then(draft).then(score).then(typical))  # type: ignore[arg-type]
    state.then(draft).then(score).then(verify).then(skip).map(commit).map(adjust)  # type: ignore[arg-type]
    unadjusted: Step = lambda s: s.then(draft).then(score).then(verify).then(skip)  # type: ignore[assignment, return-value]  # noqa: E731
    lossy = lossy_unadjusted_step(drafter, target, GreedyProcessor(), Dice())
    run(lossy, state)  # type: ignore[arg-type]
    once(lossy, unadjusted)  # type: ignore[arg-type]
    as_lossless: Step = lossy  # type: ignore[assignment]
    accept_loss(speculative_step(drafter, target, GreedyProcessor(), Dice()))  # type: ignore[arg-type]
    print(as_lossless)


def accepted(target: Predictor, drafter: Drafter, state: DecodeState) -> Finished:
    draft, score, adjust = Draft(drafter), Score(target, GreedyProcessor()), Adjust(Dice())
    typical, skip = LossyJudge(LossyTypical(Dice())), LossySkipAdjustment(SharedNoise(1))
    verify = Verify(target, GreedyProcessor(), Reject(Dice()))
    assert_type(state.then(draft).then(score).then(typical), Lossy[Verified[Sampling]])
    assert_type(state.then(draft).then(score).then(typical).map(adjust), Lossy[Adjusted])
    assert_type(state.then(draft).then(verify).then(skip), Lossy[Adjusted])
    step: LossyStep = lambda s: s.then(draft).then(score).then(typical).map(adjust).map(ending())  # noqa: E731
    both: LossyStep = lambda s: s.then(draft).then(verify).then(skip).map(ending())  # noqa: E731
    return run(once(accept_loss(step), accept_loss(both)), state)
