"""Cost-aware trees: the number of drafts they choose, and that it never costs much. No real time passes here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import isfinite
from random import Random

import numpy
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specflow import (
    TEXT,
    Categorical,
    CostAware,
    CostMeter,
    DecodeError,
    DecodeState,
    Dice,
    Drafter,
    Finished,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    PointMass,
    Proposal,
    Step,
    SuffixDrafter,
    Tokens,
    run,
    speculative_step,
    start,
    then,
    unfold,
)
from specflow.drafters import as_chain, propose_nothing
from specflow.policies import Choice
from specflow.policies.chances import ChancesPace
from specflow.policies.choice import ADVANCE, LOSS
from specflow.policies.cost import CostAwarePace
from specflow.predictors import path_by_path
from specflow.state import Pace, Request
from specflow.testing import CASES, Case, TableModel, World, certify
from tests.test_cost_aware import CLIFF, FLAT, STEEP, Hand, curve, timed_meter

MACHINES = {"flat": FLAT, "cliff": CLIFF, "steep": STEEP}
VOCABULARY = 12
NEW = 128
STATE = DecodeState(Request((1,), 99), (1,))
LATER = DecodeState(Request((1,), 99), (1, 2))
"""Where the prompt was read."""


def text(seed: int) -> Tokens:
    random = Random(seed)
    return tuple([random.randrange(VOCABULARY) for _ in range(NEW + 40)])


def tree_of(following: Tokens, right: float, said: float, hand: Hand, price: float = 0.0) -> Drafter:
    """Two tokens for each of eight places, the first of which is right as often as `right`, and said to be `said`."""

    def draft(tokens: Tokens) -> Iterator[Proposal]:
        random = Random(len(tokens))
        tail = following[len(tokens) : len(tokens) + 8]
        firsts = [token if random.random() < right else (token + 1) % VOCABULARY for token in tail]
        for depth, first in enumerate(firsts):
            hand.now += price
            yield Proposal(first, parent=depth - 1, chance=0.99 * said ** (depth + 1))
        for depth, first in enumerate(firsts):
            hand.now += price
            yield Proposal((first + 2) % VOCABULARY, parent=depth - 1, chance=0.01 * said ** (depth + 9))

    return draft


def drawn(drafter: Drafter, following: Tokens) -> Drafter:
    """The same drafts, as if each were drawn: from a law of all tokens but the right one, or of the right one too."""

    def draft(tokens: Tokens) -> Iterator[Proposal]:
        for proposal in drafter(tokens):
            law = torch.ones(VOCABULARY, dtype=torch.float64)
            if proposal.token not in following[len(tokens) : len(tokens) + 8]:
                law[following[len(tokens)]] = 0.0
            law[proposal.token] = 1.0
            yield evolve(proposal, q=Categorical(law / law.sum()))

    return draft


def without_chances(drafter: Drafter) -> Drafter:
    return lambda tokens: (evolve(draft, chance=None) for draft in drafter(tokens))


def decode(machine: str, policy: CostAware, drafter: Drafter, following: Tokens, hand: Hand) -> float:
    """How long the text took behind its first step, in passes over one token. It is looked whether it is the text."""
    costs, meter = curve(MACHINES[machine]), policy.meter

    def rows(tokens: Tokens, last: int) -> Tensor:
        return torch.eye(VOCABULARY)[[following[len(tokens) - i] for i in reversed(range(last))]]

    read = path_by_path(rows)

    def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        hand.now += costs[len(drafts) + 1]
        return read(tokens, drafts)

    step = speculative_step(drafter, meter.timed(target), GreedyProcessor(), Dice(), policy)
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
    policy = CostAware(CostMeter(hand))
    for seed in range(6):
        following = text(seed)
        took = decode(machine, policy, tree_of(following, 0.0, said, hand, price), following, hand)
        # At most what it may lose, and one tree more, which was begun within that.
        assert took <= NEW - 1 + ADVANCE + LOSS * NEW + 1.5


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("price", [0.0, 0.2])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("certain", [True, False])
def test_whatever_trees_tell_and_however_they_come_they_cost_no_more(
    machine: str, price: float, told: bool, certain: bool
) -> None:
    hand = Hand()
    policy = CostAware(CostMeter(hand))
    for seed in range(4):
        following = text(seed)
        drafter = tree_of(following, 0.0, 0.9, hand, price)
        drafter = drafter if told else without_chances(drafter)
        drafter = drafter if certain else drawn(drafter, following)
        took = decode(machine, policy, drafter, following, hand)
        assert took <= NEW - 1 + ADVANCE + LOSS * NEW + 1.5


@pytest.mark.parametrize(("machine", "gain"), [("flat", 2.6), ("cliff", 1.9), ("steep", 1.0)])
def test_trees_that_are_mostly_right_pay(machine: str, gain: float) -> None:
    hand = Hand()
    policy = CostAware(CostMeter(hand))
    took = []
    for seed in range(6):
        following = text(seed)
        took.append(decode(machine, policy, tree_of(following, 0.8, 0.8, hand), following, hand))
    assert NEW / max(took[1:]) > gain


@pytest.mark.parametrize(("machine", "gain"), [("flat", 2.2), ("cliff", 1.6)])
@pytest.mark.parametrize("certain", [True, False])
def test_trees_of_which_nothing_is_told_pay_too(machine: str, gain: float, certain: bool) -> None:
    hand = Hand()
    policy = CostAware(CostMeter(hand))
    took = []
    for seed in range(6):
        following = text(seed)
        drafter = without_chances(tree_of(following, 0.8, 0.8, hand))
        drafter = drafter if certain else drawn(drafter, following)
        took.append(decode(machine, policy, drafter, following, hand))
    assert NEW / max(took[1:]) > gain


def told(meter: CostMeter, most: int = 16, tell: Callable[[Choice], object] = lambda choice: None) -> CostAware:
    """A policy that has heard of chances, before anything else."""
    policy = CostAware(meter, most, tell)
    _, pace = policy(iter([Proposal(5, chance=0.5)]), STATE)
    assert isinstance(pace, ChancesPace)
    return policy


def promised(costs: Sequence[float], chances: Sequence[float], credit: float) -> int:
    meter = CostMeter()
    policy = told(meter, most=len(costs) - 1)
    for k, seconds in reversed([*enumerate(costs, start=1)]):  # a pass over one token last: it is what is known best
        meter.note(k, seconds)
        meter.note(k, seconds)
    _, pace = policy(iter(()), STATE)
    assert isinstance(pace, ChancesPace)
    state = DecodeState(Request((1,), 99), (1, 2), pace._replace(text_lost=-credit))
    stream = iter([Proposal(i, parent=TEXT, chance=chance) for i, chance in enumerate(chances)])
    return len(policy(stream, state)[0])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0.5, 4.0), min_size=2, max_size=9),
    st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12).map(lambda chances: sorted(chances, reverse=True)),
)
def test_the_most_tokens_per_second_are_chosen(costs: list[float], chances: list[float]) -> None:
    rates = [(1 + sum(chances[:n])) / costs[n] for n in range(min(len(chances), len(costs) - 1) + 1)]
    n = promised([cost * 1e6 for cost in costs], chances, credit=1e9)
    assert rates[n] == pytest.approx(max(rates))


def test_nothing_is_drafted_before_a_pass_over_one_token_is_known() -> None:
    """Where chances are told; of a drafter that was never heard, one draft is asked for while the prompt is read."""
    asked: list[int] = []

    def stream() -> Iterator[Proposal]:
        while True:
            asked.append(1)
            yield Proposal(1, chance=0.9)

    choices: list[Choice] = []
    policy = CostAware(CostMeter(), tell=choices.append)
    drafts, pace = policy(stream(), STATE)
    assert drafts == ()
    assert asked == [1]
    assert choices == [Choice(1, 1, 0, (), (), 0.0)]
    for state in (STATE, evolve(STATE, tokens=(1, 2), pace=pace)):
        drafts, after = policy(stream(), state)
        assert drafts == ()
        assert asked == [1]
        assert choices[-1] == Choice(len(state.tokens), 0, 0, (), (), 0.0)
        assert after[:2] == (len(state.tokens), 0)


@pytest.mark.parametrize("chance", [1.0, None])
def test_while_the_prompt_is_read_only_what_was_drawn_is_taken(chance: float | None) -> None:
    """A tree costs a whole pass more there, and what a longer prompt costs no pass tells."""
    law = Categorical(torch.full((9,), 1 / 9))
    for drawn in (False, True):
        drafts = [Proposal(token, law, chance=chance) if drawn else Proposal(token, chance=chance) for token in (5, 6)]
        policy = CostAware(meter_of_tens(Hand()))
        for text in range(2):  # the second meets a policy that knows the drafter
            taken, pace = policy(iter(drafts), STATE)
            assert len(taken) == (drawn and not (text and chance))
            assert len(policy(iter(drafts), evolve(LATER, pace=pace))[0]) == 2


def test_the_pace_tells_what_trees_promised_and_gave() -> None:
    meter = CostMeter()
    choices: list[Choice] = []
    policy = told(meter, 2, choices.append)
    for k, seconds in ((1, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)):
        meter.note(k, seconds)
    drafts, pace = policy(iter([Proposal(5, chance=0.5), Proposal(6, parent=0, chance=0.25)]), LATER)
    assert len(drafts) == 2
    grown = evolve(LATER, tokens=(1, 2, 5, 9), pace=pace)
    _, later = policy(iter([Proposal(5, chance=0.5)]), grown)
    assert later[4:6] == (0.75, 1)  # promised and given; the bonus token was nobody's promise
    assert choices[2].tokens == pytest.approx((1.0, 1.0 + (1 + 4) / (0.75 + 4) * 0.5))
    assert choices[2].lost < -0.9


def test_a_meter_notes_the_passes_over_trees_and_not_those_over_prompts() -> None:
    hand = Hand()

    def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        hand.now += 1 + len(drafts) + (50 if tokens[0] > 1 else 0)
        return torch.zeros(len(drafts) + 1, 4)

    meter = CostMeter(hand)
    read = meter.timed(target)
    tree = (Proposal(3), Proposal(4, parent=TEXT), Proposal(5, parent=0))
    assert read((1, 2, 3), tree).shape == (4, 4)
    assert meter.seconds(9) is None
    for tokens, drafts in (((1, 2, 3, 3, 5, 8), ()), ((1, 2, 3, 3, 5, 8, 9), ()), ((1, 2, 3, 3, 5, 8, 9, 1), tree)):
        read(tokens, drafts)
    assert meter.seconds(4) == pytest.approx([1.0, 2.0, 3.0, 4.0])
    for first in (2, 3, 4):  # other texts: their prompts are read
        read((first, 7, 7, 7, 7, 7, 7), ())
    assert meter.seconds(4) == pytest.approx([1.0, 2.0, 3.0, 4.0])


def test_at_least_one_draft() -> None:
    with pytest.raises(DecodeError, match="most is below 1"):
        CostAware(CostMeter(), most=0)


def meter_of_tens(clock: Hand) -> CostMeter:
    meter = CostMeter(clock)
    for k in (1, 1, 2, 3, 9):
        meter.note(k, 10.0)
    return meter


def sure(token: int = 5) -> Iterator[Proposal]:
    return iter([Proposal(token, chance=1.0)])


def test_the_pace_of_another_instance_is_foreign() -> None:
    one, other = (CostAware(meter_of_tens(Hand())) for _ in range(2))
    _, pace = one(sure(), STATE)
    assert isinstance(pace, ChancesPace)
    later = evolve(STATE, tokens=(1, 5, 6), pace=pace._replace(text_lost=1e6))
    assert one(sure(), later)[0] == ()  # it has lost too much
    assert len(other(sure(), later)[0]) == 1  # the seconds are another meter's


@pytest.mark.parametrize("number", [float("nan"), float("inf"), None, "a"])
def test_a_pace_with_a_number_that_is_none_is_a_fresh_start(number: float) -> None:
    policy = CostAware(meter_of_tens(Hand()))
    _, pace = policy(sure(), STATE)
    assert isinstance(pace, ChancesPace)
    for name in ("length", "gamma", "drafting", "promised", "text_promised", "text_given", "text_lost"):
        wrong = evolve(STATE, tokens=(1, 5, 6), pace=pace._replace(**{name: number}))
        assert policy(sure(), wrong)[1][4:7] == (0.0, 0.0, 0.0)


NO_CHANCES = (Proposal(5, chance=float("nan")), Proposal(5, chance="a"))  # type: ignore[arg-type]


@pytest.mark.parametrize("junk", [None, 3, (1, 2), *NO_CHANCES])
def test_what_a_drafter_says_is_looked_at(junk: Proposal) -> None:
    for before in ([], [Proposal(5, chance=1.0)]):
        with pytest.raises(DecodeError, match=r"Proposal|chance"):
            CostAware(meter_of_tens(Hand()))(iter([*before, junk]), LATER)


def test_threads_share_a_policy_and_a_lookup_tree() -> None:
    meter, before = CostMeter(), sys.getswitchinterval()
    drafter, policy = LookupTree(), CostAware(meter)

    def decoded(seed: int) -> bool:
        loop = text(seed)[:9] * 20

        def rows(tokens: Tokens, last: int) -> Tensor:
            return torch.eye(VOCABULARY)[[loop[len(tokens) - i] for i in reversed(range(last))]]

        step = speculative_step(drafter, meter.timed(path_by_path(rows)), GreedyProcessor(), Dice(), policy)
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
        (lambda: CostAware(None), "meter"),  # type: ignore[arg-type]
        (lambda: CostAware(CostMeter(), 1.0), "most"),  # type: ignore[arg-type]
        (lambda: CostAware(CostMeter(), True), "most"),
        (lambda: CostAware(CostMeter(), 3, "a"), "tell"),  # type: ignore[arg-type]
    ],
)
def test_wrong_parts_are_refused(make: Callable[[], object], parameter: str) -> None:
    with pytest.raises(DecodeError) as refusal:
        make()
    assert refusal.value.parameter == parameter


# Which drafters are paced by chances, and what a draft promises that tells none.


MODEL = TableModel(VOCABULARY, 1)
LOOP = (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)


@pytest.mark.parametrize(
    ("drafter", "kind"),
    [
        (LookupTree(), ChancesPace),
        (as_chain(LookupTree()), ChancesPace),
        (LLMDrafter(MODEL, GreedyProcessor(), Dice(), widths=(2,)), ChancesPace),
        (then(SuffixDrafter(most=1), LLMDrafter(MODEL, GreedyProcessor(), Dice(), widths=(2,))), ChancesPace),
        (SuffixDrafter(), CostAwarePace),
        (LLMDrafter(MODEL, GreedyProcessor(), Dice()), CostAwarePace),
        (lambda tokens: iter([Proposal(5, parent=TEXT), Proposal(6, parent=0)]), CostAwarePace),  # a chain in words
        (propose_nothing, CostAwarePace),
    ],
)
def test_trees_and_what_tells_its_chances_are_paced_by_chances(drafter: Drafter, kind: type[Pace]) -> None:
    policy = CostAware(meter_of_tens(Hand()))
    assert type(policy(drafter(LOOP), evolve(STATE, tokens=LOOP))[1]) is kind


def test_a_drafter_that_is_silent_at_first_is_heard_when_it_speaks() -> None:
    hand = Hand()
    policy = CostAware(meter_of_tens(hand))
    state = STATE
    for token in (2, 3, 4, 5):
        _, pace = policy(propose_nothing(state.tokens), state)
        assert isinstance(pace, CostAwarePace)
        state = evolve(state, tokens=(*state.tokens, token), pace=pace)
    bush = [Proposal(7, chance=0.6), Proposal(8, parent=TEXT, chance=0.4), Proposal(9, parent=TEXT, chance=0.3)]
    drafts, pace = policy(iter(bush), state)
    assert isinstance(pace, ChancesPace)
    assert len(drafts) == 3  # by its chances at once: as a chain with these it would be short


@pytest.mark.parametrize(("machine", "gain"), [("flat", 3.2), ("cliff", 2.7), ("steep", 1.2)])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("silence", [1, 9])
@pytest.mark.parametrize("price", [0.0, 0.2])
def test_a_drafter_whose_first_drafts_of_a_text_are_empty_is_paced_as_any_other(
    machine: str, gain: float, told: bool, silence: int, price: float
) -> None:
    """A tree that tells its chances, and a chain of which nothing is known. Its silence may take time."""
    hand = Hand()
    choices: list[Choice] = []
    policy = CostAware(CostMeter(hand), tell=choices.append)
    took = []
    for seed in range(6):
        following = text(seed)
        tree = tree_of(following, 0.9, 0.9, hand)

        def late(tokens: Tokens, tree: Drafter = tree, following: Tokens = following) -> Iterator[Proposal]:
            if len(tokens) < 5 + silence:
                hand.now += price
                return iter(())
            return tree(tokens) if told else map(Proposal, following[len(tokens) : len(tokens) + 6])

        took.append(decode(machine, policy, late, following, hand))
        assert all(0.5 <= seconds <= 12.0 for choice in choices for seconds in choice.seconds)
        assert all(isfinite(choice.lost) for choice in choices)
        assert {choice.gamma for choice in choices if choice.position < 5 + silence} == {0}
        choices.clear()
    assert NEW / max(took[1:]) > gain
    _, pace = policy(iter(()), STATE)
    assert type(pace) is (ChancesPace if told else CostAwarePace)
    assert all(isfinite(number) for number in pace)


def test_a_drafter_that_is_silent_and_slow_is_not_asked_for_ever() -> None:
    hand, asked = Hand(), [0]

    def slow(tokens: Tokens) -> Iterator[Proposal]:
        hand.now += 0.5
        asked[0] += 1
        yield from ()

    policy = CostAware(CostMeter(hand))
    following = text(0)
    took = decode("flat", policy, slow, following, hand)
    assert took <= NEW - 1 + 1 + 0.015 * NEW + 1
    assert 1 < asked[0] < 10


def test_what_a_text_lost_before_a_tree_was_heard_of_is_not_forgotten() -> None:
    """A chain that is always wrong, and then a tree."""
    hand = Hand()
    choices: list[Choice] = []
    policy = CostAware(meter_of_tens(hand), tell=choices.append)
    state = STATE
    for _ in range(3):
        _, pace = policy(iter([Proposal(7), Proposal(8)]), state)
        hand.now += 4.0
        state = evolve(state, tokens=(*state.tokens, 2), pace=pace)
    lost = choices[-1].lost
    other = state  # another text, whose turn comes later
    _, pace = policy(iter([Proposal(7), Proposal(8, parent=TEXT)]), state)
    assert isinstance(pace, ChancesPace)
    assert choices[-1].lost == pace.text_lost >= lost
    assert isinstance(other.pace, CostAwarePace)
    policy(iter([Proposal(7)]), other)
    assert choices[-1].lost == other.pace.lost > 0
    free = CostAware(meter_of_tens(hand), tell=choices.append)
    free(iter([Proposal(7), Proposal(8, parent=TEXT)]), STATE)
    assert choices[-1].lost == 0.0


def tokens_promised(*drafts: Proposal) -> tuple[float, ...]:
    choices: list[Choice] = []
    meter = CostMeter(Hand())
    policy = told(meter, tell=choices.append)
    for k in (1, 1, 17):
        meter.note(k, 1.0)
    policy(iter(drafts), LATER)
    return choices[-1].tokens


def test_a_draft_that_tells_no_chance_has_a_share_of_what_is_left_to_it() -> None:
    """0.6 of what its parent and the siblings before it leave."""
    drafts = (
        Proposal(5),
        Proposal(6),  # behind 5
        Proposal(7, parent=TEXT),
        Proposal(8, parent=2, chance=0.1),
        Proposal(9, parent=2),
        Proposal(5, parent=TEXT),
        Proposal(4),  # behind that
    )
    chances = (0.6, 0.36, 0.6 * 0.4, 0.1, 0.6 * 0.14, 0.6 * 0.16, 0.6 * 0.6 * 0.16)
    sums = [1 + sum(chances[:n]) for n in range(8)]
    assert tokens_promised(*drafts) == pytest.approx(sums)


def test_a_chance_is_a_probability_whatever_a_drafter_says() -> None:
    said = (Proposal(5, chance=7.0), Proposal(6, parent=TEXT, chance=1e308), Proposal(7, parent=TEXT, chance=-3.0))
    assert tokens_promised(*said, Proposal(8, parent=0, chance=0.5)) == (1.0, 2.0, 3.0, 3.0)  # there it is left


# What is drawn is taken.


def uncertain(chances: Sequence[float | None], tokens: Sequence[int], pulled: list[int]) -> Iterator[Proposal]:
    law = Categorical(torch.full((10,), 0.1))
    for token, chance in zip(tokens, chances, strict=True):
        pulled.append(token)
        yield Proposal(token, law, parent=TEXT, source="spread", chance=chance)


def test_what_is_drawn_is_taken_even_if_it_turned_out_dear() -> None:
    """Whatever the clock says, and whatever a draft says of its chance."""
    random = Random(2)
    policy = CostAware(CostMeter(random.random))
    target = policy.meter.timed(lambda tokens, drafts: torch.empty(0))
    state, gammas = evolve(STATE, request=Request((1,), 2000)), set()
    for _ in range(400):
        pulled: list[int] = []
        chances = [random.choice([None, random.random() ** 2]) for _ in range(16)]
        drafts, pace = policy(uncertain(chances, [7] * 16, pulled), state)
        assert [draft.token for draft in drafts] == pulled
        gammas.add(len(pulled))
        target(state.tokens, drafts)
        state = DecodeState(state.request, (*state.tokens, *pulled[: random.randrange(3)], 5), pace)
    assert isinstance(state.pace, ChancesPace)
    assert len(gammas) > 3


def kept(chances: Sequence[float | None], tokens: Sequence[int]) -> list[int]:
    """What a policy takes of drawn drafts in its third step, which has to be what it pulled."""
    policy, state = told(CostMeter(Hand()), most=12), STATE
    for k in (1, 1, 2, 13):
        policy.meter.note(k, 1.0 + k / 40)
    for _ in range(2):
        drafts, pace = policy(uncertain([0.7, 0.5], [7, 7], []), state)
        state = evolve(STATE, tokens=(*state.tokens, 7, 5), pace=pace)
    pulled: list[int] = []
    drafts, _ = policy(uncertain(chances, tokens, pulled), state)
    assert [draft.token for draft in drafts] == pulled
    return pulled


@pytest.mark.parametrize("chances", [[0.9**n for n in range(1, 17)], [0.6**n for n in range(1, 17)], [None] * 16])
def test_whether_a_draft_is_drawn_is_decided_by_those_before_it(chances: list[float | None]) -> None:
    gamma = len(kept(chances, [7] * 16))
    assert 1 < gamma < 16
    for n in range(gamma):
        for token, chance in ((7, 0.0), (3, 1.0), (9, None), (2, 0.01)):
            others = [*chances[:n], chance, *chances[n + 1 :]]
            assert kept(others, [*[7] * n, token, *[7] * (15 - n)])[: n + 1] == [*[7] * n, token]


def telling(drafter: Drafter) -> Drafter:
    """Tells a chance for some tokens and none for others: what is heard depends on what was drawn."""

    def draft(tokens: Tokens) -> Iterator[Proposal]:
        for proposal in drafter(tokens):
            yield evolve(proposal, chance=(0.9, None, 0.05, None)[proposal.token])

    return draft


FEW = tuple(case for case in CASES if case.vocab_size < 4 and case.new_tokens < 4)
SMALL = (
    Case(2, (0,), 3, seed=15),
    Case(3, (2,), 3, seed=1),
    Case(3, (0, 1), 3, frozenset({2}), seed=2),
)


@pytest.mark.parametrize("notes", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", [(), (2,)])
def test_the_law_of_the_text_is_the_targets_whatever_drafts_tell(
    notes: int, seed: int, widths: tuple[int, ...]
) -> None:
    """On every branch, whether the costs are known at first or not, and with a clock that makes γ jump."""

    def compose(world: World) -> Step:
        meter = CostMeter(Random(seed).random)
        for k in (1, 1, 2, 3, 4)[: 0 if notes == 0 else 2 if notes == 1 else 5]:
            meter.note(k, 0.5 + k / 16)
        drafter = telling(LLMDrafter(world.drafter, world.processor, world.rng, widths=widths))
        target = meter.timed(world.target)
        return speculative_step(drafter, target, world.processor, world.rng, CostAware(meter, 3))

    certificate = certify(compose, cases=SMALL if widths else FEW)
    assert certificate.length > 1.05


def test_certain_drafts_behind_drawn_ones_are_taken_as_they_promise() -> None:
    law = Categorical(torch.full((10,), 0.1))
    drafts = (Proposal(5, law, chance=0.9), Proposal(6, chance=0.8), Proposal(7, chance=0.01), Proposal(8, chance=0.01))
    meter = CostMeter(Hand())
    policy = told(meter)
    for k, seconds in ((1, 1.0), (1, 1.0), (2, 1.1), (3, 1.2), (4, 2.0), (5, 3.0)):
        meter.note(k, seconds)
    took, _ = policy(iter(drafts), LATER)
    assert [draft.token for draft in took] == [5, 6]
    later = (*drafts[:3], Proposal(8, law, chance=0.01))
    assert [draft.token for draft in policy(iter(later), LATER)[0]][:2] == [5, 6]
    assert isinstance(took[1].q, PointMass)


def test_a_length_that_is_forgotten_while_a_tree_is_drafted_does_no_harm() -> None:
    """Another text's passes, while the drafter works, on the meter that both share."""
    meter = CostMeter(lambda: 0.0)
    for k in (1, 1, 9, 9):
        meter.note(k, 1.0)

    def stream() -> Iterator[Proposal]:
        yield from (Proposal(5), Proposal(6), Proposal(7))
        for _ in range(256):
            meter.note(1, 1.0)
        yield Proposal(8, parent=TEXT)

    drafts, _ = CostAware(meter)(stream(), DecodeState(Request((1,), 99), (1, 2)))
    assert len(drafts) <= 4


@pytest.mark.parametrize("kind", [float, numpy.float16, numpy.float32, Fraction])
def test_a_pace_goes_on_from_chances_of_any_kind_of_number(kind: Callable[[float], float]) -> None:
    """One that is no float of Python's would be a fresh start: what the text lost before would not count."""
    policy = CostAware(timed_meter(Hand()), 8)
    state = LATER
    for step in range(3):
        drafts, pace = policy(iter([Proposal(5, chance=kind(0.5)), Proposal(6, chance=kind(0.25))]), state)
        assert len(drafts) == 2
        assert isinstance(pace, ChancesPace)
        assert pace.text_promised == 0.75 * step
        assert {*map(type, pace)} <= {int, float}
        state = DecodeState(state.request, (*state.tokens, 5), pace)
