"""Every decoder-only architecture: the memo never changes a result, and four decoders say what the model says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from specflow import (
    CachedPredictor,
    CertainDrafter,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    PointMass,
    Proposal,
    Step,
    Tokens,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.testing import model_conformance
from tests.architectures import ARCHITECTURES, NONE, WINDOW, Architecture
from tests.toys import oracle

PROMPT = (5, 9, 5, 9, 7, 3, 5, 9, 7, 3, 5)
NEW = 14


def lookup(order: int) -> CertainDrafter:
    """Drafts what followed the last `order` tokens when they were last seen."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        for end in reversed(range(order, len(tokens))):
            if tokens[end - order : end] == tokens[-order:]:
                yield from [Proposal(token, PointMass(token), f"lookup {order}") for token in tokens[end:]]
                return

    return draft


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.kind)
def test_architecture(architecture: Architecture) -> None:
    logging.set_verbosity_error()
    model = architecture.build()
    predictor = CachedPredictor(model)
    report = model_conformance(model, predictor=predictor, steps=40, longest=5 * WINDOW)
    assert report.holds, report
    assert predictor.feeding is not None
    assert predictor.feeding.name == architecture.feeding

    expected = oracle(PROMPT, model, NEW)
    drafter = CachedPredictor(architecture.build(noise=0.05))
    drafters: tuple[Drafter, ...] = (LLMDrafter(drafter, GreedyProcessor(), Dice()), lookup(1), lookup(3))
    steps: list[Step] = [autoregressive_step(predictor, GreedyProcessor(), Dice())]
    steps += [
        speculative_step(drafter, predictor, GreedyProcessor(), Dice(), Fixed(4), (predictor,)) for drafter in drafters
    ]
    for step in steps:
        state = run(step, start(PROMPT, NEW).unwrap()).state
        assert list(state.output) == expected


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
