"""The documentation builds as a site, without a network, and shows every public name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Final

import pytest

from tests.checked import ROOT
from tests.test_surface import PLACES, names_of

REFERENCE: Final = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    shown = "".join([page.read_text("utf-8") for page in sorted((site / "reference").glob("*.html"))])
    ids = set(re.findall(r'id="(specflow[\w.]*)"', shown))
    names = [f"{place}.{value.__name__}" for place in PLACES for value in names_of(import_module(place))]  # type: ignore[attr-defined]
    assert len(names) > 200
    assert [name for name in names if name not in ids] == []


def test_every_page_is_in_the_menu(site: Path) -> None:
    """mkdocs only tells of those that are not."""
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in menu] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """No font, script, style or picture of another host."""
    scripts, links = (
        r'<(?:script|img|iframe)[^>]+src="https?:',
        r'<link[^>]+rel="(?:stylesheet|preload)"[^>]+href="https?:',
    )
    loads = re.compile(f"{scripts}|{links}")
    assert [page.name for page in site.rglob("*.html") if loads.search(page.read_text("utf-8"))] == []
