"""What a person types around a decode: the version, the help, and a prompt that comes through a pipe."""

from __future__ import annotations

import os
import pty
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from specflow import cli
from specflow.commands import version_of
from tests.test_cli import PROMPT, answer, refusal, tiny, words

__all__ = ["tiny", "words"]


def piped(monkeypatch: pytest.MonkeyPatch, written: bytes) -> None:
    """From now on this is what comes on the standard input."""
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(written), encoding="ascii"))


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkout that nobody installed, too."""
    for found in (version_of("attrs"), None):
        monkeypatch.setattr(cli, "version_of", lambda package, found=found: found)
        with pytest.raises(SystemExit) as ended:
            cli.main(["--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"specflow {found or '(not installed)'}\n"


def test_without_a_command_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    alone = capsys.readouterr()
    assert "generate" in alone.out
    assert "bench" in alone.out
    assert alone.err == ""


@pytest.mark.usefixtures("_loads_once")
@pytest.mark.parametrize("arguments", [[], ["-"]], ids=["no prompt", "-"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=repr)
def test_a_prompt_through_a_pipe(
    arguments: list[str], end: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, f"\ufeff{PROMPT}{end}".encode())
    more = ["--model", str(tiny), "--dtype", "float64", "--max-new-tokens", "24"]
    assert cli.main(["generate", *arguments, *more]) == 0
    assert capsys.readouterr().out.strip() == answer(tiny)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (b"", "the standard input is empty: received no text; pipe a prompt into the command"),
        (b"\n \n", "the standard input is empty"),
        (b"caf\xe9", "the standard input is not UTF-8: received b'caf\\xe9'; give a text in UTF-8"),
        (b"a" * 999 + b"\xff" * 999, "the standard input is not UTF-8"),
    ],
)
def test_what_comes_through_a_pipe_and_is_no_prompt(
    written: bytes, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["-"]):
        piped(monkeypatch, written)
        assert cli.main(["generate", *arguments, "--model", "no/such/model"]) == 2
        assert sentence in refusal(capsys)


def test_a_standard_input_that_nobody_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["generate", "-", "--model", "no/such/model"]) == 2
    assert "the standard input is closed: received '-'; give the prompt as an argument" in refusal(capsys)
    with tmp_path.joinpath("written").open("w") as written:
        monkeypatch.setattr(sys, "stdin", written)
        assert cli.main(["generate", "-", "--model", "no/such/model"]) == 2
    assert "the standard input cannot be read (" in refusal(capsys)
    piped(monkeypatch, b"w5")
    assert cli.main(["generate", "-", "--file", "prompts", "--out", "answers"]) == 2
    assert "a prompt and a file of prompts are both given" in refusal(capsys)
    assert sys.stdin.buffer.read() == b"w5"


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mine, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert cli.main(["generate", "--model", "no/such/model"]) == 2
    os.close(mine)
    assert "there is nothing to answer: received no prompt; give one, pipe one into the command" in refusal(capsys)
