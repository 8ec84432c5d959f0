"""Each public name is exported once and in order, exists, and is documented where it is made."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Final

import pytest

import specflow

ROOT: Final = Path(specflow.__file__).parent
PACKAGES: Final = ("specflow", *[each.name for each in walk_packages(specflow.__path__, "specflow.") if each.ispkg])
"""All that export what other modules make."""


@cache
def parsed(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split(".")[1:])
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def exports(tree: ast.Module) -> list[tuple[str, str, str]]:
    """(the module that is named, what of it, the name that it gets), in the order of the file."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    nodes.sort(key=lambda node: node.lineno)
    return [
        (node.module or "", alias.name, alias.asname)
        for node in nodes
        for alias in node.names
        if alias.asname is not None
    ]


def runs(tree: ast.Module) -> Iterator[list[str]]:
    """The names of one module in one part of a file.

    Parts begin with a comment or an empty line, which only `specflow` itself has: there ruff does not look.
    """
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), key=lambda node: node.lineno)
    found: dict[tuple[int, str | None], list[str]] = {}
    for number, node in enumerate(nodes):
        part = node.lineno - number  # grows where there are lines between
        found.setdefault((part, node.module), []).extend([alias.name for alias in node.names])
    yield from found.values()


def as_ruff_sorts(name: str) -> tuple[int, list[tuple[int, int, str]], str]:
    """Constants, then classes, then the others; in each of them by letter, whatever its case, and numbers by value."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    parts = re.findall(r"\d+|\D+", name.lower())
    return kind, [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts], name


def made_in(module: str, name: str) -> tuple[ast.Module, str]:
    """The module that makes a name, and what it is called there."""
    for source, given, got in exports(parsed(module)):
        if got == name:
            return made_in(source, given)
    return parsed(module), name


def is_documented(tree: ast.Module, name: str) -> bool:
    """Whether a class or a function has a docstring of its own, and whatever else a text after it."""
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        match node:
            case ast.ClassDef() | ast.FunctionDef() if node.name == name and ast.get_docstring(node):
                return True
            case ast.Assign(targets=[ast.Name(target)]) | ast.AnnAssign(target=ast.Name(target)) if target == name:
                return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False  # an overload has none


NAMES: Final = [(package, name) for package in PACKAGES for _, _, name in exports(parsed(package))]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_name_is_exported_once_and_in_order(package: str) -> None:
    names = [name for _, _, name in exports(parsed(package))]
    assert sorted(names) == sorted(set(names))
    module = import_module(package)
    assert all(hasattr(module, name) for name in names)
    for run in runs(parsed(package)):
        assert run == sorted(run, key=as_ruff_sorts)


def test_a_star_import_brings_the_exported_names_and_no_others() -> None:
    """In a namespace of its own, and in a process of its own, where nothing of specflow was imported before."""
    program = "space = {}; exec('from specflow import *', space); print(*sorted(space.keys() - {'__builtins__'}))"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.split() == sorted(name for _, _, name in exports(parsed("specflow")))


def test_the_order_is_that_of_ruff() -> None:
    order = ["SVIP", "V", "AdaEDL", "Stop", "StopAfter", "chain", "part2", "part10", "parts"]
    assert sorted(sorted(order), key=as_ruff_sorts) == ["SVIP", "AdaEDL", "Stop", "StopAfter", "V", *order[5:]]
    lines = ["from a import C", "from a import B", "# Others.", "from a import A", "from b import D", "from a import E"]
    assert list(runs(ast.parse("\n".join(lines)))) == [["C", "B"], ["A", "E"], ["D"]]


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[f"{package}.{name}" for package, name in NAMES])
def test_each_public_name_is_documented(package: str, name: str) -> None:
    thing = getattr(import_module(package), name)
    if inspect.ismodule(thing):
        assert thing.__doc__
        return
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing), f"{name} has no docstring"
        assert not (inspect.getdoc(thing) or "").startswith("Method generated by attrs")
    assert is_documented(*made_in(package, name)), f"{name} has no text of its own"
