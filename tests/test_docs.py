"""What the README, the docs and the docstrings print is what happens."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import specflow
from specflow.models import Loaded
from tests.checked import ROOT
from tests.programs import PAGES

MODULES = [module.name for module in pkgutil.walk_packages(specflow.__path__, "specflow.")]
WRITTEN = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "journal.md"]
CHANGES = sorted(ROOT.glob("changelog.d/*.md"))
GONE = ("read_tree", "tree_step", "CostAwareTree", "RejectTokens", "VerifyBlock", "MatchSamples", "TypicalAcceptance")


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


@pytest.mark.xdist_group("typing")  # with the others who ask mypy
def test_mypy_accepts_each_page_as_a_program(complaints: Mapping[str, list[str]]) -> None:
    pages = {name: said for name, said in complaints.items() if name.endswith("_page.py")}
    assert len(pages) >= 18
    assert not any(pages.values()), pages


def test_each_promise_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "promises.md").read_text()
    named = re.findall(r"\| `(test_\w+\.py)(?:::(\w+))?` \|$", page, re.MULTILINE)
    assert len(named) == len(re.findall(r"^\| [^|]+ \| `", page, re.MULTILINE)) > 20
    missing = [
        (file, name)
        for file, name in named
        if not (ROOT / "tests" / file).exists()
        or (name and f"\ndef {name}(" not in (ROOT / "tests" / file).read_text())
    ]
    assert missing == []


def leads_somewhere(page: Path, file: str, heading: str = "") -> bool:
    there = page.parent / file if file else page
    titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if heading else []
    return there.exists() and (
        not heading or heading in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
    )


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_what_a_page_points_to_exists(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not leads_somewhere(page, *link.split("#"))] == []
    paths = re.findall(r"`((?:specflow|tests|benchmarks|examples)/[\w/.]+)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists() and page.name != "CHANGELOG.md"] == []


def _prose(page: Path) -> str:
    """A page without its code and its examples."""
    prose = re.sub(r"^( *)```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^>>> .*?^$", "", prose, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in prose.splitlines() if not line.lstrip().startswith("|"))


@pytest.mark.parametrize("page", [*WRITTEN, *CHANGES], ids=lambda page: page.name)
def test_prose_has_lines_of_120_columns(page: Path) -> None:
    assert [line for line in _prose(page).splitlines() if len(line) > 120] == []


NO_END = re.compile(
    r"^#.*"  # a heading
    r"|^ *(?:[-*] |\d+\. )?\*\*[^*]+\*\*"  # the first words of an item, in bold
    r"|^ *\d+\."  # the number of an item
    r"|`[^`]*`"  # code
    r"|\b(?:e\.g|i\.e|vs|al)\.",  # words that are shortened
    re.MULTILINE,
)
"""Where a full stop ends no sentence."""


@pytest.mark.parametrize("page", [*WRITTEN, *CHANGES], ids=lambda page: page.name)
def test_a_line_of_prose_has_one_sentence(page: Path) -> None:
    lines = NO_END.sub("…", _prose(page)).splitlines()
    assert [line for line in lines if re.search(r"[.!?][)\"*_]* +\S", line)] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_pages_speak_of_what_there_is(page: Path) -> None:
    assert [name for name in GONE if name in page.read_text()] == []


def test_a_release_tells_of_each_change() -> None:
    """A file whose name is wrong would be left out."""
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "0"]
    draft = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [file for file in CHANGES if file.name != "README.md"]
    assert [file.name for file in files if file.read_text().splitlines()[0] not in draft] == []
