"""The notebooks: each runs in a fresh kernel, holds no outputs, and passes mypy as a program."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import nbformat
import pytest
from nbformat import NotebookNode

from specflow.models import INSTALL, smollm2_is_installed
from tests.checked import ROOT
from tests.programs import book, of_notebook
from tests.test_docs import leads_somewhere

FOLDER: Final = ROOT / "examples" / "notebooks"
PICTURE: Final = "image/png"
PAGE: Final = "text/html"

SHOWN: Final[Mapping[str, tuple[str, str]]] = {
    "tour": (PAGE, 'srcdoc="&lt;!DOCTYPE html&gt;'),
    "drafter": (PAGE, 'srcdoc="&lt;!DOCTYPE html&gt;'),
    "rule": ("text", "total variation 0.168 from the law it should have"),
    "gamma": (PICTURE, ""),
    "seeds": (PAGE, 'srcdoc="&lt;!DOCTYPE html&gt;'),
    "grammar": (PAGE, "forced, accepted"),
    "batch": ("text", "Tally("),
    "benchmark": (PICTURE, ""),
}
"""What a reader sees in each: of which kind, and some of it."""

METADATA: Final = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

each = pytest.mark.parametrize("name", SHOWN)


RUN: Final = """
import sys
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config
path, sockets = sys.argv[1:]
book = nbformat.read(path, nbformat.NO_CONVERT)
manager = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/k"})
client = NotebookClient(book, kernel_name="python3", timeout=600, startup_timeout=600, config=manager)
nbformat.write(client.execute(), path)
"""
"""Runs a notebook in place. A process for each: what one leaves of its sockets does not meet those of the next."""


def sources(name: str, kind: str) -> list[str]:
    return [cell.source for cell in book(FOLDER / f"{name}.ipynb").cells if cell.cell_type == kind]


def program(name: str) -> str:
    return of_notebook(FOLDER / f"{name}.ipynb")


def outputs(ran: NotebookNode) -> Iterator[tuple[str, str]]:
    """All that the cells show: its kind, and the thing itself."""
    for cell in ran.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                yield "text", output.text
            else:
                yield from output.data.items()


@each
def test_it_runs_in_a_fresh_kernel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it claims, it asserts, and a cell that raises ends it."""
    if 'load("smollm2")' in program(name) and not smollm2_is_installed():
        pytest.skip(f"SmolLM2 is not installed; run `{INSTALL}`")
    for variable, value in {"PYTHONPATH": ROOT, "IPYTHONDIR": tmp_path, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(variable, f"{value}")
    copy = tmp_path / f"{name}.ipynb"
    copy.write_text((FOLDER / copy.name).read_text())
    with TemporaryDirectory() as sockets:  # their paths have to be short; a free port may be taken before it is used
        run = subprocess.run(
            [sys.executable, "-c", RUN, f"{copy}", sockets], cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stderr
    ran = book(copy)
    kind, some = SHOWN[name]
    assert [shown for found, shown in outputs(ran) if found == kind and some in shown]


def test_all_of_them_are_run_here_and_listed_in_the_docs() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*SHOWN}
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert re.findall(r"\(\.\./examples/notebooks/(\w+)\.ipynb\)", page) == [*SHOWN]


@each
def test_it_holds_nothing_that_a_run_leaves_behind(name: str) -> None:
    """To mend one: clear all outputs, save, and take what the kernel wrote into the metadata out again."""
    clean = book(FOLDER / f"{name}.ipynb")
    nbformat.validate(clean)
    assert clean.metadata == METADATA
    for cell in clean.cells:
        assert cell.metadata == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    written: str = nbformat.writes(clean)  # type: ignore[no-untyped-call]
    assert (FOLDER / f"{name}.ipynb").read_text() == f"{written}\n"


@each
def test_its_words_lead_somewhere_and_fit_into_a_line(name: str) -> None:
    words = "\n".join(sources(name, "markdown"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", words) if "://" not in link]
    assert links
    assert [link for link in links if not leads_somewhere(FOLDER / f"{name}.ipynb", *link.split("#"))] == []
    assert [line for line in words.splitlines() if len(line) > 120] == []


@pytest.mark.xdist_group("typing")  # with the others who ask mypy
def test_mypy_accepts_them_as_programs(complaints: Mapping[str, list[str]]) -> None:
    assert [complaints[f"{name}_notebook.py"] for name in SHOWN] == [[] for _ in SHOWN]
