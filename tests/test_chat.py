"""A conversation: what was read is not read again, commands change the next answer, and Ctrl-C ends that answer."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO, StringIO, TextIOWrapper
from itertools import product
from pathlib import Path
from time import monotonic

import pytest
from attrs import evolve
from returns.result import Success
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from specflow import DecodeState, Finished, Tokens, autoregressive_generate, chat, cli
from specflow.chat import ACCEPTED, COMMANDS, CORRECTED, OWN
from specflow.commands import Told
from specflow.loop import grow
from specflow.models import Loaded, load
from specflow.state import Count, Request, Step, Tally
from specflow.trace import Recorder, Trace
from specflow.trace.words import visible
from tests.test_cli import answer, tiny, words
from tests.toys import passes_of, tiny_llama

__all__ = ["tiny", "words"]


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *lines: str, more: str = ""
) -> tuple[list[str], str, int]:
    """What is answered, a line each, what is said beside, and the exit code."""
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("\n".join(lines).encode()), encoding="ascii"))
    arguments = ["--model", str(folder), "--dtype", "float64", "--max-new-tokens", "9", *more.split()]
    code = cli.main(["chat", *arguments])
    told = capsys.readouterr()
    return [line.strip() for line in told.out.splitlines()], told.err, code


def test_an_answer_is_the_models_and_what_was_read_is_not_read_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(tiny, "float64").unwrap()
    fed = passes_of(loaded.model)
    monkeypatch.setattr("specflow.commands.load", lambda name, dtype: Success(loaded))
    lines = "w5 w6 w7 w5 w6", "w9 w8", "/policy fixed", "w3"
    answers, _, code = talk(monkeypatch, capsys, tiny, *lines, more="--drafter none --max-new-tokens 5")
    assert code == 0
    assert len(answers) == 3
    read = sum(fed)
    text = "w5 w6 w7 w5 w6"
    for said, question in zip(answers, ("w9 w8", "w3", ""), strict=True):
        assert said == answer_to(loaded, text, 5)
        text = f"{text} {said} {question}".strip()
    # Each token once at most: reading each text from its beginning takes twice as many.
    assert read < len(loaded.ids(text))


def test_a_draft_model_is_loaded_once_and_reads_the_conversation_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helper = load(tiny, "float64").unwrap()
    fed, names = passes_of(helper.model), []

    def noted(name: str, dtype: str) -> Success[Loaded]:
        names.append(name)
        return Success(helper)

    monkeypatch.setattr(cli, "load", noted)
    lines = "w5 w6 w7 w5 w6", "w9 w8", "/policy fixed 2", "w3"
    more = f"--draft-model {tiny} --policy fixed --gamma 2 --max-new-tokens 3"
    answers, _, code = talk(monkeypatch, capsys, tiny, *lines, more=more)
    assert (code, len(answers)) == (0, 3)
    assert names == [str(tiny)]
    assert fed[0] == 5
    assert max(fed[1:]) <= 5, fed  # reading the text from its beginning is reading 10, and then 14


def answer_to(loaded: Loaded, text: str, most: int) -> str:
    """What the model says without the command."""
    eos = list(loaded.stop)
    return loaded.text(autoregressive_generate(list(loaded.ids(text)), loaded.model, most, eos_tokens_id=eos))


def test_commands_change_the_next_answer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        *(
            "w5 w6 w7 w5 w6",
            "/compare",
            "/stats",
            f"/save {tmp_path / 'a'}",
            f"/trace {tmp_path / 'a.json'}",
            f"/trace {tmp_path / 'a.html'}",
            "/reset",
            "/drafter tree",
            "w5 w6 w7 w5 w6",
        ),
        *("/reset", "/temperature 1.5", "/seed 3", "w5 w6", "/compare", "/drafter lookup", "/reset", "w5 w6"),
        *("/sample off", "/policy cost 3", "/rule block", "/max 2", "/reset", "w5 w6 w7 w5 w6", "/help", "/quit", "w1"),
    ]
    answers, beside, code = talk(monkeypatch, capsys, tiny, *lines)
    assert (code, len(answers)) == (0, 5)
    nine = " ".join(answer(tiny).split()[:9])
    assert answers[0] == answers[1] == nine
    assert answers[2] == answers[3] != nine
    assert answers[4] == " ".join(nine.split()[:2])
    assert beside.count("; the same text]") == 2
    assert "drafter tree" not in beside
    assert "cut after 2 tokens; /max N allows more" in beside
    assert all(f"/{name}" in beside for name in COMMANDS)
    saved = json.loads((tmp_path / "a").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["answers"][0]["usage"]["completion_tokens"] == 9
    trace = Trace.load(tmp_path / "a.json")
    loaded = load(tiny).unwrap()
    assert (trace.prompt, loaded.text(trace.output)) == (loaded.ids("w5 w6 w7 w5 w6"), answers[0])
    assert trace.about["title"] == "suffix, cost, 16 at most"
    assert (tmp_path / "a.html").read_text() == trace.html()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/draftr x", "there is no such command: received /draftr; /drafter or /help lists them"),
        ("/drafter x", "there is no such drafter: received 'x'; name one of none, suffix"),
        ("/drafter llm", "there is no model to draft with"),
        ("/policy x", "there is no such policy"),
        ("/policy fixed 0", "gamma is below 1: received 0"),
        ("/policy fixed x", "gamma is no number: received 'x'"),
        ("/rule x", "there is no such rule"),
        ("/temperature 0", "temperature is not a positive number"),
        ("/temperature", "temperature is no number: received ''"),
        ("/seed x", "seed is no number"),
        ("/max -1", "the number of new tokens is negative"),
        ("/sample x", "that is neither on nor off"),
        ("/grammar x", "there is no such kind of grammar"),
        ("/grammar json no/such", "--json-schema cannot be read"),
        ("/compare", "nothing was answered yet"),
        ("/save .", "the file cannot be written"),
        ("/trace", "a trace is a page or JSON: received ''; name a file that ends in .html or .json"),
        ("/trace page.html", "nothing was answered yet: received no answer; ask something first"),
        ("/save ~no-such-user/a", "that names no file ("),
        ("/trace ~no-such-user/a.html", "that names no file ("),
        ("/grammar json ~no-such-user/a", "that names no file ("),
        ("/grammar lark a\0", "that names no file ("),
        ("/save a\0", "that names no file ("),
        ("/trace a\0.json", "that names no file ("),
        ("w5 " * 200, "the prompt is longer than the target's context of 128: received 200 tokens; /reset begins anew"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_the_talk_goes_on(
    line: str, sentence: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, beside, code = talk(monkeypatch, capsys, tiny, line, "w5 w6 w7 w5 w6")
    assert code == 2
    assert f"specflow: {sentence}" in beside.splitlines()[0]
    assert answers == [" ".join(answer(tiny).split()[:9])]


@pytest.mark.parametrize("kind", ["json", "lark"])
def test_a_file_of_a_grammar_may_lie_in_the_home(
    kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, beside, _ = talk(monkeypatch, capsys, tiny, f"/grammar {kind} ~/none")
    assert f"received {tmp_path / 'none'}; give a file of text" in beside


def test_a_conversation_is_saved_in_a_new_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    _, beside, code = talk(monkeypatch, capsys, tiny, f"/save {path}", f"/save {tmp_path / 'b'}")
    assert code == 2
    assert "the file cannot be written (there is one already)" in beside
    assert path.read_text() == "old"
    assert json.loads((tmp_path / "b").read_text())["messages"] == []


def test_a_trace_is_of_the_last_answer_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a new conversation begins with a text that the one before came by."""
    said = answer(tiny).split()[:9]
    again = " ".join(["w5 w6 w7 w5 w6", *said[:4]])
    lines = "w5 w6 w7 w5 w6", "/reset", f"/trace {tmp_path / 'none.json'}", again, f"/trace {tmp_path / 'a.json'}"
    answers, beside, code = talk(monkeypatch, capsys, tiny, *lines, f"/trace {tmp_path / 'no' / 'a.json'}")
    trace, loaded = Trace.load(tmp_path / "a.json"), load(tiny).unwrap()
    assert (trace.prompt, loaded.text(trace.output)) == (loaded.ids(again), answers[1])
    assert code == 2
    assert beside.count("specflow: ") == 2
    assert "nothing was answered yet" in beside
    assert "no such folder" in beside or "cannot be written" in beside
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_context_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, beside, _ = talk(monkeypatch, capsys, tiny, "w5 " * 125)
    assert "[the model's context of 128 tokens is full; /reset begins anew]" in beside


