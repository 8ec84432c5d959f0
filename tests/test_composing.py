"""The first page and the composition guide: their programs run, and mypy says what the guide says of wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specflow.models import Loaded
from tests.checked import ROOT, mypy_without_a_plugin

PAGE = (ROOT / "docs" / "composing.md").read_text()


def program(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))


PROGRAM, START = program(PAGE), program((ROOT / "docs" / "start.md").read_text())
WRONG = re.findall(r"```python wrong\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_the_program_runs(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAM, "docs/composing.md", "exec"), {"__name__": "composing"})
    out = capsys.readouterr().out
    assert out.count("exact on 16 cases") == 9
    assert "total variation" in out
    assert "tokens per pass of the target" in out


def test_the_first_page_runs(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(START, "docs/start.md", "exec"), {"__name__": "start"})
    out = capsys.readouterr().out
    assert out.count("tokens per pass") == 2
    assert "exact on 16 cases" in out


@pytest.mark.xdist_group("typing")  # with the others who ask mypy
def test_mypy_without_a_plugin_says_what_the_page_says(tmp_path: Path, plain_mypy: Path) -> None:
    files = {f"wrong{i}.py": f"{PROGRAM}\n{block}" for i, (block, _) in enumerate(WRONG)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    out = mypy_without_a_plugin(plain_mypy, *(tmp_path / name for name in files))
    said: dict[str, list[str]] = {name: [] for name in files}
    for name, message in re.findall(r"(\w+\.py):\d+: error: (.*)", out):
        said[name].append(message)
    assert len(WRONG) >= 10
    assert all(said.values())
    for i, (block, messages) in enumerate(WRONG):
        assert said[f"wrong{i}.py"] == messages.splitlines(), block


def test_what_the_page_shows_as_wrong_has_an_answer() -> None:
    assert PAGE.count("```python wrong") == len(WRONG)
