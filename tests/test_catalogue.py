"""The catalogue: whatever is chosen by name makes a step whose text is the target's."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import final

import numpy
import pytest
import torch
from attrs import evolve
from torch.nn import Module

from specflow import (
    TEXT,
    CachedPredictor,
    CostAware,
    CostMeter,
    DecodeError,
    DecodeState,
    Dice,
    Fixed,
    GreedyProcessor,
    Proposal,
    Step,
    Tokens,
    run,
    start,
)
from specflow.bench.decoders import NAMES
from specflow.catalogue import COUPLED, DRAFTERS, POLICIES, RULES, USUAL_POLICY, Drafting, Make, Setting, step_of
from specflow.drafters import Bigrams
from specflow.heads import HeadPredictor
from specflow.policies import meter_of
from specflow.randomness import Sampling
from specflow.state import BEFORE, Committed, Count, GammaPolicy, Reason, Tally
from specflow.testing import CASES, SEEDED_CASES, TableModel, World, certify, certify_seed
from tests.heads import linear_head, table_head
from tests.mutants import apart
from tests.toys import Table, disturbed, oracle, tiny_llama

PROMPT, NEW = (3, 4, 5, 6, 3, 4, 5, 6, 3, 4), 16
TARGET = tiny_llama(21, vocab_size=24, layers=1)
CLOSE = disturbed(TARGET, 1, 0.05)
GREEDY = oracle(PROMPT, TARGET, NEW)
TREES = ["tree", "recycle", "logits", "tree+recycle"]
MERGED = ["head+tree", "head+tree+recycle"]
"""What knows what to do with the target's bigrams: alone, and beside a head."""

FIXED = Fixed(4)
HEADED = {"head", "head-chain", *MERGED}


def test_the_names() -> None:
    plain = {"none", "suffix", "lookup", "suffix+lookup", "ngram", "memory", "llm", "retokenised"}
    assert set(DRAFTERS) == plain | HEADED | {*TREES}
    assert set(POLICIES) == {"fixed", "heuristic", "egag", "confidence", "svip", "adaedl", "cost"}
    assert set(RULES) == {"reject", "match", "block", "traverse"}
    assert set(COUPLED) == {"match"}
    assert set(DRAFTERS) < set(NAMES)
    assert [name for name, entry in DRAFTERS.items() if entry.assisted] == ["llm", "retokenised"]
    assert [name for name, entry in DRAFTERS.items() if entry.bigrams] == [*TREES, *MERGED]
    assert {name for name, entry in DRAFTERS.items() if entry.headed} == HEADED


# On every branch.


TABLES = {size: Table(size) for size in (2, 3, 4)}
"""The models that draft: each is tried once."""


def drafting(name: str, world: World, rng: Sampling) -> Drafting:
    target = world.target
    assert isinstance(target, TableModel)
    size = target.vocab_size
    bigrams = Bigrams.of(target, (0,), size, 2)
    setting = Setting(Module(), size, world.start.tokens, world.processor, rng, TABLES[size], lambda: bigrams)
    head = HeadPredictor(table_head("jump", size, target.width, target.seed), target)
    setting = evolve(setting, head=head)
    made = DRAFTERS[name].make()(setting)
    return evolve(made, drafter=apart(made.drafter)) if made.teach else made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_drafter_is_certified_under_every_rule(drafter: str, rule: str) -> None:
    def compose(world: World) -> Step:
        draft, judge = drafting(drafter, world, world.rng), RULES[rule](world.rng)
        return step_of(draft, FIXED, world.target, world.processor, world.rng, judge)

    # Heads take torch's time on each branch; test_heads.py certifies them on more cases.
    certificate = certify(compose, cases=CASES[:1] if DRAFTERS[drafter].headed else CASES[1:4])
    assert (certificate.accepted > 0) is (drafter != "none")


@pytest.mark.parametrize("rule", COUPLED)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_under_a_coupled_rule_the_noise_has_one_text(drafter: str, rule: str) -> None:
    def compose(world: World) -> Step:
        draft, judge = drafting(drafter, world, world.noise), COUPLED[rule](world.noise)
        return step_of(draft, FIXED, world.target, world.processor, world.noise, judge)

    certify_seed(compose, cases=SEEDED_CASES[:1] if DRAFTERS[drafter].headed else SEEDED_CASES[1:4])


# Policies.


def text(drafter: str, gamma: GammaPolicy, make: Make | None = None) -> DecodeState:
    """The greedy text of the target, with what was drafted for it."""
    processor, rng, target = GreedyProcessor(), Dice(), CachedPredictor(TARGET)
    setting = Setting(TARGET, 24, PROMPT, processor, rng, CLOSE, head=linear_head(TARGET))
    draft = (make or DRAFTERS[drafter].make())(setting)
    step = step_of(draft, gamma, target, processor, rng, RULES["reject"](rng), (target,))
    return run(step, start(PROMPT, NEW).unwrap()).state


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_drafter_under_every_policy_gives_the_greedy_text(drafter: str, policy: str) -> None:
    state = text(drafter, POLICIES[policy](4, 1.0, meter_of(TARGET)))
    assert list(state.output) == GREEDY
    assert policy == "cost" or (state.tally.drafted > 0) is (drafter != "none")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parent", [BEFORE, TEXT])
