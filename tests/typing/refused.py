"""Programs that mypy refuses. It is only type-checked: each ignore is a claim, and an unused one is an error."""

from __future__ import annotations

from collections.abc import Iterator

from returns.functions import tap
from returns.pipeline import flow

from specflow import (
    EGAG,
    Adjusted,
    CachedPredictor,
    Categorical,
    Committed,
    DecodeState,
    Dice,
    Drafted,
    Drafter,
    Fixed,
    GreedyProcessor,
    Node,
    PointMass,
    Predictor,
    Proposal,
    SharedNoise,
    Step,
    Tokens,
    Verified,
    as_tree,
    run,
    start,
)
from specflow.stages import (
    Adjust,
    Draft,
    DraftTree,
    MatchSamples,
    PruneCache,
    RejectTokens,
    Show,
    StopWhen,
    VerifyTree,
    advance,
    commit,
    draft_nothing,
)


def wrong_orders(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, verify = Draft(drafter, Fixed(3)), Verify(target, GreedyProcessor(), Reject(Dice()))
    adjust, prune = Adjust(Dice()), PruneCache(())
    flow(state, verify, draft, adjust, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, adjust, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, verify, commit, advance)  # type: ignore[arg-type]
    flow(state, draft, draft, verify)  # type: ignore[arg-type]
    flow(state, draft, verify, adjust, prune, commit)  # type: ignore[arg-type]
    flow(state, draft, verify, adjust, advance)  # type: ignore[arg-type]
    flow(state, draft, verify, tap(Show()), adjust)  # type: ignore[arg-type]
    half: Step = lambda s: flow(s, draft, verify, adjust, commit)  # type: ignore[assignment, return-value]  # noqa: E731
    run(half, state)


def wrong_records(state: DecodeState, adjusted: Adjusted) -> None:
    draft_nothing(adjusted)  # type: ignore[arg-type]
    commit(state)  # type: ignore[arg-type]
    advance(adjusted)  # type: ignore[arg-type]
    StopWhen(lambda s: len(s.tokens))  # type: ignore[arg-type, return-value]


def drafter_of_tokens(tokens: Tokens) -> Iterator[int]:
    yield tokens[-1]


def drafter_of_state(state: DecodeState) -> Iterator[Proposal]:
    yield Proposal(state.tokens[-1])


def policy_that_returns_a_number(stream: Iterator[Proposal], state: DecodeState) -> int:
    return 3


def wrong_parts(target: Predictor) -> None:
    Draft(drafter_of_tokens)  # type: ignore[arg-type]
    Draft(drafter_of_state)  # type: ignore[arg-type]
    Draft(lambda tokens: iter(()), policy_that_returns_a_number)  # type: ignore[arg-type]
    Verify(target, GreedyProcessor(), Reject(SharedNoise(1)))  # type: ignore[arg-type]
    Verify(lambda tokens: None, GreedyProcessor(), Match(SharedNoise(1)))  # type: ignore[arg-type, misc]


def bush(tokens: Tokens) -> Iterator[Node]:
    yield Node(tokens[-1])


def drawn(tokens: Tokens) -> Iterator[Proposal[Categorical]]:
    raise NotImplementedError


def trees_are_not_chains(target: CachedPredictor, chain: Drafter, state: DecodeState) -> None:
    reject = Verify(target, GreedyProcessor(), Reject(Dice()))
    verify = VerifyTree(target.read_tree, GreedyProcessor(), Dice())
    flow(state, DraftTree(bush), reject)  # type: ignore[arg-type]
    flow(state, Draft(chain), verify)  # type: ignore[arg-type]
    DraftTree(chain)  # type: ignore[arg-type]
    Draft(bush)  # type: ignore[arg-type]
    DraftTree(bush, EGAG())  # type: ignore[arg-type]
    VerifyTree(target, GreedyProcessor(), Dice())  # type: ignore[arg-type]
    as_tree(drawn)  # type: ignore[arg-type]


def values_do_not_change(state: DecodeState, drafted: Drafted, verified: Verified, committed: Committed) -> None:
    state.tokens = ()  # type: ignore[misc]
    drafted.proposals = ()  # type: ignore[misc]
    verified.accepted = 0  # type: ignore[misc]
    committed.reason = None  # type: ignore[misc]


def results_are_not_states() -> None:
    run(lambda state: state, start([1], 3))  # type: ignore[arg-type]
    text: str = start([1], 3).unwrap()  # type: ignore[assignment]
    print(text)
