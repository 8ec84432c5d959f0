"""The first page and the composition guide: their programs run, and mypy says what the guide says of wrong ones."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from specflow.models import Loaded
from tests.checked import ROOT
from tests.programs import of_page, wrong_of

PAGE = ROOT / "docs" / "composing.md"
PROGRAM, START = of_page(PAGE), of_page(ROOT / "docs" / "start.md")
WRONG = wrong_of(PAGE)


def test_the_program_runs(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAM, "docs/composing.md", "exec"), {"__name__": "composing"})
    out = capsys.readouterr().out
    assert out.count("exact on 16 cases") == 9
    assert "total variation" in out
    assert "tokens a step" in out


def test_the_first_page_runs(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(START, "docs/start.md", "exec"), {"__name__": "start"})
    out = capsys.readouterr().out
    assert out.count("tokens a step") == 3
    assert "exact on 16 cases" in out


@pytest.mark.xdist_group("typing")  # with the others who ask mypy
def test_mypy_without_a_plugin_says_what_the_page_says(complaints: Mapping[str, list[str]]) -> None:
    assert len(WRONG) >= 10
    for i, (block, messages) in enumerate(WRONG):
        assert complaints[f"composing_wrong{i}.py"] == messages.splitlines() != [], block


def test_what_the_page_shows_as_wrong_has_an_answer() -> None:
    assert PAGE.read_text().count("```python wrong") == len(WRONG)
