"""The examples run, and say what they should."""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib.util import find_spec
from os import environ
from pathlib import Path

import pytest

from specflow.models import INSTALL, smollm2_is_installed

EXAMPLES = Path(__file__).parent.parent / "examples"

needs_smollm2 = pytest.mark.skipif(not smollm2_is_installed(), reason=f"run `{INSTALL}`")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("numpy_backend", "of 60 characters were drafted"),
        ("compiled", "the same text"),
        pytest.param("lora", "fed in", marks=pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")),
        pytest.param("logits_processors", "ended by its stop condition", marks=needs_smollm2),
        pytest.param("custom_generate", "the same text", marks=needs_smollm2),
        pytest.param("streaming", "Paris", marks=needs_smollm2),
        pytest.param("chat", "> Write the same numbers once more.", marks=needs_smollm2),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_example(name: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out


def test_a_sharded_target_says_under_a_whole_drafter_what_the_whole_target_says() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            str(EXAMPLES / "tensor_parallel.py"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=EXAMPLES.parent,
        env=environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert "sharded parameters in 2 processes\nthe same text" in done.stdout


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.stem}' in here, example.name
