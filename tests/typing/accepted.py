"""Programs that mypy accepts, with exactly these types: an `Any` that leaked would be noticed here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_type

from attrs import evolve
from returns.functions import tap
from returns.pipeline import flow
from returns.result import Result
from torch import Tensor

from specflow import (
    Adjusted,
    CachedPredictor,
    CertainDrafter,
    Committed,
    DecodeError,
    DecodeState,
    Dice,
    Distribution,
    Drafted,
    DraftedTree,
    Drafter,
    Finished,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    Node,
    Pace,
    PointMass,
    Predictor,
    Proposal,
    SharedNoise,
    Step,
    Tokens,
    TreeDrafter,
    Verified,
    as_tree,
    autoregressive_generate,
    max_fn,
    path_by_path,
    run,
    speculative_generate,
    start,
    unfold,
)
from specflow.stages import (
    Adjust,
    Draft,
    DraftTree,
    MatchSamples,
    PruneCache,
    RejectTokens,
    VerifyTree,
    advance,
    commit,
)
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
    assert_type(flow(state, draft), Drafted)
    assert_type(flow(state, draft, at_most_two, verify), Verified)
    assert_type(flow(state, draft, verify, adjust), Adjusted)
    assert_type(flow(state, draft, verify, adjust, commit, tap(show), prune), Committed)
    assert_type(flow(state, draft, verify, adjust, commit, prune, advance), DecodeState | Finished)
    step: Step = lambda s: flow(s, draft, verify, adjust, commit, tap(show), prune, advance)  # noqa: E731
    assert_type(run(step, state), Finished)
    assert_type(unfold(step, state), Iterator[DecodeState | Finished])
    coupled = Verify(target, MultinomialProcessor(1.0), Match(SharedNoise(3)))
    assert_type(flow(state, draft, coupled, Adjust(SharedNoise(3))), Adjusted)


def bush(tokens: Tokens) -> Iterator[Node]:
    yield Node(tokens[-1])
    yield Node(tokens[0], chance=0.1)


def trees_in_a_row(target: CachedPredictor, state: DecodeState) -> None:
    draft, adjust = DraftTree(bush, Fixed(3)), Adjust(SharedNoise(3))
    verify = VerifyTree(target.read_tree, GreedyProcessor(), SharedNoise(3))
    assert_type(flow(state, draft), DraftedTree)
    assert_type(flow(state, draft, verify), Verified)
    assert_type(flow(state, draft, verify, adjust, commit, tap(show), advance), DecodeState | Finished)
    assert_type(path_by_path(target)((1,), (Node(2),)), Tensor)
    tree: TreeDrafter = as_tree(repeat_last)
    print(tree)


def every_certain_drafter_is_a_drafter() -> None:
    certain: CertainDrafter = repeat_last
    drafter: Drafter = certain
    print(drafter)


def public_results(logits: Tensor) -> None:
    model = tiny_llama()
    assert_type(start([1], 3), Result[DecodeState, DecodeError])
    assert_type(start([1], 3).unwrap(), DecodeState)
    assert_type(autoregressive_generate([1], model), list[int])
    assert_type(speculative_generate([1], model, model), tuple[list[int], float])
    assert_type(CachedPredictor(model)((1,), 1), Tensor)
    assert_type(GreedyProcessor()(logits), Tensor)
    assert_type(GreedyProcessor().laws((1,), logits), tuple[Distribution, ...])
    assert_type(max_fn(logits), Tensor)
