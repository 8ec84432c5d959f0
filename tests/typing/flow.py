"""What mypy says of `flow`, with the plugin of returns. It is only type-checked: each ignore is a claim.

Other checkers, and mypy without the plugin, let a wrong order in `flow` pass; `state.then(…)` in refused.py and
accepted.py is refused and accepted by all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_type

from attrs import evolve
from returns.functions import tap
from returns.pipeline import flow

from specflow import (
    Adjusted,
    CachedPredictor,
    DecodeState,
    Dice,
    Drafted,
    Drafter,
    Finished,
    Fixed,
    GreedyProcessor,
    Match,
    MultinomialProcessor,
    Predictor,
    Proposal,
    Reject,
    Scored,
    SharedNoise,
    Step,
    Tokens,
    Verified,
    run,
    unfold,
)
from specflow.lossy import Lossy, LossyStep, accept_loss
from specflow.randomness import Randomness, Sampling
from specflow.stages import (
    Adjust,
    Draft,
    Judge,
    LossyJudge,
    LossySkipAdjustment,
    LossyTypical,
    PruneCache,
    Score,
    Show,
    Verify,
    advance,
    commit,
    ending,
    unobserved,
)
from specflow.state import Committed


def refused(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, verify = Draft(drafter, Fixed(3)), Verify(target, GreedyProcessor(), Reject(Dice()))
    score, judge = Score(target, GreedyProcessor()), Judge(Reject(Dice()))
    adjust, prune, noise = Adjust(Dice()), PruneCache(()), Adjust(SharedNoise(1))
    flow(state, verify, draft, adjust, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, adjust, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, verify, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, draft, verify)  # type: ignore[arg-type]
    flow(state, draft, verify, adjust, prune, commit)  # type: ignore[arg-type]
    flow(state, draft, verify, adjust, advance)  # type: ignore[arg-type]
    flow(state, draft, verify, tap(Show()), adjust)  # type: ignore[arg-type]
    flow(state, draft, judge, adjust)  # type: ignore[arg-type]
    flow(state, draft, score, adjust)  # type: ignore[arg-type]
    flow(state, draft, verify, noise)  # type: ignore[arg-type]
    half: Step = lambda s: flow(s, draft, verify, adjust, commit)  # type: ignore[assignment, return-value]  # noqa: E731
    run(half, state)


def refused_for_its_loss(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, verify, adjust = Draft(drafter), Verify(target, GreedyProcessor(), Reject(Dice())), Adjust(Dice())
    score, typical = Score(target, GreedyProcessor()), LossyJudge(LossyTypical(Dice()))
    skip = LossySkipAdjustment(Dice())
    flow(state, draft, verify, skip, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, score, typical, adjust, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, score, typical, skip)  # type: ignore[arg-type]
    unadjusted: Step = lambda s: flow(s, draft, verify, skip)  # type: ignore[assignment, return-value]  # noqa: E731
    print(unadjusted)


def accepted_with_its_loss(target: Predictor, drafter: Drafter, state: DecodeState) -> Finished:
    draft, adjust, score = Draft(drafter), Adjust(Dice()), Score(target, GreedyProcessor())
    typical = LossyJudge(LossyTypical(Dice()))
    assert_type(flow(state, draft, score, typical), Lossy[Verified[Sampling]])
    assert_type(flow(state, draft, score, typical).map(adjust), Lossy[Adjusted])

    def end(verified: Verified[Sampling]) -> DecodeState | Finished:
        return flow(verified, adjust, commit, tap(unobserved), advance)

    step: LossyStep = lambda s: flow(s, draft, score, typical).map(end)  # noqa: E731
    return run(accept_loss(step), state)


def show(committed: Committed) -> None:
    print(committed.tokens)


def at_most_two(drafted: Drafted) -> Drafted:
    return evolve(drafted, proposals=drafted.proposals[:2])


def bush(tokens: Tokens) -> Iterator[Proposal]:
    yield Proposal(tokens[-1])
    yield Proposal(tokens[0], parent=-1, chance=0.1)


def accepted(target: CachedPredictor, drafter: Drafter, state: DecodeState) -> None:
    draft, verify = Draft(drafter), Verify(target, GreedyProcessor(), Reject(Dice()))
    adjust, prune = Adjust(Dice()), PruneCache((target,))
    score, judge = Score(target, GreedyProcessor()), Judge(Reject(Dice()))
    assert_type(flow(state, draft), Drafted)
    assert_type(flow(state, draft, score), Scored)
    assert_type(flow(state, draft, score, judge), Verified[Randomness])
    assert_type(flow(state, draft, at_most_two, verify), Verified[Randomness])
    assert_type(flow(state, draft, verify, adjust), Adjusted)
    assert_type(flow(state, draft, verify, adjust, commit, tap(show), prune), Committed)
    assert_type(flow(state, draft, verify, adjust, commit, prune, advance), DecodeState | Finished)
    assert_type(flow(state, draft, verify, adjust, ending()), DecodeState | Finished)
    step: Step = lambda s: flow(s, draft, verify, adjust, commit, tap(show), prune, advance)  # noqa: E731
    assert_type(run(step, state), Finished)
    assert_type(unfold(step, state), Iterator[DecodeState | Finished])
    coupled = Verify(target, MultinomialProcessor(1.0), Match(SharedNoise(3)))
    assert_type(flow(state, draft, coupled, Adjust(SharedNoise(3))), Adjusted)
    tree = Draft(bush, Fixed(3))
    assert_type(flow(state, tree), Drafted)
    assert_type(flow(state, tree, coupled), Verified[Sampling])
    assert_type(flow(state, tree, coupled, Adjust(SharedNoise(3)), commit, tap(show), advance), DecodeState | Finished)


def evolve_is_typed(adjusted: Adjusted, verified: Verified) -> None:
    """By mypy alone, which knows attrs."""
    evolve(adjusted, tokens=(3, 4))  # type: ignore[call-arg]
    evolve(verified, accepted=3)  # type: ignore[call-arg]
