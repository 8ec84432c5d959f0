"""Programs that type checkers accept, with exactly these types: an `Any` that leaked would be noticed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_type

from attrs import evolve
from returns.result import Result
from torch import Tensor

from specflow import (
    Adjusted,
    Block,
    CachedPredictor,
    CostAware,
    CostMeter,
    DecodeError,
    DecodeState,
    Dice,
    Drafted,
    Drafter,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    Match,
    MultinomialProcessor,
    PointMass,
    Predictor,
    Proposal,
    Reject,
    Rule,
    Scored,
    SharedNoise,
    Step,
    Tokens,
    Traverse,
    Verdict,
    Verified,
    along_paths,
    autoregressive_generate,
    chain,
    run,
    speculative_generate,
    speculative_step,
    start,
    unfold,
    verified_step,
)
from specflow.distribution import Distribution, max_fn
from specflow.drafters import as_chain
from specflow.policies import EGAG
from specflow.predictors import path_by_path
from specflow.randomness import Randomness, Sampling
from specflow.stages import (
    Adjust,
    Draft,
    Judge,
    PruneCache,
    Score,
    StopWhen,
    Verify,
    advance,
    commit,
    draft_nothing,
    ending,
)
from specflow.state import CertainDrafter, Committed, Pace
from tests.toys import tiny_llama


def repeat_last(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    while True:
        yield Proposal(tokens[-1])


def at_most_two(drafted: Drafted) -> Drafted:
    return evolve(drafted, proposals=drafted.proposals[:2])


def show(committed: Committed) -> None:
    print(committed.tokens)


def patient(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
    return tuple(stream)[:1], state.pace


def stages_in_a_row(target: Predictor, state: DecodeState) -> None:
    draft, verify = Draft(repeat_last, patient), Verify(target, GreedyProcessor(), Reject(Dice()))
    adjust, prune = Adjust(Dice()), PruneCache((CachedPredictor(tiny_llama()),))
    end = ending(lambda s: len(s.output) > 5, show, prune)
    assert_type(state.then(draft), Drafted)
    assert_type(state.then(draft_nothing), Drafted)
    assert_type(state.then(draft).then(at_most_two).then(verify), Verified[Randomness])
    assert_type(state.then(draft).then(verify).then(adjust), Adjusted)
    assert_type(state.then(draft).then(verify).then(adjust).then(StopWhen(lambda s: True)), Adjusted)
    assert_type(state.then(draft).then(verify).then(adjust).then(commit), Committed)
    assert_type(state.then(draft).then(verify).then(adjust).then(commit).then(prune), Committed)
    assert_type(state.then(draft).then(verify).then(adjust).then(commit).then(advance), DecodeState | Finished)
    assert_type(state.then(draft).then(verify).then(adjust).then(end), DecodeState | Finished)
    step: Step = lambda s: s.then(draft).then(verify).then(adjust).then(commit).then(prune).then(advance)  # noqa: E731
    tail: Step = lambda s: s.then(draft).then(verify).then(adjust).then(end)  # noqa: E731
    assert_type(run(step, state), Finished)
    assert_type(unfold(tail, state), Iterator[DecodeState | Finished])


def score_and_judge(target: Predictor, drafted: Drafted) -> None:
    score = Score(target, MultinomialProcessor(1.0))
    scored = drafted.then(score)
    assert_type(scored, Scored)
    assert_type(scored.law(0), Distribution)
    assert_type(scored.logits, Tensor)
    assert_type(scored.then(Judge(Reject(Dice()))), Verified[Randomness])
    assert_type(scored.then(Judge(Block(Dice()))), Verified[Randomness])
    assert_type(scored.then(Judge(Traverse(Dice()))), Verified[Randomness])
    assert_type(scored.then(Judge(Match(Dice()))), Verified[Sampling])
    assert_type(scored.then(Judge(of_my_own)), Verified[Randomness])
    assert_type(scored.then(Judge(Match(SharedNoise(3)))).then(Adjust(SharedNoise(3))), Adjusted)
    assert_type(scored.then(Judge(Match(SharedNoise(3)))).then(Adjust(Dice())), Adjusted)
    assert_type(scored.then(Judge(of_my_own)).then(Adjust(Dice())), Adjusted)
    coupled = Verify(target, MultinomialProcessor(1.0), Match(SharedNoise(3)))
    assert_type(drafted.then(coupled).then(Adjust(SharedNoise(3))), Adjusted)
    careful: Rule = Match(SharedNoise(3))  # what any draw is right behind, fresh ones are right behind too
    print(careful)


def of_my_own(scored: Scored) -> Verdict:
    return Verdict(())


def bush(tokens: Tokens) -> Iterator[Proposal]:
    yield Proposal(tokens[-1])
    yield Proposal(tokens[0], parent=-1, chance=0.1)


def trees_go_through_the_same_stages(target: CachedPredictor, state: DecodeState) -> None:
    draft, adjust = Draft(bush, Fixed(3)), Adjust(SharedNoise(3))
    verify = Verify(target, GreedyProcessor(), Match(SharedNoise(3)))
    assert_type(state.then(draft), Drafted)
    assert_type(state.then(draft).then(verify), Verified[Sampling])
    assert_type(state.then(draft).then(verify).then(adjust).then(ending()), DecodeState | Finished)
    assert_type(target((1,), (Proposal(2), Proposal(3, parent=-1))), Tensor)
    assert_type(path_by_path(rows), Predictor)
    assert_type(along_paths(row), Predictor)
    Draft(bush, EGAG())
    Draft(LookupTree(), CostAware(CostMeter()))
    speculative_step(LLMDrafter(target, GreedyProcessor(), Dice(), widths=(2, 2)), target, GreedyProcessor(), Dice())
    step: Step = verified_step(bush, target, GreedyProcessor(), Dice(), Traverse(Dice()))
    noisy: Step = verified_step(bush, target, GreedyProcessor(), SharedNoise(3), Match(SharedNoise(3)))
    print(step, noisy)


def rows(tokens: Tokens, last: int) -> Tensor:
    raise NotImplementedError


def row(tokens: Tokens) -> Tensor:
    raise NotImplementedError


def a_predictor_of_my_own(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
    raise NotImplementedError


def every_certain_drafter_is_a_drafter() -> None:
    certain: CertainDrafter = repeat_last
    drafter: Drafter = certain
    assert_type(as_chain(certain), CertainDrafter)
    one: Proposal[PointMass] = Proposal(3)
    assert_type(chain((1, 2)), tuple[Proposal[PointMass], ...])
    print(drafter, one)


def a_step_cuts_and_says_why(adjusted: Adjusted) -> None:
    assert_type(evolve(adjusted, keep=1), Adjusted)
    assert_type(adjusted.tokens, Tokens)


def public_results(logits: Tensor) -> None:
    model = tiny_llama()
    predictor: Predictor = a_predictor_of_my_own
    assert_type(predictor((1,), ()), Tensor)
    assert_type(start([1], 3), Result[DecodeState, DecodeError])
    assert_type(start([1], 3).unwrap(), DecodeState)
    assert_type(autoregressive_generate([1], model), list[int])
    assert_type(speculative_generate([1], model, model), tuple[list[int], float])
    assert_type(CachedPredictor(model)((1,), ()), Tensor)
    assert_type(GreedyProcessor()(logits), Tensor)
    assert_type(GreedyProcessor().laws((1,), logits), tuple[Distribution, ...])
    assert_type(max_fn(logits), Tensor)
