"""The examples run, and say what they should."""

from __future__ import annotations

import runpy
import sys
import warnings
from contextlib import redirect_stdout
from importlib.util import find_spec
from multiprocessing import get_context
from os import environ
from pathlib import Path
from socket import socket
from subprocess import Popen

import pytest
import torch

from specflow import Fixed
from specflow.models import INSTALL, smollm2_is_installed
from tests.test_cli import words
from tests.toys import tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"

needs_smollm2 = pytest.mark.skipif(not smollm2_is_installed(), reason=f"run `{INSTALL}`")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("numpy_backend", "of 60 characters were drafted"),
        ("compiled", "the same text"),
        ("eagle", "the same text"),
        pytest.param("lora", "fed in", marks=pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed")),
        pytest.param("logits_processors", "ended by its stop condition", marks=needs_smollm2),
        pytest.param("custom_generate", "the same text", marks=needs_smollm2),
        ("speculative_drafter", "the same text"),
        pytest.param("another_tokenizer", "the text: 'The capital of France", marks=needs_smollm2),
        pytest.param("streaming", "Paris", marks=needs_smollm2),
        pytest.param("draft_model", "the same text", marks=needs_smollm2),
        pytest.param("grammar", '{"recipient":"Ada Lovelace"', marks=needs_smollm2),
        pytest.param("chat", "> Write the same numbers once more.", marks=needs_smollm2),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_example(name: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out


def test_a_small_model_that_is_padded_otherwise_drafts_for_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("large", 64), ("small", 80)):
        tiny_llama(vocab_size=size).save_pretrained(tmp_path / name)
        words().save_pretrained(tmp_path / name)
    monkeypatch.setattr("specflow.CostAware", lambda meter: Fixed(3))  # so small a target is as cheap as its drafter
    monkeypatch.setattr("sys.argv", ["draft_model.py", str(tmp_path / "large"), str(tmp_path / "small")])
    runpy.run_path(str(EXAMPLES / "draft_model.py"), run_name="__main__")
    assert "the same text" in capsys.readouterr().out


def told_by_torchrun(rank: int, port: int) -> dict[str, str]:
    """What one of two processes finds in its environment."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def first_process(port: int, out: Path) -> None:
    """The first of two processes that run the example."""
    environ.update(told_by_torchrun(0, port))
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    with out.open("w") as file, redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / "tensor_parallel.py"), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_sharded_target_says_under_a_whole_drafter_what_the_whole_target_says(tmp_path: Path) -> None:
    """One text, and several at once. The first process is a fork of this one, so that it need not import torch again;
    the second hashes otherwise, so that what goes by the order of a set would show."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, own = tmp_path / "out", {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    first = get_context("fork").Process(target=first_process, args=(port, out))
    first.start()
    command, told = [sys.executable, str(EXAMPLES / "tensor_parallel.py")], environ | own | told_by_torchrun(1, port)
    with Popen(command, env=told) as second:
        try:
            first.join(timeout=300)
            assert second.wait(timeout=60) == 0
        finally:
            first.kill()
            second.kill()
    assert first.exitcode == 0
    assert "sharded parameters in 2 processes\nthe same 6 texts" in out.read_text()


def test_every_example_is_run_here_or_in_a_file_of_its_own() -> None:
    here = Path(__file__)
    for example in EXAMPLES.glob("*.py"):
        own = here.with_name(f"test_{example.stem}.py")
        assert f'"{example.stem}' in here.read_text() or f'"{example.name}"' in own.read_text(), example.name
