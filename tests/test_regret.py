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
    meter = CostMeter(hand)
    for k in (1, 1, *range(2, 18), *range(2, 18)):
        meter.note(k, MACHINES[machine](k))
    took = decoded(MACHINES[machine], WRONG[drafter], CostAware(meter), hand, 1)
    assert took <= (1 + (KNOWN_WALL if machine == WALL else LOSS)) * NEW


GAINS: Mapping[str, float] = {"flat": 0.25, "cliff": 0.35, "steep": 0.75, "a wall after eight": 0.35, "stairs": 0.35}


@pytest.mark.parametrize("machine", GAINS)
@pytest.mark.parametrize("offer", [chain_right(0.9), tree_right(0.9, 0.9)], ids=["chain", "tree"])
def test_caution_does_not_keep_a_good_drafter_from_gaining_in_its_first_text(machine: str, offer: Offer) -> None:
    hand = Hand()
    assert decoded(MACHINES[machine], Drafting(offer), CostAware(CostMeter(hand)), hand, 1) <= GAINS[machine] * NEW
