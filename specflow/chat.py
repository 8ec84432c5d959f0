"""`specflow chat`: a conversation in which one sees what was drafted, and may change how the next answer is decoded."""

from __future__ import annotations

import argparse
import json
import os
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from io import TextIOWrapper, UnsupportedOperation
from pathlib import Path
from time import perf_counter
from typing import Final, TextIO, TypeAlias, final

from attrs import asdict, define, evolve, field, frozen
from rich.console import Console
from rich.text import Text

from specflow.catalogue import DRAFTERS, POLICIES, RULES
from specflow.commands import Told, outcomes
from specflow.corpus import Answer, summary
from specflow.errors import DecodeError, said, unwrap
from specflow.files import save_text
from specflow.guards.checks import shown
from specflow.loop import start
from specflow.models import Loaded, check_text
from specflow.predictors import limits_of
from specflow.state import DecodeState, Finished, Reason, Step
from specflow.trace import Recorder, Trace
from specflow.trace.parts import Origin
from specflow.trace.terminal import ORIGINS, SOURCES
from specflow.trace.words import visible

Settings: TypeAlias = argparse.Namespace
"""The options of `generate`, as they are now."""

Prepare: TypeAlias = Callable[[Settings], Callable[[DecodeState], tuple[Step, Recorder]]]
"""Settings → what makes the step of a text, and what records it. `DecodeError` where they make no sense."""

ACCEPTED, CORRECTED, OWN, DIM = SOURCES[0], ORIGINS[Origin.CORRECTED], "", "dim"
"""The colours, of a trace where it has them: a draft that stands, what replaces one, the target's own, no answer."""


def _styles(before: DecodeState, after: DecodeState) -> Iterator[str]:
    """The colour of each token of a step."""
    step = after.tally - before.tally
    rejected = sum(step.judged_at) > step.accepted
    for i in range(len(after.tokens) - len(before.tokens)):
        yield ACCEPTED if i < step.accepted else CORRECTED if rejected else OWN


@final
@frozen(eq=False)
class Screen:
    """Where it is shown: with colours on a terminal, as plain text elsewhere."""

    console: Console

    def show(self, text: str, style: str = OWN) -> None:
        """Some text, without a newline."""
        text = visible(text)  # a model shall not command the terminal
        if self.console.is_terminal:
            self.console.print(Text(text, style), end="", soft_wrap=True)
        else:
            print(text, end="", flush=True)

    def line(self, text: str, style: str = DIM) -> None:
        """A line that is no answer, and goes to the standard error where answers go into a file."""
        if self.console.is_terminal:
            self.show(f"{text}\n", style)
        else:
            print(text, file=sys.stderr, flush=True)


# A conversation.


