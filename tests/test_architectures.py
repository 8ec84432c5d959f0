"""Every decoder-only architecture: the memo never changes a result, and four decoders say what the model says."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging

from specflow import (
    CachedPredictor,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    NGramDrafter,
    NGramStorage,
    Step,
    SuffixDrafter,
    autoregressive_step,
    ngram_step,
    run,
    speculative_step,
    start,
)
from specflow.predictors import UncachedPredictor
from specflow.stages import UpdateNgram
from specflow.testing import conformance, model_conformance, through_trees
from tests.architectures import ARCHITECTURES, EACH, NONE, WINDOW, Architecture, built
from tests.toys import VOCABULARY, oracle

PROMPT = (5, 9, 5, 9, 7, 3, 5, 9, 7, 3, 5)
NEW = 14


@pytest.mark.parametrize("architecture", EACH)
def test_architecture(architecture: Architecture) -> None:
    logging.set_verbosity_error()
    model = built(architecture.kind)
    predictor = CachedPredictor(model)
    report = model_conformance(model, predictor=predictor, steps=40, longest=5 * WINDOW)
    assert report.holds, report
    assert predictor.feeding is not None
    assert predictor.feeding.name == architecture.feeding

    trees, fresh = CachedPredictor(model), UncachedPredictor(model)
    paths = through_trees(trees, VOCABULARY)
    report = conformance(
        paths, fresh, VOCABULARY, tolerance=report.tolerance, steps=15, longest=5 * WINDOW, prune=trees.prune
    )
    assert report.holds, report

    expected = oracle(PROMPT, model, NEW)
    greedy, dice, gamma, prune = GreedyProcessor(), Dice(), Fixed(4), (predictor,)
    llm = LLMDrafter(CachedPredictor(architecture.build(noise=0.05)), greedy, dice)
    storage = NGramStorage(3, VOCABULARY)
    storage.initialize(PROMPT)
    ngram, update = NGramDrafter(storage), UpdateNgram(storage)
    steps: dict[str, Step] = {
        "autoregressive": autoregressive_step(predictor, greedy, dice),
        "llm": speculative_step(llm, predictor, greedy, dice, gamma, prune),
        "ngram": ngram_step(ngram, predictor, greedy, dice, update, gamma, prune),
        "suffix": speculative_step(SuffixDrafter(), predictor, greedy, dice, gamma, prune),
        "tree": speculative_step(LookupTree(), predictor, greedy, dice, gamma, prune),
    }
    for name, step in steps.items():
        state = run(step, start(PROMPT, NEW).unwrap()).state
        assert list(state.output) == expected, name
        assert bool(state.tally.drafted) == (name != "autoregressive"), name


def test_at_least_forty_architectures_are_tried_and_what_is_not_simple_has_its_reason() -> None:
    kinds = [architecture.kind for architecture in ARCHITECTURES]
    assert len(set(kinds)) == len(kinds) >= 100
    for architecture in ARCHITECTURES:
        assert bool(architecture.why) == (architecture.feeding != "any pieces"), architecture.kind
    assert sum(architecture.feeding == NONE for architecture in ARCHITECTURES) <= 2


def test_the_table_in_the_docs_says_the_same() -> None:
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    for architecture in ARCHITECTURES:
        fed = f"{architecture.feeding}: {architecture.why}" if architecture.why else architecture.feeding
        assert f"\n| {architecture.kind} | {fed} |" in page
