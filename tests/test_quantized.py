"""The benchmark of quantized models tells apart what conforms, what rounds and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.quantized import WAYS, original, plain, row, texts
from specflow import MultinomialProcessor
from specflow.testing import model_conformance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    original().save_pretrained(made)
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "any pieces | conforms | 12 of 12"),
        ("quanto: int8 weights", "any pieces | conforms | 12 of 12"),
        ("torch's `quantize_dynamic`", "refused: a row of model.layers.0.self_attn.q_proj depends on the others"),
    ],
)
def test_a_line_of_the_table(name: str, said: str, folder: Path) -> None:
    assert row(name, WAYS[name], folder).startswith(f"| {name} | {said}")


def test_what_rounds_differs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding of 1e-6 does, where none is allowed."""
    monkeypatch.setattr("benchmarks.quantized.model_conformance", partial(model_conformance, tolerance=0.0))
    assert "| any pieces | differs by " in row("none", plain, folder)


def test_texts_that_part_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quantized.GreedyProcessor", lambda: MultinomialProcessor(1.0))
    assert texts(original()) == (0, 12)


def test_what_cannot_be_loaded_says_why(folder: Path) -> None:
    def load(_: Path) -> nn.Module:
        raise ImportError("no such library\nat all")

    assert row("none such", load, folder) == "| none such | not loaded: no such library | | |"


def test_what_it_quantizes_is_the_same_model_each_time() -> None:
    one, other = original(), original()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
