"""The conformance kit finds what it is there to find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specflow import CachedPredictor, Tokens
from specflow.testing import conformance, model_conformance
from tests.toys import tiny_gpt2, tiny_llama


@pytest.mark.parametrize("seed", range(4))
def test_a_memo_of_an_attention_model_conforms(seed: int) -> None:
    report = model_conformance(tiny_llama(), seed=seed)
    assert report.holds, report
    assert report.rows > report.steps == 60
    assert "differ by at most" in str(report)


def test_the_script_depends_on_its_seed_alone() -> None:
    def texts(seed: int) -> list[tuple[Tokens, int]]:
        seen: list[tuple[Tokens, int]] = []

        def watch(tokens: Tokens, last: int) -> Tensor:
            seen.append((tokens, last))
            return torch.zeros(last, 4)

        conformance(watch, lambda tokens, last: torch.zeros(last, 4), 4, tolerance=0.0, seed=seed, longest=20)
        return seen

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert max(len(tokens) for tokens, _ in texts(1)) <= 20
    assert all(1 <= last <= len(tokens) for tokens, last in texts(1))


def test_a_memo_that_keeps_refused_tokens_is_found_and_named() -> None:
    model, right = tiny_gpt2(), CachedPredictor(tiny_gpt2())

    def stale(tokens: Tokens, last: int) -> Tensor:
        # The row of a refused draft: right only where the text's last token is what was read before.
        return right((*tokens[:-2], 3, tokens[-1]) if len(tokens) > 9 else tokens, last)

    report = conformance(
        stale, lambda tokens, last: model(torch.tensor([tokens])).logits[0, -last:], 64, tolerance=1e-9
    )
    assert not report.holds
    first = report.divergences[0]
    assert first.position >= 9
    assert f"step {first.step} ({first.move.value}) behind token {first.position}" in str(report)
    assert report.largest == max(divergence.difference for divergence in report.divergences)


def test_a_row_that_is_not_a_number_differs_and_equal_infinities_do_not() -> None:
    def minus_infinity(tokens: Tokens, last: int) -> Tensor:
        return torch.full((last, 4), -torch.inf)

    def nan(tokens: Tokens, last: int) -> Tensor:
        return torch.full((last, 4), torch.nan)

    assert conformance(minus_infinity, minus_infinity, 4, tolerance=0.0, steps=5).holds
    assert not conformance(nan, nan, 4, tolerance=1.0, steps=5).holds
