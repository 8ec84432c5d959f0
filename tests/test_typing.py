"""What tests/typing claims holds for every type checker, and in `flow` for mypy with the plugin of returns alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checked import ROOT, mypy, mypy_without_a_plugin

PROGRAMS = ROOT / "tests" / "typing"

pytestmark = pytest.mark.xdist_group("typing")  # in one process, so that mypy reads torch once for each setting

OF_THE_PLUGIN = "flow.py"
OF_ANY = sorted({path.name for path in PROGRAMS.glob("*.py")} - {OF_THE_PLUGIN, "__init__.py"})


def by_file(out: str) -> dict[str, list[str]]:
    """What mypy says of each file of tests/typing."""
    assert re.search(r"^(Success: no issues found in|Found \d+ errors? in)", out, re.MULTILINE), out
    of_file: dict[str, list[str]] = {}
    for path, line in re.findall(r"^([\w/.]+):(\d+: error: .*)$", out, re.MULTILINE):
        of_file.setdefault(str(Path(path).relative_to("tests/typing")), []).append(line)
    return of_file


@pytest.fixture(scope="module")
def without_a_plugin(plain_mypy: Path) -> dict[str, list[str]]:
    return by_file(mypy_without_a_plugin(plain_mypy, "tests/typing"))


def test_programs_are_accepted_and_refused() -> None:
    assert by_file(mypy("tests/typing")) == {}


@pytest.mark.parametrize("name", OF_ANY)
def test_programs_are_accepted_and_refused_without_a_plugin(name: str, without_a_plugin: dict[str, list[str]]) -> None:
    assert without_a_plugin.get(name) is None


def test_the_claims_about_flow_need_the_plugin(without_a_plugin: dict[str, list[str]]) -> None:
    lines = without_a_plugin[OF_THE_PLUGIN]
    assert any('Unused "type: ignore" comment' in line for line in lines)
    claims = len(re.findall("type: ignore", (PROGRAMS / OF_THE_PLUGIN).read_text()))
    unheard = sum('Unused "type: ignore' in line for line in lines)
    assert unheard == claims - 2  # mypy knows the evolve of attrs by itself


def test_a_checker_that_has_no_plugins_says_the_same(tmp_path: Path) -> None:
    """basedpyright, which is pyright with its own node, so that it runs where there is no network."""
    pytest.importorskip("basedpyright")
    config = tmp_path / "pyrightconfig.json"
    settings = {
        "include": [str(PROGRAMS / name) for name in OF_ANY],
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


def test_a_mistake_is_named(tmp_path: Path) -> None:
    """The message that a user sees names the stage and both types."""
    program = (
        "from returns.pipeline import flow\n"
        "from specflow import DecodeState\n"
        "from specflow.stages import commit, draft_nothing\n"
        "def step(state: DecodeState) -> object:\n"
        "    return flow(state, draft_nothing, commit)\n"
        "def other(state: DecodeState) -> object:\n"
        "    return state.then(draft_nothing).then(commit)\n"
    )
    file = tmp_path / "program.py"
    file.write_text(program)
    out = mypy(file)
    assert "\nFound 2 errors in 1 file" in out
    assert 'Argument 1 to "commit" has incompatible type "Drafted"; expected "Adjusted"' in out
    assert (
        'Argument 1 to "then" of "Record" has incompatible type "Callable[[Adjusted], Committed]"; '
        'expected "Callable[[Drafted], Committed]"'
    ) in out


@pytest.mark.parametrize("name", ["refused", "accepted", "flow", "lossy", "refuse_longest"])
def test_the_programs_are_importable(name: str) -> None:
    """A claim about a name that does not exist would be no claim."""
    __import__(f"tests.typing.{name}")