def test_bytes_that_are_not_utf_8_are_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"caf\xe9\nw5"), encoding="utf-8"))
    assert cli.main(["chat", "--model", str(tiny), "--dtype", "float64", "--max-new-tokens", "2"]) == 2
    assert "specflow: prompt is not UTF-8" in capsys.readouterr().err


def test_ctrl_c_in_a_pipe_ends_the_program(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(step: Step, state: DecodeState) -> Iterator[tuple[Tokens, DecodeState | Finished]]:
        yield (), state
        raise KeyboardInterrupt

    monkeypatch.setattr("specflow.commands.grow", interrupted)
    answers, beside, code = talk(monkeypatch, capsys, tiny, "w5", "w6")
    assert (answers, code) == ([""], 130)
    assert "[stopped]" in beside


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("no kernel"), 2)])
def test_a_comparison_that_is_not_finished_says_nothing_and_changes_nothing(
    error: BaseException,
    code: int,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grown = 0

    def once(step: Step, state: DecodeState) -> Iterator[tuple[Tokens, DecodeState | Finished]]:
        nonlocal grown
        grown += 1
        if grown == 2:
            raise error
        return grow(step, state)

    monkeypatch.setattr("specflow.commands.grow", once)
    lines = "w5 w6 w7 w5 w6", "/compare", "/reset", "w5 w6 w7 w5 w6"
    answers, beside, ended = talk(monkeypatch, capsys, tiny, *lines, more="--policy fixed")
    assert (ended, len(answers)) == (code, 1 if code == 130 else 2)
    assert "without drafts" not in beside
    assert "acceptance 0/0" not in beside


def test_what_is_made_ready_takes_no_time_of_an_answer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    def counting(state: DecodeState) -> DecodeState:
        later(5 if not state.output else 0.5)  # the first step reads the prompt
        return evolve(state, tokens=(*state.tokens, 5), tally=state.tally + Tally(1))

    def prepare(settings: chat.Settings) -> Callable[[DecodeState], tuple[Step, Recorder]]:
        later(300)

        def ready(state: DecodeState) -> tuple[Step, Recorder]:
            later(70)  # a larger context of llama.cpp is made
            return counting, Recorder()

        return ready

    monkeypatch.setattr(chat, "perf_counter", lambda: now)
    settings = cli._parser().parse_args(["chat", "--max-new-tokens", "5", "--raw"])
    said = StringIO()
    screen = chat.Screen(Console(file=said, force_terminal=True, color_system=None))
    conversation = chat.Talk(settings, load(tiny, "float64").unwrap(), prepare, screen)
    conversation.answer("w5 w6")
    assert (conversation.seconds, conversation.pace) == (7, 2)
    COMMANDS["compare"][2](conversation, "")
    assert "[after the first step: 2.0 tokens/s with drafts, 2.0 without, 1.00 times as fast]" in said.getvalue()


def test_a_comparison_is_with_the_settings_of_the_answer(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "w5 w6 w7 w5 w6", "/temperature 3", "/seed 1", "/compare"
    _, beside, code = talk(monkeypatch, capsys, tiny, *lines)
    assert code == 0
    assert "[without drafts: 9 tokens, 9 steps; the same text]" in beside


def test_a_mark_of_byte_order_is_no_part_of_the_first_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, _, code = talk(monkeypatch, capsys, tiny, "\ufeff/max 2", "w5 w6 w7 w5 w6")
    assert (answers, code) == ([" ".join(answer(tiny).split()[:2])], 0)


def test_at_a_terminal_only_answers_go_into_a_file_and_half_a_character_ends_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, theirs = pty.openpty()
    os.write(mine, b"caf\xe9\nw5 w6 w7 w5 w6\n\x04")
    with open(theirs, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main(["chat", "--model", str(tiny), "--dtype", "float64", "--max-new-tokens", "9"]) == 0
    os.close(mine)
    told = capsys.readouterr()
    assert told.out == f"{' '.join(answer(tiny).split()[:9])}\n"
    assert "> specflow: prompt is not UTF-8" in told.err
    assert told.err.endswith("> \n")


def test_an_engine_is_asked_about_as_in_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    arguments = ["--engine", "llama.cpp", "--model", str(tmp_path / "x.gguf"), "--accelerate", "fast"]
    assert cli.main(["chat", *arguments]) == 2
    assert "--accelerate is not for llama.cpp" in capsys.readouterr().err


def of_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer of which each token is a byte."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0x00>")


def test_a_character_is_shown_when_it_is_whole() -> None:
    loaded = Loaded(tiny_llama(vocab_size=256), of_bytes())
    for text in ("aé€😀b", "שלום", "é" * 50):
        told = Told(loaded)
        pieces = [told.more(token) for token in text.encode()]
        assert "".join(pieces) == text
        assert [piece for piece in pieces if piece] == [*text]
        assert told.rest() == ""
    told = Told(loaded)
    assert [told.more(token) for token in "😀".encode()[:3]] == [""] * 3
    assert set(told.rest()) == {"\N{REPLACEMENT CHARACTER}"}


def test_a_word_behind_a_special_token_keeps_its_space() -> None:
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "▁a": 1, "▁b": 2}, unk_token="</s>"))
    unspaced = decoders.Strip(" ", 1, 0)  # of a text, as those of Llama 2 and Mistral do
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), unspaced])
    tokenizer.add_special_tokens(["<x>"])
    loaded = Loaded(tiny_llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    for tokens in product((1, 2, 3), repeat=4):
        told = Told(loaded)
        assert "".join([told.more(token) for token in tokens]) + told.rest() == loaded.text(tokens)


def test_a_terminal_is_shown_what_a_file_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    colours = Tokenizer(
        models.WordLevel({f"\x1b[{i}m": i for i in range(model.config.vocab_size)}, unk_token="\x1b[0m")
    )
    PreTrainedTokenizerFast(tokenizer_object=colours, eos_token="\x1b[1m").save_pretrained(tmp_path)
    arguments = ["generate", "x", "--model", str(tmp_path), "--raw", "--dtype", "float64", "--max-new-tokens", "60"]
    assert cli.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["text"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{said}\n" != f"{visible(said)}\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{visible(said)}\n"


def test_the_colours_tell_where_a_token_comes_from() -> None:
    before = DecodeState(Request((1,), 9), (1,))

    def after(tokens: Tokens, tally: Tally) -> list[str]:
        return [*chat._styles(before, evolve(before, tokens=(1, *tokens), tally=tally))]

    drafted = (("a", Count(3, 2)),)
    assert after((5, 6, 7), Tally(1, drafted, (1, 1, 1), (1, 1))) == [ACCEPTED, ACCEPTED, CORRECTED]
    assert after((5, 6, 7), Tally(1, (("a", Count(2, 2)),), (1, 1), (1, 1))) == [ACCEPTED, ACCEPTED, OWN]
    assert after((5,), Tally(1)) == [OWN]
    shown = StringIO()
    screen = chat.Screen(Console(file=shown, force_terminal=True, color_system="standard"))
    screen.show("w5\x1b[31m\x9b2J\u202e", ACCEPTED)
    assert shown.getvalue() == "\x1b[32mw5␛[31m⟨U+009B⟩2J⟨U+202E⟩\x1b[0m"


SLOW = """
import fcntl, signal, sys, termios, time
import specflow.cli as cli
import specflow.commands as commands
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
grow = commands.grow
def slowly(step, state):
    for outcome in grow(step, state):
        time.sleep(0.2)
        yield outcome
commands.grow = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


def test_at_a_terminal_ctrl_c_stops_an_answer_and_not_the_program(tiny: Path) -> None:
    mine, theirs = pty.openpty()
    arguments = ["--model", str(tiny), "--dtype", "float64", "--max-new-tokens", "100000", "--drafter", "none"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "chat", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        left = until(mine, b"> ")
        os.write(mine, b"w5 w6 w7\n")
        left = until(mine, b"w5 w6 w7\r\n", left)
        left = until(mine, b" w", left)
        os.write(mine, b"\x03")
        left = until(mine, b"[stopped]", left)
        left = until(mine, b"> ", left)
        os.write(mine, b"/stats\n")
        left = until(mine, b"1: 3 + ", left)
        left = until(mine, b"> ", left)
        os.write(mine, b"/compare\n")  # as far as the answer came
        left = until(mine, b"; the same text]", left)
        left = until(mine, b"> ", left)
        interrupted(mine, b"> ")  # it also drops what was typed and not yet read
        os.write(mine, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def interrupted(terminal: int, wanted: bytes) -> None:
    """Ctrl-C until something is said: Python loses one that comes between a prompt and its wait for a key."""
    for _ in range(12):
        os.write(terminal, b"\x03")
        with suppress(AssertionError):
            until(terminal, wanted, seconds=10)
            return
    pytest.fail(f"no Ctrl-C was answered by {wanted!r}")


def until(terminal: int, wanted: bytes, found: bytes = b"", seconds: float = 120) -> bytes:
    """Reads until something is said, and returns what was said behind it."""
    end = monotonic() + seconds
    while wanted not in found:
        assert monotonic() < end, found
        if select.select([terminal], [], [], 1)[0]:
            found += os.read(terminal, 4096)
    return found.partition(wanted)[2]
