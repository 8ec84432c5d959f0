"""States are values, streams can be left and resumed, and what ends a text ends it at that token."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterable
from itertools import islice, pairwise

import pytest

from specflow import (
    CachedPredictor,
    DecodeError,
    DecodeState,
    Dice,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Step,
    autoregressive_step,
    run,
    speculative_step,
    start,
    unfold,
)
from specflow.loop import once
from specflow.protocols import Limits
from specflow.stages import Observer, unobserved
from specflow.state import Count, Reason, Request, Tally
from tests.toys import disturbed, oracle, tiny_llama

TARGET = tiny_llama(0)
CLOSE = disturbed(TARGET, 1, 0.02)


def close_step(gamma: int = 4, observe: Observer = unobserved) -> Step:
    drafter = LLMDrafter(CachedPredictor(CLOSE), GreedyProcessor(), Dice())
    return speculative_step(drafter, CachedPredictor(TARGET), GreedyProcessor(), Dice(), Fixed(gamma), observe=observe)


def test_states_are_values() -> None:
    state = start([3, 4, 5], 20, [1]).unwrap()
    step = close_step()
    first, again = step(state), step(state)
    assert first == again
    assert hash(first) == hash(again)
    assert pickle.loads(pickle.dumps(first)) == first
    assert state == start([3, 4, 5], 20, [1]).unwrap()


def test_unfold_yields_every_state_and_run_the_last() -> None:
    state = start([3, 4, 5], 20).unwrap()
    outcomes = list(unfold(close_step(), state))
    assert all(isinstance(outcome, DecodeState) for outcome in outcomes[:-1])
    assert outcomes[-1] == run(close_step(), state)
    texts = [outcome.tokens for outcome in outcomes if isinstance(outcome, DecodeState)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(texts))
    assert len(outcomes) < 20


def test_a_text_without_room_finishes_without_a_step() -> None:
    def never(state: DecodeState) -> DecodeState | Finished:
        raise AssertionError("stepped")

    state = start([3], 0).unwrap()
    assert list(unfold(never, state)) == [Finished(state, Reason.LIMIT)]


def test_a_stream_that_was_left_is_resumed_from_its_state() -> None:
    state, step = start([3, 4, 5], 30).unwrap(), close_step()
    *_, left = islice(unfold(step, state), 3)
    assert isinstance(left, DecodeState)
    resumed = run(close_step(), pickle.loads(pickle.dumps(left)))
    assert resumed == run(close_step(), state)


def test_ctrl_c_loses_nothing_that_was_yielded() -> None:
    calls = 0

    def interrupt(_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    state, step = start([3, 4, 5], 30).unwrap(), close_step(observe=interrupt)
    seen: list[DecodeState | Finished] = []
    stream = unfold(step, state)
    seen.append(next(stream))
    seen.append(next(stream))
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    last = seen[-1]
    assert isinstance(last, DecodeState)
    # The same step, with its predictors, goes on as if nothing had happened.
    assert list(run(step, last).state.output) == oracle([3, 4, 5], TARGET, 30)


def test_why_a_text_ended() -> None:
    text = oracle([3, 4, 5], TARGET, 20)
    state = start([3, 4, 5], 20, {text[7]}).unwrap()
    assert run(close_step(), state).reason is Reason.STOP
    assert run(close_step(), start([3, 4, 5], 20).unwrap()).reason is Reason.LIMIT
    at_the_limit = start([3, 4, 5], text.index(text[7]) + 1, {text[7]}).unwrap()
    assert run(close_step(), at_the_limit).reason is Reason.STOP


def test_a_stop_token_in_the_prompt_does_not_end_the_text() -> None:
    assert len(run(close_step(), start([3, 1, 5], 5, [9]).unwrap()).state.output) > 0
    assert list(run(close_step(), start([3, 4, 5], 6, [4]).unwrap()).state.output) == oracle([3, 4, 5], TARGET, 6, {4})


def test_once_takes_the_first_step_of_a_text_only() -> None:
    plain = autoregressive_step(CachedPredictor(TARGET), GreedyProcessor(), Dice())
    outcomes = list(unfold(once(plain, close_step()), start([3, 4, 5], 20).unwrap()))
    first, second = outcomes[0], outcomes[1]
    assert isinstance(first, DecodeState)
    assert isinstance(second, DecodeState)
    assert (first.tally.steps, first.tally.drafted) == (1, 0)
    assert second.tally.drafted == 4


def test_statistics_add_up() -> None:
    end = run(close_step(), start([3, 4, 5], 30).unwrap()).state
    assert len(end.output) == 30
    # Every step emits its accepted drafts and one token, but the last may be cut by the limit.
    assert end.tally.accepted + end.tally.steps - len(end.output) in (0, 1)
    assert end.mean_accepted_length == 30 / end.tally.steps
    assert dict(end.tally.sources)["llm"] == Count(end.tally.drafted, end.tally.accepted)


def test_drafts_behind_a_stop_are_not_counted() -> None:
    text = oracle([3, 4, 5], TARGET, 20)
    drafter = LLMDrafter(CachedPredictor(TARGET), GreedyProcessor(), Dice())
    step = speculative_step(drafter, CachedPredictor(TARGET), GreedyProcessor(), Dice(), Fixed(12))
    stop = next(token for token in text[2:] if text.index(token) >= 2)
    end = run(step, start([3, 4, 5], 20, {stop}).unwrap()).state
    kept = text.index(stop) + 1
    assert len(end.output) == kept
    assert (end.tally.drafted, end.tally.accepted) == (kept, kept)


def test_a_tally_is_a_monoid() -> None:
    a, b, c = (
        Tally(1, (("x", Count(2, 1)),), (1, 1), (1,)),
        Tally(2, (("y", Count(3, 3)),), (1, 1, 1), (1, 1, 1)),
        Tally(0, (("x", Count(1, 0)),), (1,)),
    )
    assert (a + b) + c == a + (b + c) == Tally(3, (("x", Count(3, 1)), ("y", Count(3, 3))), (3, 2, 1), (2, 1, 1))
    assert a + Tally() == a == Tally() + a
    assert (a + b) - a == b
    assert (a + b + c) - (a + b) == c
    assert a - a == Tally()
    other = Tally(0, (("y", Count(1, 0)),))
    longer = Tally(1, judged_at=(1,)), Tally(1, judged_at=(1, 1))
    for less, more in ((Tally(), a), (a, a + c), (a, b), (a, other), longer):
        with pytest.raises(DecodeError):
            _ = less - more
    assert Tally().acceptance_rate == 0.0


def test_a_state_prints_what_it_is() -> None:
    state = DecodeState(Request((3,), 5), (3, 4))
    assert repr(state).startswith("DecodeState(request=Request(prompt=(3,), limit=5")


@pytest.mark.parametrize(
    "ids", [{"a": 4, "b": 5}.values(), {4, 5}, iter([4, 5]), (token for token in (4, 5)), deque([4, 5])]
)
def test_ids_come_in_whatever_can_be_gone_through(ids: Iterable[int]) -> None:
    assert start([1], 3, ids).unwrap().request.stop == {4, 5}


def test_a_text_without_an_end_is_refused_by_the_name_that_was_given() -> None:
    error = start([1, 2], 10**30).failure()
    assert (error.parameter, error.received) == ("max_new_tokens", str(10**30))
    assert start([1, 2], 10**30, limits=Limits(context=9)).unwrap().room == 7
