"""Under seed coupling a prompt and a seed have one text, whatever drafts it, and wherever it was interrupted."""

from __future__ import annotations

import pickle
from functools import cache
from itertools import islice

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.seed_invariance import decoders, first_layers
from specflow import (
    CachedPredictor,
    DecodeState,
    Finished,
    LLMDrafter,
    MultinomialProcessor,
    NucleusProcessor,
    SharedNoise,
    TopKProcessor,
    limits_of,
    run,
    seed_coupled_step,
    start,
    unfold,
)
from specflow.accelerate import fast
from specflow.models import Loaded
from specflow.predictors import UncachedPredictor
from tests.toys import VOCABULARY, disturbed, tiny_llama

TARGET, SMALL = fast(tiny_llama(0)), fast(disturbed(tiny_llama(0), 1, 0.05))
PROMPT = (3, 4, 5, 3, 4)
NAMES = list(decoders(UncachedPredictor(TARGET), UncachedPredictor(SMALL), MultinomialProcessor(1.0), 0, PROMPT, 64))
PROCESSORS = {
    "temperature 1": MultinomialProcessor(1.0),
    "temperature 3": MultinomialProcessor(3.0),
    "top-k": TopKProcessor(2.0, 5),
    "nucleus": NucleusProcessor(2.0, 0.9),
}


@cache
def undrafted(processor: str, seed: int) -> Finished:
    built = decoders(CachedPredictor(TARGET), CachedPredictor(SMALL), PROCESSORS[processor], seed, PROMPT, VOCABULARY)
    return run(built["no drafter"](), start(PROMPT, 24, [1]).unwrap())


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_drafter_gives_the_text_of_no_drafter(name: str, processor: str) -> None:
    target, small = CachedPredictor(TARGET), CachedPredictor(SMALL)
    texts = set()
    for seed in range(6):
        built = decoders(target, small, PROCESSORS[processor], seed, PROMPT, VOCABULARY)
        expected, end = undrafted(processor, seed), run(built[name](), start(PROMPT, 24, [1]).unwrap())
        assert (end.state.output, end.reason) == (expected.state.output, expected.reason)
        texts.add(end.state.output)
    assert len(texts) > 1


@given(seed=st.integers(0, 1000), steps=st.integers(0, 8), before=st.sampled_from(NAMES), after=st.sampled_from(NAMES))
@settings(max_examples=25, deadline=None)
def test_a_text_that_was_cut_short_goes_on_with_the_same_tokens(seed: int, steps: int, before: str, after: str) -> None:
    """Interrupted after some steps, and resumed from its pickled state by any decoder of any process."""
    built = decoders(CachedPredictor(TARGET), CachedPredictor(SMALL), PROCESSORS["temperature 3"], seed, PROMPT, 64)
    state = start(PROMPT, 20).unwrap()
    uncut = run(built["no drafter"](), state).state.output
    for outcome in islice(unfold(built[before](), state), steps):
        if isinstance(outcome, DecodeState):
            state = pickle.loads(pickle.dumps(outcome))
    assert uncut[: len(state.output)] == state.output
    assert run(built[after](), state).state.output == uncut


@given(seed=st.integers(0, 1000), short=st.integers(1, 19))
@settings(max_examples=15, deadline=None)
def test_a_text_that_ended_at_its_limit_goes_on_with_the_same_tokens(seed: int, short: int) -> None:
    target, small, noise = CachedPredictor(TARGET), CachedPredictor(SMALL), SharedNoise(seed)
    processor = PROCESSORS["temperature 3"]
    step = seed_coupled_step(LLMDrafter(small, processor, noise), target, processor, noise)
    uncut = run(step, start(PROMPT, 20).unwrap()).state
    cut = run(step, start(PROMPT, short).unwrap()).state
    resumed = run(step, evolve(cut, request=uncut.request)).state
    assert resumed.output == uncut.output


def test_a_real_model_has_one_text_a_seed(smollm2: Loaded) -> None:
    """The benchmark runs all of its layers and 50 seeds; here are some layers, its vocabulary and two seeds."""
    target, small = (CachedPredictor(first_layers(smollm2.model, layers)) for layers in (6, 4))
    state = start(smollm2.chat("Name a fruit."), 12, smollm2.stop, limits_of(smollm2.model)).unwrap()
    for seed in (3, 4):
        arguments = (MultinomialProcessor(1.0), seed, state.tokens, len(smollm2.tokenizer))
        built = decoders(target, small, *arguments)
        some = ("no drafter", "model, gamma 5", "suffix, else model")
        assert len({run(built[name](), state).state.output for name in some}) == 1


def test_torch_keeps_32_bits_of_a_seed() -> None:
    """Which is all that `SharedNoise` has of its seed and a position."""
    alike = [torch.rand(9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)]
    assert torch.equal(*alike)
