"""The gallery: published methods from public parts, each short, and each with its check."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Final

import pytest

from tests.checked import ROOT

GALLERY: Final = sorted((ROOT / "examples" / "gallery").glob("*.py"))


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_it_checks_itself(path: Path) -> None:
    runpy.run_path(str(path))["check"]()


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_it_is_short_and_made_of_public_parts(path: Path) -> None:
    text = path.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) < 60
    modules = re.findall(r"^from (specflow[\w.]*) import", text, re.MULTILINE)
    assert modules
    assert [module for module in modules if module.count(".") > 1] == []
    assert not re.search(r"\._(?!_)\w+", text)


def test_the_page_shows_all_of_it() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert [path.name for path in GALLERY if f"../examples/gallery/{path.name}" not in page] == []
