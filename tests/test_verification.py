"""The verification rules against each other: exactly, on every branch of small models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import exp
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specflow import (
    BlackBox,
    Categorical,
    Distribution,
    LLMDrafter,
    MultinomialProcessor,
    PointMass,
    Predictor,
    Proposal,
    Randomness,
    Tokens,
)
from specflow.stages import LossyTypicalAcceptance, MatchSamples, RejectTokens, VerifyBlock
from specflow.stages.verify import Rule
from specflow.testing import Branch, Law, TableModel, branches, exact_law

Verify: TypeAlias = Callable[[Randomness], Rule]

SAMPLING = MultinomialProcessor(1.0)


def by_tokens(rng: Randomness) -> Rule:
    return Verify(TableModel(2), SAMPLING, Reject(rng)).judge


def by_blocks(rng: Randomness) -> Rule:
    return Verify(TableModel(2), SAMPLING, Block(rng)).judge


def by_samples(rng: Randomness) -> Rule:
    return Verify(TableModel(2), SAMPLING, Match(rng)).judge


def one_step(verify: Verify, target: Predictor, drafter: Predictor, gamma: int) -> Law[tuple[int, Tokens]]:
    """The exact law of (accepted, the tokens emitted) in one step behind the text (0,)."""

    def step(branch: Branch) -> tuple[int, Tokens]:
        stream = LLMDrafter(drafter, SAMPLING, branch)((0,))
        proposals = [next(stream) for _ in range(gamma)]
        drafts = tuple(proposal.token for proposal in proposals)
        laws = SAMPLING.laws((0, *drafts), target((0, *drafts), gamma + 1))
        accepted, correction = verify(branch)(proposals, laws, 1)
        return accepted, (*drafts[:accepted], branch.draw(correction or laws[accepted], 1 + accepted))

    return exact_law(step)


def accepted_tokens(verify: Verify, target: Predictor, drafter: Predictor, gamma: int) -> float:
    return one_step(verify, target, drafter, gamma).mean(lambda outcome: outcome[0])


def judge(
    verify: Verify, proposals: list[Proposal], laws: Sequence[Distribution], branch: Branch
) -> tuple[int, Distribution | None]:
    return verify(branch)(proposals, laws, 1)


def always(*probs: float) -> Predictor:
    """A model that does not look at the text."""
    row = torch.tensor(probs, dtype=torch.float64).log()
    return lambda tokens, last: row.expand(last, -1)


def test_the_example_of_the_paper() -> None:
    """Sun et al. 2403.10444, section 2: 10/9 accepted tokens by tokens, 11/9 by blocks."""
    target, drafter = always(1 / 3, 2 / 3), always(2 / 3, 1 / 3)
    assert accepted_tokens(by_tokens, target, drafter, 2) == pytest.approx(10 / 9, abs=1e-14)
    assert accepted_tokens(by_blocks, target, drafter, 2) == pytest.approx(11 / 9, abs=1e-14)


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_never_accept_fewer(gamma: int, seed: int) -> None:
    vocab_size = 3 if gamma < 3 else 2
    target, drafter = TableModel(vocab_size, 2 * seed), TableModel(vocab_size, 2 * seed + 1)
    tokens, blocks, samples = (
        accepted_tokens(verify, target, drafter, gamma) for verify in (by_tokens, by_blocks, by_samples)
    )
    assert blocks >= tokens - 1e-14
    assert tokens >= samples - 1e-14
    assert gamma > 1 or blocks == pytest.approx(tokens, abs=1e-14)


def test_blocks_do_accept_more() -> None:
    gains = [
        accepted_tokens(by_blocks, TableModel(3, seed), TableModel(3, seed + 50), 2)
        - accepted_tokens(by_tokens, TableModel(3, seed), TableModel(3, seed + 50), 2)
        for seed in range(10)
    ]
    assert sum(gain > 0.01 for gain in gains) >= 3


@given(st.integers(0, 10_000), st.lists(st.integers(0, 2), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_for_certain_drafts_all_rules_are_one(seed: int, drafts: list[int]) -> None:
    proposals = [Proposal(token) for token in drafts]
    tokens = (0, *drafts)
    laws = SAMPLING.laws(tokens, TableModel(3, seed)(tokens, len(drafts) + 1))

    def law(verify: Verify) -> Law[tuple[int, int]]:
        def judge(branch: Branch) -> tuple[int, int]:
            accepted, correction = verify(branch)(proposals, laws, 1)
            return accepted, branch.draw(correction or laws[accepted], 1 + accepted)

        return exact_law(judge)

    assert law(by_blocks).distance(law(by_tokens)) < 1e-14
    assert law(by_samples).distance(law(by_tokens)) < 1e-14


def test_what_no_draft_can_be_is_refused_by_every_rule() -> None:
    """p(x) = 0."""
    p = Categorical(torch.tensor([0.0, 0.4, 0.6]))
    for q in (PointMass(0), Categorical(torch.tensor([0.5, 0.5, 0.0]))):
        for verify in (by_tokens, by_blocks, by_samples):
            judgements = branches(partial(judge, verify, [Proposal(0, q)], [p, p]))
            assert {accepted for _, (accepted, _) in judgements} == {0}


def test_a_block_may_run_into_a_target_that_is_certain() -> None:
    """A weight between 0 and 1 in front of a point mass: a processor may know one token for sure and not another."""
    likely = Categorical(torch.tensor([0.75, 0.25], dtype=torch.float64))
    unlikely = Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64))
    laws: list[Distribution] = [unlikely, PointMass(1), unlikely]

    def text(branch: Branch) -> Tokens:
        proposals = [Proposal(branch.draw(likely, 1), likely), Proposal(branch.draw(likely, 2), likely)]
        accepted, correction = by_blocks(branch)(proposals, laws, 1)
        tokens = [proposal.token for proposal in proposals[:accepted]]
        tokens.append(branch.draw(correction or laws[accepted], 1 + accepted))
        return tuple([*tokens, *[branch.draw(law, 2) for law in laws[len(tokens) : 2]]][:2])

    assert exact_law(text).distance(Law({(0, 1): 0.25, (1, 1): 0.75}, 1)) < 1e-14


def test_equal_laws_accept_everything() -> None:
    p = Categorical(torch.tensor([0.2, 0.8]))
    for verify in (by_tokens, by_blocks):
        accepted, correction = verify(Branch())([Proposal(1, p), Proposal(0, p)], [p, p, p], 1)
        assert (accepted, correction) == (2, None)  # p itself


def test_hidden_laws_behind_a_known_block_are_judged_by_samples() -> None:
    """A block ends in front of the first law that nobody knows; what is behind it is matched with samples."""
    known = Categorical(torch.tensor([0.5, 0.5]))
    hidden = BlackBox(torch.tensor([0.5, 0.5]), lambda probs: torch.tensor([[1]]))
    proposals = [Proposal(0, known), Proposal(1, known), Proposal(0, known)]
    laws: list[Distribution] = [known, hidden, hidden, known]
    accepted, correction = by_blocks(Branch())(proposals, laws, 1)
    assert accepted == 2
    assert correction == PointMass(1)


def test_typical_acceptance_keeps_what_is_not_unlikely() -> None:
    probs = torch.tensor([0.90, 0.07, 0.03], dtype=torch.float64)
    p = Categorical(probs)
    threshold = min(0.09, 0.3 * exp(-p.entropy()))
    assert threshold > 0.07
    rule = LossyTypicalAcceptance(TableModel(2), SAMPLING, Branch()).judge
    for token, expected in ((0, (1, None)), (1, (0, p)), (2, (0, p))):
        assert rule([Proposal(token)], [p, p], 1) == expected
    flat = Categorical(torch.full((20,), 0.05, dtype=torch.float64))
    assert rule([Proposal(3, flat)], [flat, flat], 1)[0] == 1  # 0.05 > 0.3 / 20
    assert rule([Proposal(3, flat)], [PointMass(3), flat], 1)[0] == 1
    assert rule([Proposal(3, flat)], [PointMass(4), flat], 1) == (0, PointMass(4))


def test_typical_acceptance_of_a_users_sampler_matches_samples() -> None:
    hidden = BlackBox(torch.tensor([0.5, 0.5]), lambda probs: torch.tensor([[1]]))
    rule = LossyTypicalAcceptance(TableModel(2), SAMPLING, Branch()).judge
    assert rule([Proposal(0, hidden)], [hidden, hidden], 1) == (0, PointMass(1))
    assert rule([Proposal(1, hidden)], [hidden, hidden], 1)[0] == 1
