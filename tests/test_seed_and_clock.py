"""Under a seed the text of certain drafts does not depend on the clock, and neither does a seed-coupled one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
from attrs import evolve

from specflow import (
    CachedPredictor,
    CostAware,
    CostMeter,
    Dice,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    MultinomialProcessor,
    Proposal,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    run,
    seed_coupled_step,
    speculative_step,
    start,
)
from tests.toys import disturbed, tiny_llama

MODEL = tiny_llama(5, vocab_size=8)
PROMPT = [1, 2, 3, 1, 2]
SAMPLED = MultinomialProcessor(0.7)


def clocked(seed: int) -> CostMeter:
    """A meter whose clock says anything, so that γ is now this and now that."""
    meter = CostMeter(Random(seed).random)
    for k in (1, 1, 2, 4, 9):
        meter.note(k, 0.5 + k / 16)
    return meter


def chain(seed: int) -> Step:
    meter, memo, dice = clocked(seed), CachedPredictor(MODEL), Dice(torch.Generator().manual_seed(7))
    return speculative_step(SuffixDrafter(), meter.timed(memo), SAMPLED, dice, CostAware(meter, 8), prune=(memo,))


def greedy_model(seed: int) -> Step:
    """A model that drafts greedily is certain of its drafts too."""
    meter, memo, dice = clocked(seed), CachedPredictor(MODEL), Dice(torch.Generator().manual_seed(7))
    drafter = LLMDrafter(CachedPredictor(disturbed(MODEL, 1, 0.2)), GreedyProcessor(), Dice())
    return speculative_step(drafter, meter.timed(memo), SAMPLED, dice, CostAware(meter, 8))


def tree(seed: int) -> Step:
    meter, memo, dice = clocked(seed), CachedPredictor(MODEL), Dice(torch.Generator().manual_seed(7))
    return speculative_step(LookupTree(), meter.timed(memo), SAMPLED, dice, CostAware(meter, 8))


def tree_of_a_chain(seed: int) -> Step:
    """A chain whose drafter tells the chances of its drafts."""
    meter, memo, dice = clocked(seed), CachedPredictor(MODEL), Dice(torch.Generator().manual_seed(7))

    def told(tokens: Tokens) -> Iterator[Proposal]:
        for depth, proposal in enumerate(SuffixDrafter()(tokens)):
            yield evolve(proposal, chance=0.9**depth)

    return speculative_step(told, meter.timed(memo), SAMPLED, dice, CostAware(meter, 8))


def coupled(seed: int) -> Step:
    """Drafts that are drawn, under noise that belongs to positions."""
    meter, memo, noise = clocked(seed), CachedPredictor(MODEL), SharedNoise(7)
    drafter = LLMDrafter(CachedPredictor(disturbed(MODEL, 1, 0.2)), SAMPLED, noise)
    return seed_coupled_step(drafter, meter.timed(memo), SAMPLED, noise, CostAware(meter, 8))


@pytest.mark.parametrize("compose", [chain, greedy_model, tree, tree_of_a_chain, coupled])
def test_a_seeded_text_does_not_depend_on_the_clock(compose: Callable[[int], Step]) -> None:
    texts: set[Tokens] = set()
    drafted: set[int] = set()
    for seed in range(8):
        step = compose(seed)
        state = run(step, start(PROMPT, 60).unwrap()).state
        texts.add(state.output)
        drafted.add(state.tally.drafted)
    assert len(drafted) > 1, "the clock decides what is drafted, or this says nothing"
    assert len(texts) == 1
