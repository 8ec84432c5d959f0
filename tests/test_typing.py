"""mypy with the returns plugin accepts and refuses what tests/typing claims; without the plugin it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = (ROOT / "pyproject.toml").read_text()
PLUGIN = 'plugins = ["returns.contrib.mypy.returns_plugin"]\n'


def mypy(config: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """mypy over tests/typing with `config`, and a cache of its own."""
    file = folder / "pyproject.toml"
    file.write_text(config.replace('mypy_path = "typings"', f'mypy_path = "{ROOT}/typings"'))
    command = [sys.executable, "-m", "mypy", "--config-file", str(file), "--cache-dir", str(folder / "cache")]
    return subprocess.run([*command, "tests/typing"], cwd=ROOT, capture_output=True, text=True, check=False)


def test_programs_are_accepted_and_refused(tmp_path: Path) -> None:
    result = mypy(CONFIG, tmp_path)
    assert result.returncode == 0, result.stdout


def test_the_claims_need_the_plugin(tmp_path: Path) -> None:
    assert PLUGIN in CONFIG
    result = mypy(CONFIG.replace(PLUGIN, ""), tmp_path)
    assert result.returncode == 1
    assert "refused.py" in result.stdout
    assert 'Unused "type: ignore" comment' in result.stdout


def test_a_mistake_is_named(tmp_path: Path) -> None:
    """The message that a user sees names the stage and both types."""
    program = tmp_path / "program.py"
    program.write_text(
        "from returns.pipeline import flow\n"
        "from specflow import DecodeState\n"
        "from specflow.stages import commit, draft_nothing\n"
        "def step(state: DecodeState) -> object:\n"
        "    return flow(state, draft_nothing, commit)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'Argument 1 to "commit" has incompatible type "Drafted"; expected "Adjusted"' in result.stdout


@pytest.mark.parametrize("name", ["refused", "accepted"])
def test_the_programs_are_importable(name: str) -> None:
    """A claim about a name that does not exist would be no claim."""
    __import__(f"tests.typing.{name}")
