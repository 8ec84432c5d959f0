"""What a text can lose to drafts on a machine that nothing is known of: the first passes over several tokens included.

No real time passes here, and no model runs: a machine is what its passes take, a drafter is how often it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import final

import pytest
import torch
from attrs import define, frozen
from torch import Tensor

from specflow import CostAware, CostMeter, DecodeState, Proposal, Tokens
from specflow.state import Request, parents_of
from specflow.trees import path_along

NEW = 128
"""How many tokens a text has."""

PROMPT: Tokens = tuple(range(2000, 2011))

MACHINES: Mapping[str, Callable[[int], float]] = {
    "flat": lambda k: 1 + 0.01 * (k - 1),
    "cliff": lambda k: {1: 1.0, 2: 1.6, 3: 1.9, 4: 1.4}.get(k, 1.3 + 0.02 * k),
    "steep": lambda k: 1 + 0.5 * (k - 1),
    "each token as dear as a pass": float,
    "a second token is dear, and the others cost nothing": lambda k: 1.0 if k == 1 else 2.5,
    "worse than pass by pass": lambda k: 1.0 if k == 1 else 1.0 + 1.2 * (k - 1),
    "a wall after four": lambda k: 1.02 if 1 < k <= 4 else 1.0 if k == 1 else 4.0,
    "a wall after eight": lambda k: 1.0 + 0.01 * k if k <= 8 else 6.0,
    "stairs": lambda k: 1.0 + 0.7 * ((k - 1) // 4),
}
"""What a pass over k tokens takes, in passes over one."""


@final
@define
class Hand:
    """A clock that moves only when somebody works."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


Offer = Callable[[Tokens, Random], Iterator[Proposal]]
"""(what comes next in the text, chance) → drafts."""


def chain_right(share: float) -> Offer:
    """A chain of certain drafts, each right as often as `share`."""

    def offer(coming: Tokens, random: Random) -> Iterator[Proposal]:
        for token in (*coming, *range(20))[:20]:
            yield Proposal(token if random.random() < share else -1 - token % 7 + 5000, source="chain")

    return offer


def tree_right(share: float, said: float) -> Offer:
    """Pairs of tokens for each of ten places; the first of a pair is right as often as `share`, and said to be."""

    def offer(coming: Tokens, random: Random) -> Iterator[Proposal]:
        for i, token in enumerate((*coming, *range(10))[:10]):
            right = token if random.random() < share else 6000 + i
            yield Proposal(right, parent=i - 1, source="tree", chance=said ** (i + 1))

    return offer


@final
@frozen
class Drafting:
    """What a drafter offers, and what each draft takes."""

    offer: Offer
    seconds: float = 1e-5


WRONG: Mapping[str, Drafting] = {
    "wrong": Drafting(chain_right(0.0)),
    "wrong and cheap": Drafting(chain_right(0.0), 0.05),
    "wrong and dear": Drafting(chain_right(0.0), 0.5),
    "a wrong tree that is sure": Drafting(tree_right(0.0, 0.95)),
    "a wrong tree that doubts": Drafting(tree_right(0.0, 0.4)),
    "a wrong tree that is dear": Drafting(tree_right(0.0, 0.9), 0.2),
    "seldom right": Drafting(chain_right(0.05)),
    "a tree that is seldom right": Drafting(tree_right(0.05, 0.9)),
}


def decoded(costs: Callable[[int], float], drafting: Drafting, policy: CostAware, hand: Hand, seed: int) -> float:
    """What a text took, its first pass included, in passes over one token; the prompt itself takes nothing."""
    random = Random(seed)
    text = tuple(random.randrange(1000) for _ in range(NEW))
    prompt = (*PROMPT, 3000 + seed)
    state = DecodeState(Request(prompt, len(prompt) + NEW), prompt)
    began = hand.now

    def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        hand.now += costs(len(drafts) + 1)
        return torch.empty(0)

    def stream(coming: Tokens) -> Iterator[Proposal]:
        for proposal in drafting.offer(coming, random):
            hand.now += drafting.seconds
            yield proposal

    timed = policy.meter.timed(target)
    while state.room > 0:
        coming = text[len(state.output) :]
        drafts, pace = policy(stream(coming), state)
        timed(state.tokens, drafts)
        stood = len(path_along(tuple([draft.token for draft in drafts]), parents_of(drafts), coming[:-1]))
        state = DecodeState(state.request, state.tokens + coming[: stood + 1], pace)
    return hand.now - began


KNOWN = (1, 1, *range(2, 18), *range(2, 18))
"""The lengths of passes that a meter has heard of."""


def knowing(hand: Hand, machine: str) -> CostMeter:
    """A meter that has timed every length."""
    meter = CostMeter(hand)
    for k in KNOWN:
        meter.note(k, MACHINES[machine](k))
    return meter


LOSS = 0.025
"""What a text may lose; most of it goes into drafting, by drafters that take their time."""

WALL, UNKNOWN_WALL, KNOWN_WALL = "a wall after eight", 0.055, 0.035
"""A step up that no shorter pass tells of costs what it costs, once; and what a text may lose to it."""


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("drafter", WRONG)
def test_a_text_that_gains_nothing_loses_little_on_a_machine_that_is_not_known(machine: str, drafter: str) -> None:
    for seed in range(3):
        hand = Hand()
        took = decoded(MACHINES[machine], WRONG[drafter], CostAware(CostMeter(hand)), hand, seed)
        assert took <= (1 + (UNKNOWN_WALL if machine == WALL else LOSS)) * NEW


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("drafter", WRONG)
def test_nor_where_the_machine_is_known_and_the_drafter_is_not(machine: str, drafter: str) -> None:
    """As for another policy over a model that was read before: its meter has timed every length."""
    hand = Hand()
    took = decoded(MACHINES[machine], WRONG[drafter], CostAware(knowing(hand, machine)), hand, 1)
    assert took <= (1 + (KNOWN_WALL if machine == WALL else LOSS)) * NEW


