"""A lossy stage has no place in a lossless step. Only type-checked: each ignore is a claim."""

from __future__ import annotations

from typing import assert_type

from returns.functions import tap
from returns.pipeline import flow

from specflow import (
    Adjusted,
    DecodeState,
    Dice,
    Drafter,
    Finished,
    GreedyProcessor,
    Lossy,
    LossyStep,
    Predictor,
    Step,
    Verified,
    accept_loss,
    lossy_unadjusted_step,
    once,
    run,
    speculative_step,
)
from specflow.stages import (
    Adjust,
    Draft,
    LossySkipAdjustment,
    LossyTypicalAcceptance,
    RejectTokens,
    advance,
    commit,
    unobserved,
)


def refused(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, verify, adjust = Draft(drafter), Verify(target, GreedyProcessor(), Reject(Dice())), Adjust(Dice())
    skip, typical = LossySkipAdjustment(Dice()), LossyTypicalAcceptance(target, GreedyProcessor(), Dice())
    flow(state, draft, verify, skip, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, typical, adjust, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, typical, skip)  # type: ignore[arg-type]
    unadjusted: Step = lambda s: flow(s, draft, verify, skip)  # type: ignore[assignment, return-value]  # noqa: E731
    lossy = lossy_unadjusted_step(drafter, target, GreedyProcessor(), Dice())
    run(lossy, state)  # type: ignore[arg-type]
    once(lossy, unadjusted)  # type: ignore[arg-type]
    as_lossless: Step = lossy  # type: ignore[assignment]
    accept_loss(speculative_step(drafter, target, GreedyProcessor(), Dice()))  # type: ignore[arg-type]
    print(as_lossless)


def accepted(target: Predictor, drafter: Drafter, state: DecodeState) -> Finished:
    draft, adjust = Draft(drafter), Adjust(Dice())
    typical = LossyTypicalAcceptance(target, GreedyProcessor(), Dice())
    assert_type(flow(state, draft, typical), Lossy[Verified])
    assert_type(flow(state, draft, typical).map(adjust), Lossy[Adjusted])

    def end(verified: Verified) -> DecodeState | Finished:
        return flow(verified, adjust, commit, tap(unobserved), advance)

    step: LossyStep = lambda s: flow(s, draft, typical).map(end)  # noqa: E731
    return run(accept_loss(step), state)
