"""What the README, the docs and the docstrings print is what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import specflow
from specflow.models import Loaded

ROOT = Path(specflow.__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(specflow.__path__, "specflow.")]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", ["specflow", *MODULES])
def test_docstring_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_the_readme_runs_as_printed(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "Tally" in capsys.readouterr().out


def test_the_readme_decoder_is_short() -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) < 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_the_docs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they may write files
    failed, _ = doctest.testfile(str(page), module_relative=False)
    assert failed == 0
