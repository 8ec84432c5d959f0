"""The programs that pages and notebooks print. One run of mypy reads them all: most of its time goes to torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from doctest import DocTestParser
from pathlib import Path
from typing import Final

import nbformat
from nbformat import NotebookNode

from tests.checked import ROOT, mypy_without_a_plugin

PAGES: Final = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS: Final = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
TYPING: Final = ROOT / "tests" / "typing"


def blocks(page: Path) -> list[str]:
    """The Python of a page as it is printed."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def of_page(page: Path) -> str:
    """The Python of a page, without prompts and what is printed."""
    examples = DocTestParser().get_examples
    return "\n".join("".join(example.source for example in examples(block)) or block for block in blocks(page))


def wrong_of(page: Path) -> list[tuple[str, str]]:
    """What a page shows as wrong after its program, and what it says that mypy says."""
    return re.findall(r"```python wrong\n(.*?)```\n\n```text\n(.*?)```", page.read_text(), re.DOTALL)


def book(path: Path) -> NotebookNode:
    """A notebook."""
    read: object = nbformat.read(path, nbformat.NO_CONVERT)  # type: ignore[no-untyped-call]
    assert isinstance(read, NotebookNode)
    return read


def of_notebook(path: Path) -> str:
    """The code of a notebook."""
    return "\n\n\n".join([*[cell.source for cell in book(path).cells if cell.cell_type == "code"], ""])


def programs() -> Mapping[str, str]:
    """All of them, each by the name of a file."""
    written = {f"{page.stem.lower()}_page.py": of_page(page) for page in [*PAGES, ROOT / "README.md"]}
    found = {name: text for name, text in written.items() if text}
    for page in PAGES:
        program = "\n".join(blocks(page))
        found |= {f"{page.stem}_wrong{i}.py": f"{program}\n{wrong}" for i, (wrong, _) in enumerate(wrong_of(page))}
    return found | {f"{path.stem}_notebook.py": of_notebook(path) for path in NOTEBOOKS}


def complaints(folder: Path) -> Mapping[str, list[str]]:
    """What mypy without a plugin says of each program, which is written to `folder`, and of each of tests/typing."""
    said: dict[str, list[str]] = {}
    for name, text in programs().items():
        (folder / name).write_text(text)
        said[name] = []
    said |= {path.name: [] for path in TYPING.glob("*.py")}
    out = mypy_without_a_plugin(folder / "mypy", *[folder / name for name in programs()], TYPING)
    assert re.search(rf"^Found \d+ errors? in .* \(checked {len(said)} source files\)", out, re.MULTILINE), out
    for name, message in re.findall(r"([\w.]+\.py):\d+: error: (.*)", out):
        said[name].append(message)
    return said
