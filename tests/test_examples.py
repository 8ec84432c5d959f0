"""The examples run, and say what they should."""

from __future__ import annotations

import runpy
import warnings
from contextlib import redirect_stdout
from importlib.util import find_spec
from multiprocessing import get_context
from os import environ
from pathlib import Path
from socket import socket

import pytest
import torch

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


def process(rank: int, port: int, out: Path) -> None:
    """One of two processes that run the example, as torchrun would start it."""
    environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    with out.open("w") as file, redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / "tensor_parallel.py"), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_sharded_target_says_under_a_whole_drafter_what_the_whole_target_says(tmp_path: Path) -> None:
    """The processes are forks of this one, so that neither has to import torch and transformers again."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = [tmp_path / "first", tmp_path / "second"]
    fork = get_context("fork")
    processes = [fork.Process(target=process, args=(rank, port, out)) for rank, out in enumerate(outs)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=300)
        one.kill()
    assert [one.exitcode for one in processes] == [0, 0]
    assert "sharded parameters in 2 processes\nthe same text" in outs[0].read_text()


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.stem}' in here, example.name
