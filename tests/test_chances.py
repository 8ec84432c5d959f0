"""Cost-aware trees: the number of nodes they choose, and that it never costs much. No real time passes here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specflow import (
    CostAwareTree,
    CostMeter,
    DecodeError,
    DecodeState,
    Dice,
    Finished,
    GreedyProcessor,
    LookupTree,
    Node,
    Tokens,
    TreeDrafter,
    run,
    start,
    tree_step,
    unfold,
)
from specflow.policies import ADVANCE, LOSS, Choice, CostAwareTreePace
from specflow.predictors import path_by_path
from specflow.state import Request
from tests.test_cost_aware import CLIFF, FLAT, STEEP, Hand, curve

MACHINES = {"flat": FLAT, "cliff": CLIFF, "steep": STEEP}
VOCABULARY = 12
NEW = 128


def text(seed: int) -> Tokens:
    random = Random(seed)
    return tuple([random.randrange(VOCABULARY) for _ in range(NEW + 40)])


def drafts(following: Tokens, right: float, said: float, hand: Hand, price: float = 0.0) -> TreeDrafter:
    """Two tokens for each of eight places, the first of which is right as often as `right`, and said to be `said`."""

    def draft(tokens: Tokens) -> Iterator[Node]:
        random = Random(len(tokens))
        tail = following[len(tokens) : len(tokens) + 8]
        firsts = [token if random.random() < right else (token + 1) % VOCABULARY for token in tail]
        for depth, first in enumerate(firsts):
            hand.now += price
            yield Node(first, depth - 1, 0.99 * said ** (depth + 1))
        for depth, first in enumerate(firsts):
            hand.now += price
            yield Node((first + 2) % VOCABULARY, depth - 1, 0.01 * said ** (depth + 9))

    return draft


def decode(machine: str, policy: CostAwareTree, drafter: TreeDrafter, following: Tokens, hand: Hand) -> float:
    """How long the text took behind its first step, in passes over one token. It is looked whether it is the text."""
    costs, meter = curve(MACHINES[machine]), policy.meter

    def rows(tokens: Tokens, last: int) -> Tensor:
        return torch.eye(VOCABULARY)[[following[len(tokens) - i] for i in reversed(range(last))]]

    read = path_by_path(rows)

    def target(tokens: Tokens, nodes: Sequence[Node]) -> Tensor:
        hand.now += costs[len(nodes) + 1]
        return read(tokens, nodes)

    step = tree_step(drafter, meter.timed_tree(target), GreedyProcessor(), Dice(), policy)
    outcomes = unfold(step, start(following[:5], NEW).unwrap())
    next(outcomes)
    began = hand.now
    *_, end = outcomes
    assert isinstance(end, Finished)
    assert end.state.tokens == following[: 5 + NEW]
    return hand.now - began


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("said", "price"), [(0.9, 0.0), (0.5, 0.0), (0.9, 0.2), (0.2, 0.05)])
def test_trees_that_are_always_wrong_cost_no_more_than_a_text_may_lose(machine: str, said: float, price: float) -> None:
    hand = Hand()
    policy = CostAwareTree(CostMeter(hand))
    for seed in range(6):
        following = text(seed)
        took = decode(machine, policy, drafts(following, 0.0, said, hand, price), following, hand)
        # At most what it may lose, and one tree more, which was begun within that.
        assert took <= NEW - 1 + ADVANCE + LOSS * NEW + 1.5


@pytest.mark.parametrize(("machine", "gain"), [("flat", 2.6), ("cliff", 1.9), ("steep", 1.0)])
def test_trees_that_are_mostly_right_pay(machine: str, gain: float) -> None:
    hand = Hand()
    policy = CostAwareTree(CostMeter(hand))
    took = []
    for seed in range(6):
        following = text(seed)
        took.append(decode(machine, policy, drafts(following, 0.8, 0.8, hand), following, hand))
    assert NEW / max(took[1:]) > gain


def promised(costs: Sequence[float], chances: Sequence[float], credit: float) -> int:
    meter = CostMeter()
    for k, seconds in enumerate(costs, start=1):
        meter.note(k, seconds)
        meter.note(k, seconds)
    policy = CostAwareTree(meter, most=len(costs) - 1)
    _, pace = policy(iter(()), DecodeState(Request((1,), 99), (1,)))
    assert isinstance(pace, CostAwareTreePace)
    state = DecodeState(Request((1,), 99), (1, 2), pace._replace(text_lost=-credit))
    stream = iter([Node(i, chance=chance) for i, chance in enumerate(chances)])
    return len(policy(stream, state)[0])


@settings(max_examples=200)
@given(
    st.lists(st.floats(0.5, 4.0), min_size=2, max_size=9),
    st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12).map(lambda chances: sorted(chances, reverse=True)),
)
def test_the_most_tokens_per_second_are_chosen(costs: list[float], chances: list[float]) -> None:
    rates = [(1 + sum(chances[:n])) / costs[n] for n in range(min(len(chances), len(costs) - 1) + 1)]
    n = promised([cost * 1e6 for cost in costs], chances, credit=1e9)
    assert rates[n] == pytest.approx(max(rates))


def test_nothing_is_drafted_before_a_pass_over_one_token_is_known() -> None:
    asked: list[int] = []

    def stream() -> Iterator[Node]:
        asked.append(1)
        yield Node(1)

    told: list[Choice] = []
    state = DecodeState(Request((1,), 99), (1,))
    nodes, pace = CostAwareTree(CostMeter(), tell=told.append)(stream(), state)
    assert nodes == ()
    assert asked == []
    assert told == [Choice(1, 0, 0, (), (), 0.0)]
    assert pace[:2] == (1, 0)


def test_the_pace_tells_what_trees_promised_and_gave() -> None:
    meter = CostMeter()
    for k, seconds in ((1, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)):
        meter.note(k, seconds)
    told: list[Choice] = []
    policy = CostAwareTree(meter, most=2, tell=told.append)
    state = DecodeState(Request((1,), 99), (1,))
    nodes, pace = policy(iter([Node(5, chance=0.5), Node(6, 0, chance=0.25)]), state)
    assert len(nodes) == 2
    grown = DecodeState(state.request, (1, 5, 9), pace)
    _, later = policy(iter([Node(5, chance=0.5)]), grown)
    assert later[4:6] == (0.75, 1)  # promised and given; the bonus token was nobody's promise
    assert told[1].tokens == pytest.approx((1.0, 1.0 + (1 + 4) / (0.75 + 4) * 0.5))
    assert told[1].lost < -0.9


def test_a_meter_notes_the_passes_over_trees_and_not_those_over_prompts() -> None:
    hand = Hand()

    def target(tokens: Tokens, nodes: Sequence[Node]) -> Tensor:
        hand.now += 1 + len(nodes) + (50 if tokens[0] > 1 else 0)
        return torch.zeros(len(nodes) + 1, 4)

    meter = CostMeter(hand)
    read = meter.timed_tree(target)
    tree = (Node(3), Node(4), Node(5, 0))
    assert read((1, 2, 3), tree).shape == (4, 4)
    assert meter.seconds(9) is None
    for tokens, nodes in (((1, 2, 3, 3, 5, 8), ()), ((1, 2, 3, 3, 5, 8, 9), ()), ((1, 2, 3, 3, 5, 8, 9, 1), tree)):
        read(tokens, nodes)
    assert meter.seconds(4) == pytest.approx([1.0, 2.0, 3.0, 4.0])
    for first in (2, 3, 4):  # other texts: their prompts are read
        read((first, 7, 7, 7, 7, 7, 7), ())
    assert meter.seconds(4) == pytest.approx([1.0, 2.0, 3.0, 4.0])


def test_at_least_one_node() -> None:
    with pytest.raises(DecodeError, match="most is below 1"):
        CostAwareTree(CostMeter(), most=0)


def meter_of_tens(clock: Hand) -> CostMeter:
    meter = CostMeter(clock)
    for k in (1, 1, 2, 3, 9):
        meter.note(k, 10.0)
    return meter


def test_the_pace_of_another_instance_is_foreign() -> None:
    one, other = (CostAwareTree(meter_of_tens(Hand())) for _ in range(2))
    state = DecodeState(Request((1,), 99), (1,))
    _, pace = one(iter([Node(5)]), state)
    assert isinstance(pace, CostAwareTreePace)
    later = DecodeState(state.request, (1, 5, 6), pace._replace(text_lost=1e6))
    assert one(iter([Node(5)]), later)[0] == ()  # it has lost too much
    assert len(other(iter([Node(5)]), later)[0]) == 1  # the seconds are another meter's


@pytest.mark.parametrize("number", [float("nan"), float("inf"), None, "a"])
def test_a_pace_with_a_number_that_is_none_is_a_fresh_start(number: float) -> None:
    policy = CostAwareTree(meter_of_tens(Hand()))
    state = DecodeState(Request((1,), 99), (1,))
    _, pace = policy(iter([Node(5)]), state)
    assert isinstance(pace, CostAwareTreePace)
    for name in ("length", "nodes", "drafting", "promised", "text_promised", "text_given", "text_lost"):
        wrong = DecodeState(state.request, (1, 5, 6), pace._replace(**{name: number}))
        assert policy(iter([Node(5)]), wrong)[1][4:7] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("junk", [None, 3, (1, 2), Node(5, chance=float("nan")), Node(5, chance="a")])  # type: ignore[arg-type]
def test_what_a_drafter_says_is_looked_at(junk: Node) -> None:
    with pytest.raises(DecodeError, match=r"Node|chance"):
        CostAwareTree(meter_of_tens(Hand()))(iter([junk]), DecodeState(Request((1,), 99), (1,)))


def test_threads_share_a_policy_and_a_lookup_tree() -> None:
    meter, before = CostMeter(), sys.getswitchinterval()
    drafter, policy = LookupTree(), CostAwareTree(meter)

    def decoded(seed: int) -> bool:
        loop = text(seed)[:9] * 20

        def rows(tokens: Tokens, last: int) -> Tensor:
            return torch.eye(VOCABULARY)[[loop[len(tokens) - i] for i in reversed(range(last))]]

        step = tree_step(drafter, meter.timed_tree(path_by_path(rows)), GreedyProcessor(), Dice(), policy)
        end = run(step, start(loop[:5], NEW).unwrap()).state
        return end.tokens == loop[: 5 + NEW]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(decoded, range(6)))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda: CostAwareTree(None), "meter"),  # type: ignore[arg-type]
        (lambda: CostAwareTree(CostMeter(), 1.0), "most"),  # type: ignore[arg-type]
        (lambda: CostAwareTree(CostMeter(), True), "most"),
        (lambda: CostAwareTree(CostMeter(), 3, "a"), "tell"),  # type: ignore[arg-type]
    ],
)
def test_wrong_parts_are_refused(make: Callable[[], object], parameter: str) -> None:
    with pytest.raises(DecodeError) as refusal:
        make()
    assert refusal.value.parameter == parameter
