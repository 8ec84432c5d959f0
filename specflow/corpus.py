"""A corpus: prompts in a file, a line each, and a file to which the answers are added, a line each as it is ready."""

from __future__ import annotations

import json
import os
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from errno import ENOSPC
from functools import partial
from pathlib import Path
from stat import S_ISREG
from time import perf_counter
from typing import Final, TextIO, TypeAlias, final

from attrs import asdict, define, field, frozen

from specflow.batch import Failed, together
from specflow.errors import DecodeError, said
from specflow.guards.checks import is_whole, shown
from specflow.models import check_messages, check_text
from specflow.origin import short
from specflow.state import Count, DecodeState, Reason, Tally
from specflow.usage import Positions, Usage

Id: TypeAlias = int | str

Messages: TypeAlias = tuple[Mapping[str, str], ...]
"""A conversation: what was said by whom, each with a `role` and a `content`."""


# Prompts.


@final
@frozen
class Row:
    """What one line asks: a prompt, or messages."""

    id: Id
    asked: str | Messages

    @property
    def name(self) -> str:
        """A name for what it asks."""
        return short(json.dumps(self.asked, sort_keys=True).encode())


FORMS: Final = (
    'write {"id": 1, "prompt": "…"}, {"id": 1, "messages": [{"role": "user", "content": "…"}]}, '
    'or {"question_id": 1, "turns": ["…"]}'
)


def read_rows(path: Path, *, raw: bool) -> tuple[Row, ...]:
    """The rows of a JSONL file. Blank lines and other fields are ignored; of several turns the first is asked.

    `DecodeError` for a file that cannot be read or holds nothing, for the first line that asks nothing or not in UTF-8,
    for an id that is not new, and where bare prompts are wanted, `raw`, for messages.
    """
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    except OSError as error:
        happened = f"the prompts cannot be read ({said(error)})"
        raise DecodeError("file", happened, shown(str(path)), "give a JSONL file") from error
    rows: list[Row] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        row = _row(line, where)
        first = places.setdefault(str(row.id), number)  # 1 and "1" would have one seed
        if first != number:
            raise DecodeError("file", f"{where} has the id of line {first}", shown(row.id), "number the texts apart")
        if raw and not isinstance(row.asked, str):
            happened, remedy = f"{where} holds messages, which only a chat template joins", "leave it out"
            raise DecodeError("raw", happened, "--raw", remedy)
        rows.append(row)
    if not rows:
        raise DecodeError("file", "the file holds no prompts", shown(str(path)), "give at least one line")
    return tuple(rows)


def _row(line: bytes, where: str) -> Row:
    match _parsed(line):
        case {"id": id, "prompt": asked, **others} if "messages" not in others:
            pass
        case {"id": id, "messages": [*_] as asked, **others} if "prompt" not in others:
            pass
        case {"question_id": id, "turns": [asked, *_]}:
            pass
        case _:
            id = asked = None
    if not (isinstance(id, str) or is_whole(id)) or not isinstance(asked, str | list):
        raise DecodeError("file", f"{where} asks nothing", shown(line.decode(errors="replace")), FORMS)
    try:
        check_text("the id", str(id))
        if isinstance(asked, str):
            check_text("the prompt", asked)
            return Row(id, asked)
        check_messages("messages", asked)
    except DecodeError as error:
        raise DecodeError("file", f"{where}: {error.happened}", error.received, error.remedy) from error
    return Row(id, tuple(asked))


def _parsed(line: bytes) -> object:
    """What a line says; None where it is no JSON."""
    with suppress(ValueError, RecursionError):
        value: object = json.loads(line.decode())
        return value
    return None


# Answers.


@final
@frozen
class Answer:
    """What one line of answers says: `reason` is why the text ended, and `seed` its own seed where there is one.

    An answer to a single prompt has no id. One that Ctrl-C ended was "interrupted". `origin` is what an answer in a
    file comes of: the model, the law, and a name for its `prompt`.
    """

    id: Id | None
    text: str
    reason: str
    steps: int
    usage: Usage
    positions: Positions
    seed: int | None = None
    origin: Mapping[str, str] | None = None

    @classmethod
    def of(
        cls,
        id: Id | None,
        text: str,
        state: DecodeState,
        reason: Reason | None,
        seed: int | None,
        origin: Mapping[str, str] | None = None,
    ) -> Answer:
        """What is said of a text; it has a reason where it ended."""
        why = "interrupted" if reason is None else reason.value
        return cls(id, text, why, state.tally.steps, Usage.of(state), Positions.of(state.tally), seed, origin)

    @property
    def line(self) -> str:
        """It as JSON, on one line."""
        return json.dumps(asdict(self, filter=lambda _, value: value is not None))