@final
@define(eq=False)
class Talk:
    """A conversation: what was said, how the next answer is decoded, and what the answers took."""

    settings: Settings
    loaded: Loaded
    prepare: Prepare
    screen: Screen
    system: str = ""
    messages: list[Mapping[str, str]] = field(factory=list)
    answers: list[Answer] = field(factory=list)
    over: bool = False
    seconds: float = 0.0
    pace: float = 0.0
    """Tokens a second behind the first step, which reads what is new of the prompt; 0 where none were."""
    answered_by: Settings = field(init=False, factory=argparse.Namespace)
    """The settings of the last answer."""
    recorder: Recorder = field(init=False, factory=Recorder)
    _steps: Callable[[DecodeState], tuple[Step, Recorder]] | None = field(init=False, default=None)

    def change(self, **changed: object) -> None:
        """Other settings; where they make no sense the old ones stay. `DecodeError` then."""
        settings = _other(self.settings, **changed)
        self._steps = self.prepare(settings)
        self.settings = settings

    def asked(self, text: str) -> DecodeState:
        """The state from which the answer to `text` is decoded."""
        check_text("prompt", text)
        said_before = [{"role": "system", "content": self.system}] * bool(self.system) + self.messages
        messages = [*said_before, {"role": "user", "content": text}]
        if self.settings.raw or self.loaded.tokenizer.chat_template is None:
            tokens = self.loaded.ids("\n".join(message["content"] for message in messages))
        else:
            tokens = self.loaded.conversation(messages)
        limits = limits_of(self.loaded.model)
        try:
            return unwrap(start(tokens, self.settings.max_new_tokens, self.loaded.stop, limits))
        except DecodeError as error:
            raise DecodeError(error.parameter, error.happened, error.received, "/reset begins anew") from error

    def answer(self, text: str) -> None:
        """Say something, and show the answer as it comes. Ctrl-C ends it, and what was said stays."""
        state, reason = self.decoded(self.asked(text), self.screen)
        self.answered_by = self.settings
        self.messages += [{"role": "user", "content": text}]
        self.messages += [{"role": "assistant", "content": self.loaded.text(state.output)}]
        self.answers.append(Answer.of(None, self.loaded.text(state.output), state, reason, self.settings.seed))
        self.screen.line(f"[{summary(len(state.output), self.seconds, state.tally)}]")
        context = limits_of(self.loaded.model).context
        if reason is None:
            raise KeyboardInterrupt
        if reason is Reason.LIMIT and context is not None and len(state.tokens) >= context:
            self.screen.line(f"[the model's context of {context} tokens is full; /reset begins anew]")
        elif reason is Reason.LIMIT:
            self.screen.line(f"[cut after {len(state.output)} tokens; /max N allows more]")

    def decoded(self, state: DecodeState, screen: Screen | None) -> tuple[DecodeState, Reason | None]:
        """The text that follows, and why it ended; None where Ctrl-C stopped it.

        `KeyboardInterrupt` where it stopped what is made ready before, which takes no time of the text's.
        """
        told, reason = Told(self.loaded), None
        if self._steps is None:
            self._steps = self.prepare(self.settings)
        step, self.recorder = self._steps(state)
        began = perf_counter()
        first: tuple[int, float] | None = None
        with suppress(KeyboardInterrupt):
            for new, outcome in outcomes(step, state, self.loaded):
                after = outcome.state if isinstance(outcome, Finished) else outcome
                first = first or (len(after.tokens), perf_counter())
                styles, state = [*_styles(state, after)], after
                for token, style in zip(new, styles, strict=True):
                    if screen is not None:
                        screen.show(told.more(token), style)
                if isinstance(outcome, Finished):
                    reason = outcome.reason
        ended = perf_counter()
        self.seconds = ended - began
        self.pace = 0.0 if first is None else (len(state.tokens) - first[0]) / max(ended - first[1], 1e-9)
        if screen is not None:
            screen.show(f"{told.rest()}\n")
        return state, reason


def _other(settings: Settings, **changed: object) -> Settings:
    return argparse.Namespace(**{**vars(settings), **changed})


Ask: TypeAlias = Callable[[Talk, str], None]
"""What a command does with what stands behind its name."""


def _drafter(talk: Talk, name: str) -> None:
    _one_of("drafter", name, DRAFTERS)
    talk.change(drafter=name)


def _policy(talk: Talk, given: str) -> None:
    name, _, gamma = given.partition(" ")
    _one_of("policy", name, POLICIES)
    talk.change(policy=name, gamma=_number("gamma", gamma, int) if gamma else talk.settings.gamma)


def _rule(talk: Talk, name: str) -> None:
    _one_of("rule", name, RULES)
    talk.change(rule=name)


def _one_of(name: str, given: str, known: Mapping[str, object]) -> None:
    if given not in known:
        raise DecodeError(name, f"there is no such {name}", shown(given), f"name one of {', '.join(known)}")


