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


OUTSIDE: Final = {
    "README.md": "index.html",
    "CONTRIBUTING.md": "contributing.html",
    "benchmarks/journal.md": "journal.html",
}
"""Pages of the site that are written outside of docs/."""

WRITTEN: Final = [*OUTSIDE, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


def shown_at(name: str) -> str | None:
    """Where the site shows a file of the repository; None where it does not."""
    if name.startswith("docs/"):
        return re.sub(r"\.md$", ".html", name.removeprefix("docs/"))
    return f"{name}.html" if re.match(r"examples/.*\.py$", name) else OUTSIDE.get(name)


@pytest.mark.parametrize("written", WRITTEN)
def test_every_link_leads_to_a_page_or_names_its_file(site: Path, written: str) -> None:
    """A link whose words alone are left would say nothing: "(table)" without a table."""
    page = (site / str(shown_at(written))).read_text("utf-8")
    hrefs, dead = set(re.findall(r'(?:href|src)="([^"]+)"', page)), []
    for to, heading in re.findall(r"\]\(([^)\s#:]*)#?([^)\s:]*)\)", (ROOT / written).read_text()):
        path = (ROOT / written).parent.joinpath(to).resolve() if to else ROOT / written
        name = path.relative_to(ROOT).as_posix()
        there = shown_at(name)
        if there is None:
            dead += [] if f"<code>{name}</code>" in page else [to]
        elif not {f"{there}#{heading}".rstrip("#"), *([f"#{heading}"] if name == written else [])} & hrefs:
            dead.append(f"{to}#{heading}: no link to {there}")
        elif heading and f'id="{heading}"' not in (site / there).read_text("utf-8"):
            dead.append(f"{to}#{heading}: no such heading in {there}")
    assert dead == []


def test_the_front_page_is_the_readme(site: Path) -> None:
    page = (site / "index.html").read_text("utf-8")
    first = (ROOT / "README.md").read_text().split("\n\n")[1].splitlines()[0]
    assert first in page
    assert 'src="images/step.svg"' in page


def test_an_example_is_a_page(site: Path) -> None:
    first = (ROOT / "examples" / "gallery" / "bandit.py").read_text().splitlines()[0].strip('"')
    assert first[:40] in (site / "examples" / "gallery" / "bandit.py.html").read_text("utf-8")
