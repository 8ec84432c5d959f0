"""What must be installed before anything of this command can be imported: by itself it needs Python alone."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parents[2] / "pyproject.toml"

ENOUGH: Final[Mapping[str, str]] = {"torch": "2.11"}
"""Versions that are older than those that the project asks for, and do here: a device often comes with its torch."""


def lacking() -> str | None:
    """In one sentence what is missing, or too old, of what the project asks for, and the remedy; None if nothing is."""
    asked: list[str] = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = {name: ENOUGH.get(name, least) for name, _, least in [each.partition(">=") for each in asked]}
    there = {name: _installed(name) for name in wanted}
    short = {name: least for name, least in wanted.items() if _numbers(there[name] or "") < _numbers(least)}
    if not short:
        return None
    told = [f"{name} {least} or newer ({there[name] or 'none'} is there)" for name, least in short.items()]
    remedy = " ".join([f"'{name}>={least}'" for name, least in short.items()])
    return f"benchmarks.device needs {', '.join(told)}: pip install {remedy}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(said: str) -> tuple[int, ...]:
    """The numbers of a version, without what a build adds to it."""
    return tuple(map(int, re.findall(r"\d+", said.partition("+")[0])))