def _number(name: str, given: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(given)
    except ValueError as error:
        raise DecodeError(name, f"{name} is no number", shown(given), "give one, such as 1") from error


def _sample(talk: Talk, given: str) -> None:
    off = given == "off"
    if given not in {"", "on", "off"}:
        raise DecodeError("sample", "that is neither on nor off", shown(given), "write /sample, or /sample off")
    none = dict.fromkeys(("temperature", "top_k", "top_p", "seed")) if off else {}
    talk.change(sample=not off, **none)


def _temperature(talk: Talk, given: str) -> None:
    talk.change(temperature=float(_number("temperature", given, float)))


def _seed(talk: Talk, given: str) -> None:
    talk.change(seed=None if given == "off" else _number("seed", given, int))


def _max(talk: Talk, given: str) -> None:
    unwrap(start((0,), count := int(_number("max_new_tokens", given, int))))
    talk.change(max_new_tokens=count)


def _file(name: str, given: str) -> Path:
    """The file that somebody names, with their home for ~."""
    try:
        path = Path(given).expanduser()
        with suppress(OSError):  # whoever opens it says so
            os.stat(path)
    except (RuntimeError, ValueError) as error:  # nobody has that home, or no file can have that name
        raise DecodeError(name, f"that names no file ({said(error)})", shown(given), "name another file") from error
    return path


def _grammar(talk: Talk, given: str) -> None:
    kind, _, content = given.partition(" ")
    none: dict[str, object] = dict.fromkeys(("regex", "choices", "json_schema", "grammar"))
    kinds: Mapping[str, Callable[[], Mapping[str, object]]] = {
        "off": dict,
        "regex": lambda: {"regex": content},
        "choices": lambda: {"choices": [choice.strip() for choice in content.split("|")]},
        "json": lambda: {"json_schema": _file("grammar", content)},
        "lark": lambda: {"grammar": _file("grammar", content)},
    }
    _one_of("kind of grammar", kind, kinds)
    talk.change(**{**none, **kinds[kind]()})


def _compare(talk: Talk, given: str) -> None:
    """The last answer again, without drafts: the same text where nothing is drawn, or by a seed.

    Both are timed behind their first steps: one read the prompt, and the other may find it read.
    """
    if not talk.answers:
        raise DecodeError("compare", "nothing was answered yet", "no answer", "ask something first")
    drafted, most = talk.answers[-1], talk.answers[-1].usage.completion_tokens
    none: dict[str, object] = dict.fromkeys(("draft_model", "head", "bigrams"))
    settings = _other(talk.answered_by, drafter="none", max_new_tokens=most, **none)
    plain = evolve(talk, settings=settings, messages=talk.messages[:-2])
    state, reason = plain.decoded(plain.asked(talk.messages[-2]["content"]), None)
    if reason is None:
        raise KeyboardInterrupt
    same = "the same text" if talk.loaded.text(state.output) == drafted.text else "another text"
    talk.screen.line(f"[without drafts: {len(state.output)} tokens, {state.tally.steps} steps; {same}]")
    if talk.pace and plain.pace:
        paces = f"{talk.pace:.1f} tokens/s with drafts, {plain.pace:.1f} without"
        talk.screen.line(f"[after the first step: {paces}, {talk.pace / plain.pace:.2f} times as fast]")


def _stats(talk: Talk, given: str) -> None:
    for number, answer in enumerate(talk.answers, 1):
        usage, drafts = answer.usage, answer.usage.completion_tokens_details
        counts = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {answer.steps} steps"
        talk.screen.line(f"{number}: {counts}, acceptance {drafts.accepted_prediction_tokens}/{drafts.judged}")
    settings = {name: value for name, value in vars(talk.settings).items() if value not in (None, False, [])}
    settings = {name: value for name, value in settings.items() if name not in {"run", "command"}}
    talk.screen.line(", ".join(f"{name} {value}" for name, value in settings.items()))


def _save(talk: Talk, given: str) -> None:
    record = {"model": str(talk.settings.model), "system": talk.system, "messages": talk.messages}
    answers = [asdict(answer, filter=lambda _, value: value is not None) for answer in talk.answers]
    path, content = _file("save", given), json.dumps({**record, "answers": answers}, indent=1, ensure_ascii=False)
    if os.path.lexists(path):
        raise DecodeError("save", "the file cannot be written (there is one already)", given, "name a new file")
    save_text(path, content)
    talk.screen.line(f"[saved in {given}]")


def _trace(talk: Talk, given: str) -> None:
    path = _file("trace", given)
    kinds: Mapping[str, Callable[[Trace], None]] = {
        ".html": lambda trace: trace.save_html(path),
        ".json": lambda trace: trace.save(path),
    }
    if path.suffix not in kinds:
        raise DecodeError("trace", "a trace is a page or JSON", shown(given), "name a file that ends in .html or .json")
    try:
        trace = talk.recorder.trace
    except DecodeError as error:
        raise DecodeError("trace", "nothing was answered yet", "no answer", "ask something first") from error
    kinds[path.suffix](trace)
    talk.screen.line(f"[the trace of the last answer is in {given}]")


def _system(talk: Talk, given: str) -> None:
    check_text("system", given)
    talk.system = given
    _reset(talk, "")


def _reset(talk: Talk, given: str) -> None:
    talk.messages.clear()
    talk.answers.clear()
    talk.recorder = Recorder()
    talk.screen.line("[a new conversation]")


def _help(talk: Talk, given: str) -> None:
    for name, (usage, about, _) in COMMANDS.items():
        talk.screen.line(f"/{name} {usage}".ljust(60) + about)
    talk.screen.line("an accepted draft", ACCEPTED)
    talk.screen.line("a token in place of a rejected draft", CORRECTED)


def _quit(talk: Talk, given: str) -> None:
    talk.over = True


COMMANDS: Final[Mapping[str, tuple[str, str, Ask]]] = {
    "drafter": ("NAME", f"what proposes tokens: {', '.join(DRAFTERS)}", _drafter),
    "policy": ("NAME [N]", f"how many, N at most: {', '.join(POLICIES)}", _policy),
    "rule": ("NAME", f"what judges them: {', '.join(RULES)}", _rule),
    "sample": ("[off]", "draw tokens, or always take the most probable one", _sample),
    "temperature": ("T", "sample at this temperature", _temperature),
    "seed": ("S | off", "one text for a seed, whatever drafts it", _seed),
    "max": ("N", "the most tokens of an answer", _max),
    "grammar": ("regex R | choices A|B | json FILE | lark FILE | off", "what an answer has to obey", _grammar),
    "compare": ("", "the last answer again without drafts: how fast, and whether the text is the same", _compare),
    "stats": ("", "what each answer took, and the settings", _stats),
    "save": ("FILE", "the conversation and what it took, as JSON", _save),
    "trace": ("FILE", "how each token of the last answer came to be, as a page (.html) or JSON", _trace),
    "system": ("TEXT", "a system message, in a new conversation", _system),
    "reset": ("", "a new conversation", _reset),
    "help": ("", "this", _help),
    "quit": ("", "end; so does Ctrl-D", _quit),
}


def talk(settings: Settings, loaded: Loaded, prepare: Prepare, source: TextIO | None) -> int:
    """Talk until the source ends: 0, or 2 where something that was not typed at a terminal could not be done."""
    screen = Screen(Console(highlight=False))
    conversation, code = Talk(settings, loaded, prepare, screen), 0
    typed = source is not None and source.isatty()
    if typed:
        screen.line(f"{settings.model}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    for line in () if source is None else _typed(source, screen) if typed else _lines(source):
        try:
            _done(conversation, line)
        except DecodeError as error:
            screen.line(f"specflow: {error}", "red")
            code = 0 if typed else 2
        except KeyboardInterrupt:
            screen.line("[stopped]")
            if not typed:
                raise  # who pipes a text stops the program
        if conversation.over:
            break
    return code


def _done(talk: Talk, line: str) -> None:
    """What a line asks for: an answer, or what a command does."""
    if not line.startswith("/"):
        if line:
            talk.answer(line)
        return
    name, _, given = line[1:].partition(" ")
    if name not in COMMANDS:
        near = [f"/{each}" for each in get_close_matches(name, COMMANDS, 1)]
        raise DecodeError("command", "there is no such command", f"/{name}", " or ".join((*near, "/help lists them")))
    COMMANDS[name][2](talk, given.strip())


def _typed(source: TextIO, screen: Screen) -> Iterator[str]:
    """What a person types, a line each, with the keys that edit one. Ctrl-C leaves a line, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - it is not everywhere; input() edits with it
    if isinstance(source, TextIOWrapper):
        with suppress(UnsupportedOperation):  # something was read before
            source.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused as in a pipe, and ends nothing
    while True:
        try:
            yield _line().strip()
        except KeyboardInterrupt:
            screen.line("")
        except EOFError:
            screen.line("")
            return


def _line() -> str:
    """A line, with its prompt where the person sees it, and not in the file of the answers."""
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _lines(source: TextIO) -> Iterator[str]:
    for number, line in enumerate(source.buffer):
        written = line if number else line.removeprefix(BOM_UTF8)
        text = written.decode(errors="surrogateescape").strip()
        if text:
            yield text
