"""What mypy says of programs: as users run it, and without the plugin of returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
_CONFIG: Final = (ROOT / "pyproject.toml").read_text()
_PLUGIN: Final = 'plugins = ["returns.contrib.mypy.returns_plugin"]\n'


def mypy(*arguments: str | Path) -> str:
    """What mypy says with the project's settings, in lines that are not cut."""
    command = [sys.executable, "-m", "mypy", "--no-pretty", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def mypy_without_a_plugin(folder: Path, *arguments: str | Path) -> str:
    """The same without the plugin. Its settings and its cache are in `folder`."""
    assert _PLUGIN in _CONFIG
    folder.mkdir(exist_ok=True)
    config = folder / "pyproject.toml"
    config.write_text(_CONFIG.replace(_PLUGIN, "").replace('mypy_path = "typings"', f'mypy_path = "{ROOT}/typings"'))
    return mypy("--config-file", config, "--cache-dir", folder, *arguments)