def test_a_policy_drafts_up_to_its_most(policy: str, parent: int) -> None:
    """Of a chain without an end, and of siblings without an end."""
    state = start(PROMPT, 99).unwrap()
    for most in (1, 3, 7):
        gamma = POLICIES[policy](most, 1.0, CostMeter())
        lengths = []
        for _ in range(20):
            taken, pace = gamma(iter([Proposal(token, parent=parent) for token in range(12)]), state)
            accepted = len(taken) if parent == BEFORE else min(1, len(taken))
            tally = state.tally + Tally(1, (("draft", Count(len(taken), accepted)),))
            state = evolve(state, pace=pace, tally=tally)
            lengths.append(len(taken))
        assert max(lengths) <= most
        assert policy == "cost" or max(lengths) == most


def test_a_policy_by_cost_has_the_meter_that_it_is_given() -> None:
    meter = CostMeter()
    policy = POLICIES[USUAL_POLICY](3, 1.0, meter)
    assert isinstance(policy, CostAware)
    assert policy.meter is meter


@pytest.mark.parametrize(
    ("policy", "cold", "hot"), [("egag", 8, 1), ("confidence", 8, 1), ("svip", 8, 1), ("adaedl", 8, 1)]
)
def test_a_policy_is_given_the_temperature(policy: str, cold: int, hot: int) -> None:
    """A drafter that prefers a token a little is sure of it when it is cold, and knows nothing when it is hot."""
    logits = torch.zeros(64)
    logits[3] = 1.0
    for temperature, expected in ((0.01, cold), (100.0, hot)):
        stream = iter([Proposal(3, logits=logits) for _ in range(12)])
        taken, _ = POLICIES[policy](8, temperature, CostMeter())(stream, start(PROMPT, 99).unwrap())
        assert len(taken) == expected


# What drafters are made from.


@pytest.mark.parametrize("name", ["memory", "recycle", "logits", "tree+recycle"])
def test_a_memory_is_kept_from_text_to_text_and_each_decoder_has_its_own(name: str) -> None:
    make = DRAFTERS[name].make()
    first, second = text(name, FIXED, make), text(name, FIXED, make)
    assert second.tally.steps < first.tally.steps
    assert text(name, FIXED).tally == first.tally


def test_what_learns_and_what_forgets_is_told_of_each_step() -> None:
    setting = Setting(TARGET, 24, PROMPT, GreedyProcessor(), Dice(), CLOSE, head=linear_head(TARGET))
    made = {name: entry.make()(setting) for name, entry in DRAFTERS.items()}
    taught = {"ngram", "memory", "recycle", "logits", "tree+recycle", "head+tree+recycle"}
    assert {name for name, draft in made.items() if draft.teach} == taught
    assert {name for name, draft in made.items() if draft.memos} == {"llm", "retokenised"}
    told: list[Tokens] = []

    @final
    class Memo:
        def prune(self, tokens: Tokens, /) -> None:
            told.append(tokens)

    def teach(committed: Committed) -> Committed:
        told.append(committed.tokens)
        return committed

    draft = Drafting(made["suffix"].drafter, (teach,), (Memo(),))
    step = step_of(draft, FIXED, CachedPredictor(TARGET), GreedyProcessor(), Dice(), RULES["match"](Dice()), (Memo(),))
    after = step(start(PROMPT, NEW).unwrap())
    assert isinstance(after, DecodeState)
    assert told == [after.tokens, after.tokens, after.output]


def test_a_text_ends_where_it_should() -> None:
    def over(state: DecodeState) -> bool:
        return len(state.output) == 3

    target, rng = CachedPredictor(TARGET), Dice()
    draft = DRAFTERS["suffix"].make()(Setting(TARGET, 24, PROMPT, GreedyProcessor(), rng))
    step = step_of(draft, FIXED, target, GreedyProcessor(), rng, RULES["reject"](rng), (target,), over)
    end = run(step, start(PROMPT, NEW).unwrap())
    assert (end.state.output, end.reason) == (tuple(GREEDY[:3]), Reason.CONDITION)


def test_models_that_cannot_draft_are_refused() -> None:
    setting = Setting(TARGET, 24, PROMPT, GreedyProcessor(), Dice())
    with pytest.raises(DecodeError, match="there is no assistant to draft"):
        DRAFTERS["llm"].make()(setting)
    with pytest.raises(DecodeError, match="different vocabularies"):
        DRAFTERS["llm"].make()(evolve(setting, assistant=tiny_llama(0, vocab_size=64)))
    for name in HEADED:
        with pytest.raises(DecodeError, match="there is no head to draft"):
            DRAFTERS[name].make()(setting)


def test_bigrams_are_asked_for_by_trees_alone() -> None:
    asked: list[str] = []

    def bigrams(name: str) -> Bigrams:
        asked.append(name)
        return Bigrams(numpy.array([[1], [0]]), numpy.array([[0.5], [0.5]]))

    for name, entry in DRAFTERS.items():
        setting = Setting(TARGET, 24, PROMPT, GreedyProcessor(), Dice(), CLOSE, partial(bigrams, name))
        setting = evolve(setting, head=linear_head(TARGET))
        made = entry.make()(setting)
        if name == "logits":  # it looks at the row before the last token
            assert [draft.token for draft in made.drafter((0, 1, 0, 1))] == [0, 1]
        elif entry.headed:
            sources = {draft.source for draft in islice(made.drafter((0, 1)), 9)}
            assert sources - {"suffix"} == {"head", *["follower"] * entry.bigrams}
        elif entry.bigrams:
            assert [draft.token for draft in islice(made.drafter((1,)), 3)] == [0, 1, 0]
    assert asked == [*TREES, *MERGED]