GAINS: Mapping[str, float] = {"flat": 0.25, "cliff": 0.35, "steep": 0.75, "a wall after eight": 0.35, "stairs": 0.35}


@pytest.mark.parametrize("machine", GAINS)
@pytest.mark.parametrize("offer", [chain_right(0.9), tree_right(0.9, 0.9)], ids=["chain", "tree"])
def test_caution_does_not_keep_a_good_drafter_from_gaining_in_its_first_text(machine: str, offer: Offer) -> None:
    hand = Hand()
    assert decoded(MACHINES[machine], Drafting(offer), CostAware(CostMeter(hand)), hand, 1) <= GAINS[machine] * NEW


@pytest.mark.parametrize("offer", [chain_right, lambda share: tree_right(share, 0.9)], ids=["chain", "tree"])
def test_what_a_pass_over_one_token_took_in_slower_times_is_not_believed(offer: Callable[[float], Offer]) -> None:
    """A long text, then short ones: while all drafts stand no pass over one token is timed, and then they fail."""
    hand = Hand()
    meter = CostMeter(hand)

    def one(factor: float, right: float, seed: int) -> float:
        def costs(k: int) -> float:
            return factor * MACHINES["cliff"](k)

        return decoded(costs, Drafting(offer(right)), CostAware(meter), hand, seed) / factor / NEW

    assert decoded(lambda k: 3.0 * k, Drafting(lambda coming, random: iter(())), CostAware(meter), hand, 0) == 3.0 * NEW
    assert one(1.0, 1.0, seed=1) < 0.25
    assert one(1.0, 0.0, seed=2) < 1 + 1.5 * LOSS  # the first of them finds out
    assert all(one(1.0, 0.0, seed) <= 1 + LOSS for seed in range(3, 9))


def test_a_length_that_was_forgotten_begins_anew() -> None:
    meter = CostMeter(Hand())
    for _ in range(9):
        meter.note(5, 100.0)
    for _ in range(300):
        meter.note(1, 1.0)
    assert meter.seconds(5) == pytest.approx([1.0, 1.01])  # it was slow long ago
    meter.note(5, 1.2)
    meter.note(5, 1.2)
    assert (meter.seconds(5) or [])[4] == 1.2


def a_dear_one_now_and_then(parent: int | None, chance: float | None) -> Callable[[Hand], Offer]:
    """Wrong drafts of which a few take a pass to draft, too few to be seen in a median."""

    def made(hand: Hand) -> Offer:
        def offer(coming: Tokens, random: Random) -> Iterator[Proposal]:
            for i in range(16):
                if i == 9 or (chance is not None and i == 0 and (NEW - len(coming)) % 9 >= 5):
                    hand.now += 1.0
                yield Proposal(6000 + i, source="wrong", parent=i - 1 if parent is None else parent, chance=chance)

        return offer

    return made


@pytest.mark.parametrize(
    "made", [a_dear_one_now_and_then(None, None), a_dear_one_now_and_then(-1, 1e-4)], ids=["chain", "tree"]
)
def test_drafts_of_which_a_few_are_dear_are_charged_with_what_they_took(made: Callable[[Hand], Offer]) -> None:
    hand = Hand()
    took = decoded(MACHINES["flat"], Drafting(made(hand)), CostAware(knowing(hand, "flat")), hand, 1)
    assert took <= (1 + LOSS) * NEW


@pytest.mark.parametrize("texts", [2, 4])
@pytest.mark.parametrize("drafter", ["wrong", "a wrong tree that is sure"])
def test_texts_that_take_turns_under_one_policy_lose_no_more(drafter: str, texts: int) -> None:
    hand, costs = Hand(), MACHINES["cliff"]
    policy = CostAware(CostMeter(hand))

    def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        hand.now += costs(len(drafts) + 1)
        return torch.empty(0)

    timed = policy.meter.timed(target)
    states = [DecodeState(Request((3000 + i,), 1 + NEW), (3000 + i,)) for i in range(texts)]
    while states[0].room:
        for i, state in enumerate(states):
            drafts, pace = policy(WRONG[drafter].offer((1,) * 20, Random(0)), state)
            timed(state.tokens, drafts)
            states[i] = DecodeState(state.request, (*state.tokens, 1), pace)
    assert hand.now <= (1 + LOSS) * texts * NEW


def test_a_drafter_that_is_known_to_be_of_no_use_does_not_read_the_prompt_again() -> None:
    hand = Hand()
    policy = CostAware(CostMeter(hand))

    def offer(coming: Tokens, random: Random) -> Iterator[Proposal]:
        while True:
            hand.now += 20.0 if len(coming) == NEW else 0.5
            yield Proposal(7000, source="dear")

    first, *others = [decoded(MACHINES["flat"], Drafting(offer), policy, hand, seed) for seed in range(4)]
    assert first >= NEW + 20  # nothing is known of it yet
    assert all(took <= (1 + LOSS) * NEW for took in others)
