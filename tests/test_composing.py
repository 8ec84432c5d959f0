"""The composition guide: its program runs, mypy accepts it, and mypy says what the page says it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from specflow.models import Loaded

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "composing.md").read_text()
PROGRAM = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
WRONG = re.findall(r"```python wrong\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
PLUGIN = 'plugins = ["returns.contrib.mypy.returns_plugin"]\n'


def test_the_program_runs(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAM, "docs/composing.md", "exec"), {"__name__": "composing"})
    out = capsys.readouterr().out
    assert out.count("exact on 16 cases") == 9
    assert "total variation" in out
    assert "tokens per pass of the target" in out


def test_mypy_without_a_plugin_accepts_the_program_and_says_what_the_page_says(tmp_path: Path) -> None:
    config = (ROOT / "pyproject.toml").read_text()
    assert PLUGIN in config
    files = {"program.py": PROGRAM}
    files |= {f"wrong{i}.py": f"{PROGRAM}\n{block}" for i, (block, _) in enumerate(WRONG)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    typings = f'mypy_path = "{ROOT}/typings"'
    plain = config.replace(PLUGIN, "").replace('mypy_path = "typings"', typings)
    (tmp_path / "pyproject.toml").write_text(plain)
    settings = ["--config-file", str(tmp_path / "pyproject.toml"), "--cache-dir", str(tmp_path), "--no-pretty"]
    command = [sys.executable, "-m", "mypy", *settings, *(str(tmp_path / name) for name in files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said: dict[str, list[str]] = {name: [] for name in files}
    for name, message in re.findall(r"(\w+\.py):\d+: error: (.*)", result.stdout):
        said[name].append(message)
    assert said.pop("program.py") == [], result.stdout
    assert len(WRONG) >= 10
    assert all(said.values())
    for i, (block, messages) in enumerate(WRONG):
        assert said[f"wrong{i}.py"] == messages.splitlines(), block


def test_what_the_page_shows_as_wrong_has_an_answer() -> None:
    assert PAGE.count("```python wrong") == len(WRONG)
