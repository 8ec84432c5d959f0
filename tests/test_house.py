"""The house: who may import whom, what stands at the door, and what it costs to come in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

import specflow

ROOT = Path(specflow.__file__).parent
ROOMS = (
    ("errors",),
    ("guards",),
    ("distribution", "prefix", "files"),
    ("laws", "trees"),
    ("state",),
    ("randomness", "processors", "protocols", "lossy", "usage"),
    ("asked", "origin"),
    ("vocabulary", "paths", "caches"),
    ("policies", "drafters", "constraints", "loop"),
    ("stages",),
    ("steps", "predictors", "gguf_keys"),
    ("margins", "trace", "beam", "batch", "heads", "testing", "converted"),
    ("models", "generate", "accelerate", "interop"),
    ("catalogue", "commands", "corpus"),
    ("bench", "chat", "distill", "doctor", "ngram_assisted", "sampling", "utils", "spec_paths"),
    ("replay",),
    ("cli",),
    ("__main__",),
)
"""From the ground floor up: a room imports from the floors below, and from no other room of its own floor."""

FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield ".".join(parts), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """The rooms that a module imports when it runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "specflow":
            if node.module == "specflow":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]


def test_every_room_has_a_floor() -> None:
    assert {name.split(".")[0] for name, _ in modules()} == set(FLOOR)


def test_no_room_imports_upwards() -> None:
    wrong = [
        f"{name} imports {room}"
        for name, tree in modules()
        for room in imported(tree)
        if room != (own := name.split(".")[0]) and FLOOR[room] >= FLOOR[own]
    ]
    assert wrong == []


def test_only_those_who_read_models_know_transformers() -> None:
    knowing = {
        name.split(".")[0]
        for name, tree in modules()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("transformers") for alias in node.names))
    }
    assert {room for room in knowing if FLOOR[room] <= FLOOR["predictors"]} == {"caches", "predictors"}


MAKERS = frozenset({"empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randn", "zeros"})
"""What of torch makes numbers, of torch's default dtype where it is told none."""


def test_no_tensor_is_of_a_dtype_that_somebody_else_chose() -> None:
    """torch's default is one for the whole process, and a thread that loads a model changes it for a while."""
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{maker}" for maker in MAKERS}
        if all(keyword.arg != "dtype" for keyword in node.keywords)
        if ast.unparse(node) != "torch.empty(0)"  # it holds no number
    ]
    assert wrong == []


def test_at_most_sixty_names_stand_at_the_door() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    names = [
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specflow")
        for alias in node.names
    ]
    assert len(names) == len(set(names)) <= 60
    assert all(hasattr(specflow, str(name)) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(specflow, "nothing")  # noqa: B009 - mypy knows that it is not there


def seconds(program: str) -> float:
    """The processor time of a program, and so no stall of the machine."""
    code = f"import time, sys\nbegan = time.process_time()\n{program}\nprint(time.process_time() - began)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_importing_costs_little_more_than_torch_and_loads_no_transformers() -> None:
    ours = "import specflow; assert 'transformers' not in sys.modules"
    mine = theirs = inf
    for _ in range(5):
        mine, theirs = min(mine, seconds(ours)), min(theirs, seconds("import torch"))
        if mine <= 1.3 * theirs:
            break
    assert mine <= 1.3 * theirs


def test_the_page_of_the_house_shows_its_floors() -> None:
    page = (ROOT.parent / "docs" / "house.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert [(int(floor), room.strip(" `")) for floor, room in rows] == [
        (floor, room) for floor, rooms in reversed([*enumerate(ROOMS)]) for room in rooms
    ]
