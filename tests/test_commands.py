"""What a person types around a decode: the version, the help, and a prompt that comes through a pipe."""

from __future__ import annotations

import json
import os
import pty
import sys
import tomllib
from errno import ENOSPC
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch

from specflow import cli, doctor
from specflow.commands import version_of
from specflow.doctor import EXTRAS
from specflow.errors import DecodeError, said
from specflow.files import can_be_written, save_text
from specflow.models import INSTALL
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


# The doctor.


def examined(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    """What the command says as JSON."""
    capsys.readouterr()
    assert cli.main(["doctor", "--json"]) == 0
    told: dict[str, dict[str, object]] = json.loads(capsys.readouterr().out)
    return told


def test_the_doctor_tells_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "user_cache_path", lambda name: tmp_path / name)
    (tmp_path / "specflow" / "model").mkdir(parents=True)
    (tmp_path / "specflow" / "model" / "weights").write_bytes(bytes(3_000_000))
    (tmp_path / "specflow" / "link").symlink_to(tmp_path / "specflow" / "nowhere")
    (tmp_path / "specflow" / "none").symlink_to(tmp_path / "specflow" / "model" / "weights")
    facts = examined(capsys)
    assert facts["versions"]["torch"] == version_of("torch")
    assert facts["dtypes"]["cpu"] == ["float32", "bfloat16", "float64"]
    assert facts["machine"]["threads"] == torch.get_num_threads()
    cache = facts["caches"]["specflow"]
    assert isinstance(cache, dict)
    assert cache["bytes"] == 3_000_000
    assert cli.main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert f"torch         {version_of('torch')}" in page
    assert f"{tmp_path / 'specflow'}: 3 MB" in page


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'llguidance'"), RuntimeError("built for\nmore")]
)
def test_the_doctor_names_the_command_that_helps(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a package is missing, and where it is there and broken."""

    def import_module(name: str) -> None:
        if name == "llguidance":
            raise error

    monkeypatch.setattr(doctor, "import_module", import_module)
    monkeypatch.setattr(doctor, "smollm2_is_installed", lambda: False)
    parts = examined(capsys)["parts"]
    assert parts["grammar"] == {"works": False, "found": said(error), "remedy": "pip install 'specflow[grammar]'"}
    assert parts["smollm2"] == {"works": False, "found": "its package is missing", "remedy": INSTALL}
    assert parts["ray"] == {"works": True, "found": version_of("ray"), "remedy": ""}
    assert cli.main(["doctor"]) == 0
    assert f"{said(error)}; pip install 'specflow[grammar]'" in capsys.readouterr().out


def test_a_doctor_who_cannot_see_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("no driver")

    for place, name in (
        (torch.cuda, "is_available"),
        (doctor, "processor_name"),
        (doctor, "user_cache_path"),
        (doctor, "smollm2_is_installed"),
    ):
        monkeypatch.setattr(place, name, broken)
    facts = examined(capsys)
    for told in (facts["devices"], facts["machine"], facts["parts"]["smollm2"], facts["caches"]["specflow"]):
        assert told == "cannot be told (no driver)"
    assert cli.main(["doctor"]) == 0
    assert "cannot be told (no driver)" in capsys.readouterr().out


def test_each_extra_that_the_project_has_is_looked_for() -> None:
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    named = {each.removesuffix("]'").partition("[")[2] for each in (extra.remedy for extra in EXTRAS.values())} - {""}
    assert named == set(declared["optional-dependencies"]) - {"dev"}


def test_a_text_that_cannot_be_written_whole_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    save_text(path, "old, and longer than the new one\ud800")
    assert path.read_text() == "old, and longer than the new one\\ud800"

    def full(descriptor: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DecodeError, match="the file cannot be written"):
            save_text(path, "new")
    assert path.read_text().startswith("old")
    assert [each.name for each in tmp_path.iterdir()] == ["figures.json"]


def test_a_pipe_takes_a_text_as_it_comes(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    out = Path(f"/dev/fd/{writing}")
    if not out.exists():
        pytest.skip("there is no such device")
    assert can_be_written(out)
    save_text(out, "figures")
    assert os.read(reading, 100) == b"figures"
    os.close(reading)
    os.close(writing)
    for nowhere in (tmp_path, tmp_path / "no" / "file"):
        assert not can_be_written(nowhere)
        with pytest.raises(DecodeError):
            save_text(nowhere, "figures")


def test_no_file_can_be_put_in_a_folder_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")
    assert can_be_written(tmp_path / "file")
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and may(path, mode))  # root may all
    assert not can_be_written(tmp_path / "file")
    assert not can_be_written(tmp_path / "new")