@final
@define(eq=False)
class Answers:
    """A file that answers are added to. `done` are those that it held before: the id of each, and its origin."""

    done: Mapping[Id, Mapping[str, str]]
    _descriptor: int
    _whole: int | None = None
    """Of how many bytes the lines are that are whole, where there is another."""

    def cut(self) -> None:
        """Remove a last line that is not whole."""
        if self._whole is not None:
            os.truncate(self._descriptor, self._whole)
            self._whole = None

    def add(self, answer: Answer) -> None:
        """One line more, in one write: whoever is killed leaves whole lines. `OSError` where there is no room."""
        self.cut()
        line = answer.line.encode() + b"\n"
        if os.write(self._descriptor, line) < len(line):
            raise OSError(ENOSPC, os.strerror(ENOSPC))


BEGINNING: Final = b'{"id": '
"""What each line of answers begins with."""


@contextmanager
def answers_in(path: Path, rows: Sequence[Row], seeds: Mapping[Id, int | None], *, resume: bool) -> Iterator[Answers]:
    """The file of the answers to `rows`, each with its own seed, where there is one.

    To `resume` is to go on with what it holds: a last line that is not whole is removed, once an answer is added or all
    went well, as whoever asks may refuse what is `done`. `DecodeError`, and the file is left as it is, where it cannot
    be written, where another process writes it, for a line that answers none of these or does not say what it comes of,
    and for a file that holds anything where it is not resumed.
    """
    remedy = "name another file"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        happened = f"the answers cannot be written ({said(error)})"
        raise DecodeError("out", happened, shown(str(path)), remedy) from error
    try:
        kind = os.fstat(descriptor)
        done: dict[Id, Mapping[str, str]] = {}
        whole: int | None = None
        if S_ISREG(kind.st_mode):
            if not _locked(descriptor):
                raise DecodeError("out", "another process writes its answers there", shown(str(path)), remedy)
            if kind.st_size and not resume:
                remedy = f"add --resume to go on with it, or {remedy}"
                raise DecodeError("out", "the file of the answers is not empty", shown(str(path)), remedy)
            content = path.read_bytes()
            done, size = _done(path, content, {row.id: (row.name, seeds[row.id]) for row in rows})
            whole = size if size < len(content) else None
        answers = Answers(done, descriptor, whole)
        yield answers
        answers.cut()
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether no other process has locked the file, which then is this one's, where the system knows of locks."""
    if sys.platform != "win32":
        from fcntl import LOCK_EX, LOCK_NB, flock  # noqa: PLC0415 - it is not everywhere

        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
    return True


def _done(
    path: Path, content: bytes, asked: Mapping[Id, tuple[str, int | None]]
) -> tuple[dict[Id, Mapping[str, str]], int]:
    """What is answered, of the prompts and seeds that are asked, and how many bytes the lines take.

    A last line without its end is not counted.
    """
    *lines, last = content.split(b"\n")
    is_cut = _parsed(last) is None and (last.startswith(BEGINNING) or BEGINNING.startswith(last))
    places: dict[Id, int] = {}
    done: dict[Id, Mapping[str, str]] = {}
    for number, line in enumerate(lines if is_cut else [*lines, last], 1):
        happened = None
        match _parsed(line):
            case {"id": (int() | str()) as id, "text": str(), "reason": str(), "usage": {}, **others}:
                origin = others.get("origin")
                if id not in asked:
                    happened = "answers what is not asked"
                elif id in places:
                    happened = f"has the id of line {places[id]}"
                elif others.get("seed") != asked[id][1]:
                    happened = "has another seed"
                elif not isinstance(origin, dict):
                    happened = "does not say what it comes of"
                elif origin.get("prompt") != asked[id][0]:
                    happened = "answers another prompt"
                elif number <= len(lines):
                    done[id] = origin
                places[id] = number
            case _:
                happened = "is no answer"
        if happened is not None:
            received, remedy = shown(line.decode(errors="replace")), "name another file, or mend this one"
            raise DecodeError("out", f"line {number} of {path} {happened}", received, remedy)
    return done, len(content) - len(last)


