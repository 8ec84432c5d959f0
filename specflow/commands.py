"""What commands share: the model and the prompt that somebody names, and how a text grows, or fails in one sentence."""

from __future__ import annotations

import argparse
import platform
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, TextIO, final

from attrs import define, field
from torch.nn import Module

from specflow.accelerate import Given, bit_for_bit, fast
from specflow.converted import is_gguf
from specflow.errors import DecodeError, said, unwrap
from specflow.guards.checks import shown
from specflow.interop.llama_cpp import check_installed
from specflow.loop import grow
from specflow.models import Loaded, file_of, load, load_words
from specflow.predictors import limits_of
from specflow.stages.stop import HALF, NO_CHARACTER
from specflow.state import DecodeState, Finished, Step, Tokens

ACCELERATE: Final[Mapping[str, Callable[[Module, Given], Module]]] = {
    "no": lambda model, given: model,
    "fast": fast,
    "bit-for-bit": bit_for_bit,
}
"""What `--accelerate` names: what becomes of the target before it decodes."""

TORCH, LLAMA_CPP = ENGINES = ("torch", "llama.cpp")
"""What computes the target's passes."""

REMEDY: Final = "try another --dtype, or --accelerate no"
"""What may help where a model fails."""

STANDARD_INPUT: Final = "-"
"""The prompt that stands for what comes on the standard input."""


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not.

    >>> version_of("no-such-package")
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The CPU as Linux names it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def prompt_of(given: str | None, stream: TextIO | None) -> str | None:
    """The prompt that was given, or what `stream` holds: where it is `-`, or where there is none and nobody types.

    The newline at its end is left out. None where neither is there: a terminal is not waited for. `DecodeError` for
    what is empty or not UTF-8.
    """
    if given not in {None, STANDARD_INPUT} or (given is None and (stream is None or stream.isatty())):
        return given
    if stream is None:
        happened, received = "the standard input is closed", shown(given)
        raise DecodeError("prompt", happened, received, "give the prompt as an argument")
    try:
        written = stream.buffer.read().removeprefix(BOM_UTF8)
        text = written.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        received = shown(error.object[max(0, error.start - 10) : error.end])
        raise DecodeError("prompt", "the standard input is not UTF-8", received, "give a text in UTF-8") from error
    except (OSError, AttributeError) as error:  # it is a directory, or has no bytes
        happened = f"the standard input cannot be read ({said(error)})"
        raise DecodeError("prompt", happened, shown(given), "give the prompt as an argument") from error
    if not text.strip():
        happened, received = "the standard input is empty", "no text"
        raise DecodeError("prompt", happened, received, 'pipe a prompt into the command, or give one: generate "…"')
    return text


@contextmanager
def one_sentence(parameter: str, happened: str, remedy: str) -> Iterator[None]:
    """What somebody else's program raises, which may be anything, as a `DecodeError`; those of ours as they are."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(parameter, happened, said(error), remedy) from error


def check_engine(args: argparse.Namespace, options: Mapping[str, object]) -> None:
    """`DecodeError` where `--engine llama.cpp` is asked for and cannot run `--model`, where one of `options`, which are
    not for it, was given (None: it was not), and where it is not installed."""
    if args.engine == TORCH:
        return
    if not is_gguf(file_of(args.model)):
        remedy = "name one with --model"
        raise DecodeError("engine", f"{LLAMA_CPP} runs GGUF files", f"--model {args.model}", remedy)
    option = next((option for option, given in options.items() if given is not None), None)
    if option is not None:
        happened, remedy = f"{option} is not for {LLAMA_CPP}", f"leave it out, or use --engine {TORCH}"
        raise DecodeError("engine", happened, f"{option} {options[option]}", remedy)
    check_installed()


def named_model(args: argparse.Namespace, *, weights: bool = True) -> Loaded:
    """The model of `--model` in `--dtype`, or without its weights. Stop tokens that it can never say are told of."""
    loaded = unwrap(load(args.model, args.dtype) if weights else load_words(args.model))
    for token in sorted(loaded.never_said):
        happened = f"the stop token {token} is outside the model's vocabulary of {vocabulary_of(loaded)}"
        print(f"specflow: {happened}, and ends no text", file=sys.stderr)
    return loaded


def outcomes(step: Step, state: DecodeState, loaded: Loaded) -> Iterator[tuple[Tokens, DecodeState | Finished]]:
    """`grow`, for who shows the text. `DecodeError` for whatever the model raises, and for a token without a text."""
    with one_sentence("model", f"the model cannot be run in {str(loaded.model.dtype).removeprefix('torch.')}", REMEDY):
        for new, outcome in grow(step, state):
            _check_shown(new, loaded)
            yield new, outcome


@final
@define(eq=False)
class Told:
    """The text of tokens, piece by piece as it is certain: a token may be half a character."""

    loaded: Loaded
    _tokens: Tokens = field(init=False, default=())
    _from: int = field(init=False, default=0)
    _to: int = field(init=False, default=0)

    def more(self, token: int) -> str:
        """What is certain with one token more."""
        self._tokens += (token,)
        text = self._text()
        return "" if text.endswith(NO_CHARACTER) and len(self._tokens) - self._to < HALF else self._take(text)

    def rest(self) -> str:
        """What is left at the end."""
        return self._take(self._text())

    def _text(self) -> str:
        known = self.loaded.text(self._tokens[self._from : self._to])
        return self.loaded.text(self._tokens[self._from :])[len(known) :]

    def _take(self, text: str) -> str:
        if text:  # what is read before a token gives it its space: special tokens alone would not
            self._from = self._to
        self._to = len(self._tokens)
        return text


def _check_shown(tokens: Tokens, loaded: Loaded) -> None:
    """Refuses a token that has no text: what is printed would not be what the model said."""
    size = len(loaded.tokenizer)
    for token in tokens:
        if token >= size and loaded.tokenizer.convert_ids_to_tokens(token) is None:
            happened = f"the model says a token that its tokenizer of {size} does not have"
            raise DecodeError("tokenizer", happened, token, "use the tokenizer that belongs to the model")


def vocabulary_of(loaded: Loaded) -> int:
    """How many tokens a model knows; as many as its tokenizer where it does not tell."""
    return limits_of(loaded.model).vocab_size or len(loaded.tokenizer)
