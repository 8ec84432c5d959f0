"""Programs that type checkers refuse, with a plugin or without: each ignore is a claim, and an unused one is an error.

It is only type-checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specflow import (
    Adjusted,
    Block,
    Categorical,
    DecodeState,
    Dice,
    Drafted,
    Drafter,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Match,
    PointMass,
    Predictor,
    Proposal,
    Reject,
    Rule,
    Scored,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    Traverse,
    Verdict,
    Verified,
    along_paths,
    longest,
    run,
    seed_coupled_step,
    speculative_step,
    start,
    then,
    verified_step,
)
from specflow.drafters import as_chain
from specflow.lossy import Lossy
from specflow.predictors import path_by_path
from specflow.randomness import Sampling
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
    StopWhen,
    Verify,
    advance,
    commit,
    draft_nothing,
    ending,
)
from specflow.state import CertainDrafter, Committed


def wrong_orders(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, verify = Draft(drafter, Fixed(3)), Verify(target, GreedyProcessor(), Reject(Dice()))
    adjust, prune, end = Adjust(Dice()), PruneCache(()), ending()
    state.then(verify)  # type: ignore[arg-type]
    state.then(adjust)  # type: ignore[arg-type]
    state.then(draft).then(draft)  # type: ignore[arg-type]
    state.then(draft).then(adjust)  # type: ignore[arg-type]
    state.then(draft).then(end)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(draft)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(verify)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(commit)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(end)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(Show())  # type: ignore[arg-type]
    state.then(draft).then(verify).then(adjust).then(adjust)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(adjust).then(prune)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(adjust).then(advance)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(adjust).then(commit).then(end)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(adjust).then(commit).then(draft)  # type: ignore[arg-type]
    state.then(draft).then(verify).then(adjust).then(commit).then(StopWhen(over))  # type: ignore[arg-type]


def wrong_halves(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, score, judge = Draft(drafter), Score(target, GreedyProcessor()), Judge(Reject(Dice()))
    state.then(score)  # type: ignore[arg-type]
    state.then(draft).then(judge)  # type: ignore[arg-type]
    state.then(draft).then(score).then(score)  # type: ignore[arg-type]
    state.then(draft).then(score).then(Adjust(Dice()))  # type: ignore[arg-type]
    state.then(draft).then(score).then(judge).then(judge)  # type: ignore[arg-type]
    state.then(draft).then(score).then(Reject(Dice())).then(Adjust(Dice()))  # type: ignore[attr-defined]


def forgotten_stages(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, verify, adjust = Draft(drafter), Verify(target, GreedyProcessor(), Reject(Dice())), Adjust(Dice())

    def committed(s: DecodeState) -> Committed:
        return s.then(draft).then(verify).then(adjust).then(commit)

    def adjusted(s: DecodeState) -> DecodeState | Finished:
        return s.then(draft).then(verify).then(adjust)  # type: ignore[return-value]

    def unadjusted(s: DecodeState) -> DecodeState | Finished:
        return s.then(draft).then(verify).then(commit).then(advance)  # type: ignore[arg-type]

    def unverified(s: DecodeState) -> DecodeState | Finished:
        return s.then(draft).then(adjust).then(commit).then(advance)  # type: ignore[arg-type]

    half: Step = lambda s: s.then(draft).then(verify).then(adjust).then(commit)  # type: ignore[assignment, return-value]  # noqa: E731
    whole: Step = committed  # type: ignore[assignment]
    run(committed, state)  # type: ignore[arg-type]
    print(half, whole, adjusted, unadjusted, unverified)


def lossy_stages(target: Predictor, drafter: Drafter, state: DecodeState) -> None:
    draft, score, verify = Draft(drafter), Score(target, GreedyProcessor()), Verify(target, GreedyProcessor(), rule())
    adjust, skip, typical = Adjust(Dice()), LossySkipAdjustment(Dice()), LossyJudge(LossyTypical(Dice()))
    state.then(draft).then(verify).then(skip).then(commit)  # type: ignore[attr-defined]
    commit(state.then(draft).then(verify).then(skip))  # type: ignore[arg-type]
    state.then(draft).then(score).then(typical).then(adjust)  # type: ignore[attr-defined]
    adjust(state.then(draft).then(score).then(typical))  # type: ignore[arg-type]
    Judge(LossyTypical(Dice()))  # type: ignore[arg-type]
    Verify(target, GreedyProcessor(), LossyTypical(Dice()))  # type: ignore[arg-type]
    verified_step(drafter, target, GreedyProcessor(), Dice(), LossyTypical(Dice()))  # type: ignore[arg-type]
    LossyJudge(rule())  # type: ignore[arg-type]

    def unadjusted(s: DecodeState) -> Lossy[DecodeState | Finished]:
        return s.then(draft).then(verify).then(skip).map(ending())

    def unmarked(s: DecodeState) -> DecodeState | Finished:
        return s.then(draft).then(verify).then(skip).map(ending())  # type: ignore[return-value]

    def judged(s: DecodeState) -> DecodeState | Finished:
        return s.then(draft).then(score).then(typical).map(adjust).map(ending())  # type: ignore[return-value]

    step: Step = unadjusted  # type: ignore[assignment]
    run(unadjusted, state)  # type: ignore[arg-type]
    print(step, unmarked, judged)


def noise_where_dice_belong(target: Predictor, drafter: Drafter, drafted: Drafted, scored: Scored) -> None:
    greedy, noise = GreedyProcessor(), SharedNoise(1)
    adjust = Adjust(noise)
    drafted.then(Verify(target, greedy, Reject(Dice()))).then(adjust)  # type: ignore[arg-type]
    drafted.then(Verify(target, greedy, Block(Dice()))).then(adjust)  # type: ignore[arg-type]
    drafted.then(Verify(target, greedy, Traverse(Dice()))).then(adjust)  # type: ignore[arg-type]
    scored.then(Judge(Reject(Dice()))).then(adjust)  # type: ignore[arg-type]
    scored.then(Judge(rule())).then(Adjust(noise))  # type: ignore[arg-type]
    drafted.then(Verify(target, greedy, Reject(Dice()))).then(Adjust(sampling()))  # type: ignore[arg-type]
    Reject(noise)  # type: ignore[arg-type]
    Block(noise)  # type: ignore[arg-type]
    Traverse(noise)  # type: ignore[arg-type]
    of_any: Rule[Sampling] = Reject(Dice())  # type: ignore[assignment]
    speculative_step(drafter, target, greedy, noise)  # type: ignore[arg-type]
    verified_step(drafter, target, greedy, noise, Reject(Dice()))  # type: ignore[arg-type]
    print(of_any)


def rule() -> Rule:
    return Reject(Dice())


def sampling() -> Sampling:
    return Dice()


def tokens_added(adjusted: Adjusted, verified: Verified) -> None:
    Adjusted(verified, 3, tokens=(3, 4))  # type: ignore[call-arg]
    adjusted.tokens = (3, 4)  # type: ignore[misc]
    Adjusted(verified, (3, 4))  # type: ignore[arg-type]
    adjusted.then(commit).tokens = (3, 4)  # type: ignore[misc]


def lengths_of_draws(llm: LLMDrafter, suffix: SuffixDrafter) -> None:
    longest(suffix, llm)  # type: ignore[arg-type]
    longest(drawing, suffix)  # type: ignore[arg-type]
    longest(suffix, then(suffix, llm))  # type: ignore[arg-type]
    as_chain(drawing)  # type: ignore[arg-type]
    certain: CertainDrafter = drawing  # type: ignore[assignment]
    print(certain)


def wrong_records(state: DecodeState, adjusted: Adjusted) -> None:
    draft_nothing(adjusted)  # type: ignore[arg-type]
    commit(state)  # type: ignore[arg-type]
    advance(adjusted)  # type: ignore[arg-type]
    adjusted.then(StopWhen(over)).then(StopWhen(over)).then(advance)  # type: ignore[arg-type]
    StopWhen(length)  # type: ignore[arg-type]
    StopWhen(lambda s: len(s.tokens))  # type: ignore[arg-type, return-value]


def over(state: DecodeState) -> bool:
    return len(state.tokens) > 9


def length(state: DecodeState) -> int:
    return len(state.tokens)


def drafter_of_tokens(tokens: Tokens) -> Iterator[int]:
    yield tokens[-1]


def drafter_of_state(state: DecodeState) -> Iterator[Proposal]:
    yield Proposal(state.tokens[-1])


def drawing(tokens: Tokens) -> Iterator[Proposal[Categorical]]:
    raise NotImplementedError


def policy_that_returns_a_number(stream: Iterator[Proposal], state: DecodeState) -> int:
    return 3


def predictor_of_rows(tokens: Tokens, last: int) -> None: ...


def rule_that_returns_a_path(scored: Scored) -> tuple[int, ...]:
    return ()


def rule_of_drafts(drafted: Drafted) -> Verdict:
    return Verdict(())


def wrong_parts(target: Predictor, drafter: Drafter) -> None:
    greedy = GreedyProcessor()
    Draft(drafter_of_tokens)  # type: ignore[arg-type]
    Draft(drafter_of_state)  # type: ignore[arg-type]
    Draft(lambda tokens: iter(()), policy_that_returns_a_number)  # type: ignore[arg-type]
    Score(predictor_of_rows, greedy)  # type: ignore[arg-type]
    Verify(predictor_of_rows, greedy, Match(SharedNoise(1)))  # type: ignore[arg-type]
    Verify(lambda tokens: None, greedy, Match(SharedNoise(1)))  # type: ignore[arg-type, misc]
    Verify(target, 3, Match(SharedNoise(1)))  # type: ignore[arg-type]
    path_by_path(target)  # type: ignore[arg-type]
    along_paths(target)  # type: ignore[arg-type]
    Judge(rule_that_returns_a_path)  # type: ignore[arg-type]
    Judge(rule_of_drafts)  # type: ignore[arg-type]
    Match(3)  # type: ignore[arg-type]
    seed_coupled_step(drafter, target, greedy, 3)  # type: ignore[arg-type]


def wrong_proposals() -> None:
    Proposal(1, "draft")  # type: ignore[type-var]
    Proposal(1, PointMass(1), "draft")  # type: ignore[arg-type]
    certain: Proposal[PointMass] = proposal()  # type: ignore[assignment]
    print(certain)


def proposal() -> Proposal:
    return Proposal(1)


def values_do_not_change(state: DecodeState, drafted: Drafted, verified: Verified, committed: Committed) -> None:
    state.tokens = ()  # type: ignore[misc]
    drafted.proposals = ()  # type: ignore[misc]
    verified.path = ()  # type: ignore[misc]
    verified.accepted = 0  # type: ignore[misc]
    committed.reason = None  # type: ignore[misc]


def results_are_not_states() -> None:
    run(lambda state: state, start([1], 3))  # type: ignore[arg-type]
    start([1], 3).then(draft_nothing)  # type: ignore[attr-defined]
    text: str = start([1], 3).unwrap()  # type: ignore[assignment]
    print(text)


def predict(tokens: Tokens, drafts: Sequence[Proposal]) -> list[float]:
    return [0.0]


def a_predictor_returns_a_tensor() -> None:
    predictor: Predictor = predict  # type: ignore[assignment]
    print(predictor)
