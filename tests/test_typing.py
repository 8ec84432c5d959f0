"""What tests/typing claims holds for every type checker, and in `flow` for mypy with the plugin of returns alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.checked import ROOT, mypy
from tests.programs import TYPING

pytestmark = pytest.mark.xdist_group("typing")  # in one process, so that mypy reads torch once for each setting

OF_THE_PLUGIN = "flow.py"
OF_ANY = sorted({path.name for path in TYPING.glob("*.py")} - {OF_THE_PLUGIN, "__init__.py"})


MISTAKE = """
from returns.pipeline import flow
from specflow import DecodeState
from specflow.stages import commit, draft_nothing
def step(state: DecodeState) -> object:
    return flow(state, draft_nothing, commit)
def other(state: DecodeState) -> object:
    return state.then(draft_nothing).then(commit)
"""


@pytest.fixture(scope="module")
def with_the_plugin(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of tests/typing and of a mistake."""
    mistake = tmp_path_factory.mktemp("mistake") / "mistake.py"
    mistake.write_text(MISTAKE)
    return re.findall(r"([\w.]+\.py:\d+: error: .*)", mypy("tests/typing", mistake))


def test_programs_are_accepted_and_refused(with_the_plugin: list[str]) -> None:
    assert [line for line in with_the_plugin if not line.startswith("mistake.py")] == []


@pytest.mark.parametrize("name", OF_ANY)
def test_programs_are_accepted_and_refused_without_a_plugin(name: str, complaints: Mapping[str, list[str]]) -> None:
    assert complaints[name] == []


def test_the_claims_about_flow_need_the_plugin(complaints: Mapping[str, list[str]]) -> None:
    lines = complaints[OF_THE_PLUGIN]
    assert any('Unused "type: ignore" comment' in line for line in lines)
    claims = len(re.findall("type: ignore", (TYPING / OF_THE_PLUGIN).read_text()))
    unheard = sum('Unused "type: ignore' in line for line in lines)
    assert unheard == claims - 2  # mypy knows the evolve of attrs by itself


def test_a_checker_that_has_no_plugins_says_the_same(tmp_path: Path) -> None:
    """basedpyright, which is pyright with its own node, so that it runs where there is no network."""
    pytest.importorskip("basedpyright")
    config = tmp_path / "pyrightconfig.json"
    settings = {
        "include": [str(TYPING / name) for name in OF_ANY],
        "typeCheckingMode": "standard",
        "enableTypeIgnoreComments": True,
        "reportUnnecessaryTypeIgnoreComment": "error",
        "stubPath": str(ROOT / "typings"),
        "extraPaths": [str(ROOT)],
    }
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", str(config), "--pythonpath", sys.executable, "--outputjson"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] >= len(OF_ANY)
    errors = [each for each in report["generalDiagnostics"] if each["severity"] == "error"]
    assert [(each["file"], each["range"]["start"]["line"] + 1, each["message"]) for each in errors] == []


def test_a_mistake_is_named(with_the_plugin: list[str]) -> None:
    """The message that a user sees names the stage and both types."""
    flowing, chained = [line for line in with_the_plugin if line.startswith("mistake.py")]
    assert 'Argument 1 to "commit" has incompatible type "Drafted"; expected "Adjusted"' in flowing
    assert (
        'Argument 1 to "then" of "Record" has incompatible type "Callable[[Adjusted], Committed]"; '
        'expected "Callable[[Drafted], Committed]"'
    ) in chained


@pytest.mark.parametrize("name", ["refused", "accepted", "flow", "lossy", "refuse_longest"])
def test_the_programs_are_importable(name: str) -> None:
    """A claim about a name that does not exist would be no claim."""
    __import__(f"tests.typing.{name}")