# Progress.

OFTEN, SELDOM = 0.1, 5.0
"""The seconds between two lines of progress at least: on a terminal, where one line is rewritten, and elsewhere."""

ERASE: Final = "\r\x1b[K"
"""What takes a terminal back to the beginning of an empty line."""


@final
@define(eq=False)
class Progress:
    """How far a corpus is: `done` of `total` texts, and what decoding them took."""

    stream: TextIO
    total: int
    done: int
    clock: Callable[[], float] = perf_counter
    _is_terminal: bool = field(init=False)
    _tally: Tally = field(init=False, default=Tally())
    _tokens: int = field(init=False, default=0)
    _new: int = field(init=False, default=0)
    _began: float = field(init=False)
    _told: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._is_terminal = self.stream.isatty()
        self.begin()

    def begin(self) -> None:
        """Decoding begins now."""
        self._began = self._told = self.clock()

    def decoded(self, tokens: int) -> None:
        """So many tokens more, of some text."""
        self._new += tokens
        now = self.clock()
        if now - self._told >= (OFTEN if self._is_terminal else SELDOM):
            self._told = now
            line = f"{self.done}/{self.total} texts, {rate(self._new, now - self._began)}"
            self._print(line, "" if self._is_terminal else "\n")

    def answered(self, answer: Answer) -> None:
        """A text is ready."""
        self.done += 1
        drafts = answer.usage.completion_tokens_details
        self._tokens += answer.usage.completion_tokens
        self._tally += Tally(answer.steps, (("", Count(drafts.judged, drafts.accepted_prediction_tokens)),))

    def say(self, line: str) -> None:
        """Something else, on a line of its own."""
        self._print(line, "\n")

    def end(self) -> None:
        """What was answered, and how fast all was decoded: also what an error or Ctrl-C kept from being an answer."""
        pace = rate(self._new, self.clock() - self._began)
        self.say(f"[{self.done}/{self.total} texts, {_summary(self._tokens, pace, self._tally)}]")

    def _print(self, line: str, end: str) -> None:
        print(f"{ERASE * self._is_terminal}{line}", end=end, file=self.stream, flush=True)


def summary(tokens: int, seconds: float, tally: Tally) -> str:
    """What a line says of decoded text, at its end.

    >>> from specflow.state import Count
    >>> summary(12, 0.5, Tally(4, (("llm", Count(10, 8)),)))
    '12 tokens, 24.0 tokens/s, 4 steps (3.00 tokens a step), acceptance 8/10 = 80%'
    """
    return _summary(tokens, rate(tokens, seconds), tally)


def _summary(tokens: int, pace: str, tally: Tally) -> str:
    acceptance = f"acceptance {tally.accepted}/{tally.drafted} = {tally.acceptance_rate:.0%}"
    steps = f"{tally.steps} steps ({tokens / max(tally.steps, 1):.2f} tokens a step)"
    return f"{tokens} tokens, {pace}, {steps}, {acceptance}"


def rate(tokens: int, seconds: float) -> str:
    """How fast that is; the shortest time counts as a nanosecond."""
    return f"{tokens / max(seconds, 1e-9):.1f} tokens/s"


# All of it.


def answer_all(
    rows: Sequence[Row], decode: Callable[[Row], Answer], slots: int, answers: Answers, progress: Progress
) -> None:
    """Decode rows, up to `slots` of them at a time, and add each answer as it is ready.

    One that fails is told of, and not answered; the others go on.
    """
    with closing(together((partial(decode, row) for row in rows), slots)) as ends:
        for number, end in ends:
            if isinstance(end, Failed):
                progress.say(f"specflow: the text {json.dumps(rows[number].id)} fails: {said(end.error)}")
            else:
                answers.add(end)
                progress.answered(end)
