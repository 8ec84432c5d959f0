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


def test_the_program_runs(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(PROGRAM, "docs/composing.md", "exec"), {"__name__": "composing"})
    out = capsys.readouterr().out
    assert out.count("exact on 16 cases") == 6
    assert "total variation" in out
    assert "tokens per pass of the target" in out


def test_mypy_accepts_the_program_and_says_what_the_page_says(tmp_path: Path) -> None:
    files = {"program.py": PROGRAM}
    files |= {f"wrong{i}.py": f"{PROGRAM}\n{block}" for i, (block, _) in enumerate(WRONG)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-pretty"]
    result = subprocess.run(
        [*command, *(str(tmp_path / name) for name in files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said: dict[str, list[str]] = {name: [] for name in files}
    for name, message in re.findall(r"(\w+\.py):\d+: error: (.*)", result.stdout):
        said[name].append(message)
    assert said.pop("program.py") == [], result.stdout
    assert len(WRONG) >= 8
    for i, (block, messages) in enumerate(WRONG):
        assert said[f"wrong{i}.py"] == messages.splitlines(), block
