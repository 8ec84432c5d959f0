"""With certain drafts a seed has one text, whatever drafts, however far, and by which rule: that without drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import pytest
import torch
from returns.pipeline import flow

from specflow import (
    CachedPredictor,
    CostAware,
    CostMeter,
    DecodeState,
    Dice,
    Drafter,
    Fixed,
    GammaPolicy,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    MultinomialProcessor,
    NucleusProcessor,
    PromptLookup,
    Proposal,
    Step,
    SuffixDrafter,
    Tokens,
    TopKProcessor,
    autoregressive_step,
    run,
    seed_coupled_step,
    speculative_step,
    start,
)
from specflow.accelerate import fast
from specflow.drafters import propose_nothing
from specflow.policies import EGAG, Heuristic
from specflow.stages import Adjust, Block, Draft, Verify, advance, commit
from specflow.state import Pace, chain
from tests.toys import disturbed, tiny_llama

TARGET: Final = fast(tiny_llama(3, layers=1))
SMALL: Final = fast(disturbed(tiny_llama(3, layers=1), 1, 0.05))
PROMPT: Final = (1, 2, 3, 1, 2)
NEW: Final = 40

DRAFTERS: Final[dict[str, Callable[[], Drafter]]] = {
    "nothing": lambda: propose_nothing,
    "suffix": SuffixDrafter,
    "lookup": PromptLookup,
    "a greedy model": lambda: LLMDrafter(CachedPredictor(SMALL), GreedyProcessor(), Dice()),
}


def by_chance(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
    """What a clock does to a policy: other numbers each time."""
    return tuple(islice(stream, int(torch.randint(8, (), generator=CLOCK)))), state.pace


CLOCK: Final = torch.Generator()
POLICIES: Final[dict[str, Callable[[CostMeter], GammaPolicy]]] = {
    "fixed 1": lambda meter: Fixed(1),
    "fixed 9": lambda meter: Fixed(9),
    "EGAG": lambda meter: EGAG(gamma_max=6),
    "heuristic": lambda meter: Heuristic(),
    "cost-aware": lambda meter: CostAware(meter, 8),
    "by chance": lambda meter: by_chance,
}
PROCESSORS: Final = {
    "temperature": MultinomialProcessor(0.15),
    "top-k": TopKProcessor(0.3, 4),
    "nucleus": NucleusProcessor(0.3, 0.9),
}


def dice(seed: int) -> Dice:
    return Dice(torch.Generator().manual_seed(seed))


def text(step: Step) -> tuple[int, ...]:
    return run(step, start(PROMPT, NEW, [7]).unwrap()).state.output


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_seed_has_one_text(drafter: str, processor: MultinomialProcessor) -> None:
    accepted, texts = 0, set()
    for seed in range(3):
        expected = text(autoregressive_step(CachedPredictor(TARGET), processor, dice(seed)))
        texts.add(expected)
        for make in POLICIES.values():
            meter, memo, rng = CostMeter(), CachedPredictor(TARGET), dice(seed)
            step = speculative_step(DRAFTERS[drafter](), meter.timed(memo), processor, rng, make(meter), prune=(memo,))
            end = run(step, start(PROMPT, NEW, [7]).unwrap())
            assert end.state.output == expected
            accepted += end.state.tally.accepted
        draft, rng = Draft(DRAFTERS[drafter](), Fixed(6)), dice(seed)
        verify, adjust = Verify(CachedPredictor(TARGET), processor, Block(rng)), Adjust(rng)
        assert text(lambda s: flow(s, draft, verify, adjust, commit, advance)) == expected  # noqa: B023 - called here
        matching = seed_coupled_step(DRAFTERS[drafter](), CachedPredictor(TARGET), processor, dice(seed))
        assert text(matching) == expected
    assert len(texts) == 3
    assert accepted > 0 or drafter == "nothing"


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_a_seed_has_one_text_with_trees_too(processor: MultinomialProcessor) -> None:
    accepted = 0
    for seed in range(3):
        expected = text(autoregressive_step(CachedPredictor(TARGET), processor, dice(seed)))
        meter, memo = CostMeter(), CachedPredictor(TARGET)
        for drafter, policy in (
            (LookupTree(), Fixed(9)),
            (LookupTree(branches=2), Fixed(3)),
            (SuffixDrafter(), Fixed(5)),
            (LLMDrafter(CachedPredictor(SMALL), GreedyProcessor(), Dice(), widths=(2, 2)), Fixed(6)),
        ):
            step = speculative_step(drafter, CachedPredictor(TARGET), processor, dice(seed), policy)
            end = run(step, start(PROMPT, NEW, [7]).unwrap())
            assert end.state.output == expected
            accepted += end.state.tally.accepted
        step = speculative_step(LookupTree(), meter.timed(memo), processor, dice(seed), CostAware(meter, 8))
        assert text(step) == expected
    assert accepted > 0


def test_the_generator_is_left_where_autoregressive_decoding_leaves_it() -> None:
    """So the next text of the same generator is the same too."""
    states = []
    for make in (propose_nothing, SuffixDrafter()):
        rng = dice(5)
        text(speculative_step(make, CachedPredictor(TARGET), PROCESSORS["temperature"], rng))
        assert rng.generator is not None
        states.append(rng.generator.get_state())
    assert torch.equal(states[0], states[1])


def test_a_condition_within_drafts_ends_the_same_text_with_the_generator_further_on() -> None:
    """Tokens that it leaves out were drawn, so the next text of the generator is another."""
    processor = PROCESSORS["temperature"]
    whole = PROMPT + text(autoregressive_step(CachedPredictor(TARGET), processor, dice(5)))

    def is_half(state: DecodeState) -> bool:
        return len(state.output) == NEW // 2

    def foreseen(tokens: Tokens) -> Iterator[Proposal]:
        return iter(chain(whole[len(tokens) :]))

    ended, left = set(), []
    for drafter in (propose_nothing, foreseen):
        rng = dice(5)
        step = speculative_step(drafter, CachedPredictor(TARGET), processor, rng, Fixed(NEW), until=is_half)
        ended.add(run(step, start(PROMPT, NEW).unwrap()).state.output)
        assert rng.generator is not None
        left.append(rng.generator.get_state())
    assert len(ended) == 1
    assert not torch.equal(left[0], left[1])
