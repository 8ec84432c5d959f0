"""The `specflow` command: watch a model answer, and measure decoders."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from typing import Final, TextIO, final

import torch
from attrs import fields, frozen
from returns.result import Result, Success, safe
from torch.nn import Module
from transformers import TextStreamer
from transformers.utils import logging

from specflow import bench
from specflow.accelerate import Given, bit_for_bit, fast
from specflow.catalogue import COUPLED, DRAFTERS, POLICIES, RULES, Drafting, Pacing, Setting, step_of
from specflow.drafters import Bigrams
from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import whole
from specflow.loop import start, unfold
from specflow.models import SMOLLM2, DType, Loaded, bigrams_of, check_text, load, said, smollm2_is_converted
from specflow.predictors import CachedPredictor, limits_of
from specflow.processors import (
    GreedyProcessor,
    LogitsProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    TopKNucleusProcessor,
    TopKProcessor,
)
from specflow.randomness import Dice, Sampling, SharedNoise
from specflow.stages import Condition, never, stop_string
from specflow.state import DecodeState, Finished, Step, Tokens


def _bigrams(path: Path | None, loaded: Loaded) -> Bigrams | None:
    """The table in the file; where there is none, the model is asked, and its answers are kept there."""
    if path is None:
        return None
    vocab_size = _vocabulary(loaded)
    if not path.exists():
        print(f"asking the model for its bigrams, once; they are kept in {path}", file=sys.stderr)
        with _one_sentence(f"the model cannot be asked in {loaded.model.dtype}"):
            bigrams = bigrams_of(loaded.model, loaded.tokenizer)
        bigrams.save(path)
    bigrams = Bigrams.load(path)
    if len(bigrams.tokens) != vocab_size:
        remedy = "give the table of this model, or the name of a new file"
        received = f"a table of {len(bigrams.tokens)} tokens for {vocab_size}"
        raise DecodeError("bigrams", "the table is of another vocabulary", received, remedy)
    return bigrams


def _vocabulary(loaded: Loaded) -> int:
    return limits_of(loaded.model).vocab_size or len(loaded.tokenizer)


@final
@frozen
class Options:
    """What `specflow generate` was asked for."""

    prompt: str
    model: str
    raw: bool
    max_new_tokens: int
    dtype: DType
    accelerate: str
    drafter: str | None
    bigrams: Path | None
    draft_model: str | None
    policy: str
    gamma: int
    rule: str | None
    sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: Sequence[str]

    @property
    def drafts(self) -> str:
        """The name of what drafts."""
        return self.drafter or (USUAL if self.draft_model is None else USUAL_OF_MODELS)

    @property
    def judges(self) -> str:
        """The name of the rule that judges drafts."""
        return self.rule or (USUAL_RULE if self.seed is None else USUAL_RULE_OF_SEEDS)


def _can_hold(path: Path) -> bool:
    return path.is_file() or (not path.exists() and path.parent.is_dir() and os.access(path.parent, os.W_OK))


USUAL: Final = "suffix"
"""What drafts unless somebody says otherwise."""

USUAL_OF_MODELS: Final = "llm"
"""What drafts where there is a draft model."""

USUAL_RULE: Final = "reject"
"""What judges drafts."""

USUAL_RULE_OF_SEEDS: Final = "match"
"""What judges drafts where there is a seed."""

ACCELERATE: Final[Mapping[str, Callable[[Module], Module]]] = {
    "no": lambda model: model,
    "fast": lambda model: fast(model, Given.TAKEN),
    "bit-for-bit": lambda model: bit_for_bit(model, Given.TAKEN),
}
"""What becomes of the target before it decodes."""


OUTPUT_FAILED: Final = 1
NOT_DECODED: Final = 2
INTERRUPTED: Final = 130
HUNG_UP: Final = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. The exit code is 0; 2 for what cannot be decoded; 1 where the answer cannot be written.

    130 after Ctrl-C, and 141 where the reader of a pipe has gone, as the shell has it for a program that ends by that
    signal.
    """
    # Where one of them was closed, the answer or the errors go nowhere: what print does with None is write elsewhere.
    sys.stdout, sys.stderr = _opened(sys.stdout), _opened(sys.stderr)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a text that the terminal cannot show, show what can be
    try:
        return _ran(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _hang_up(sys.stdout)
        _hang_up(sys.stderr)
        return HUNG_UP


def _ran(arguments: Sequence[str] | None) -> int:
    try:
        try:
            parsed = _parser().parse_args(arguments)
            run: Callable[[argparse.Namespace], int] = parsed.run
            with warnings.catch_warnings():
                warnings.showwarning = _warn  # type: ignore[assignment] # it takes all that is given
                return run(parsed)
        finally:
            sys.stdout.flush()  # what fails here would fail at the interpreter's end, where nobody can catch it
    except DecodeError as error:  # a value where the decode starts, an exception from a model that breaks down later
        print(f"specflow: {error}", file=sys.stderr)
        return NOT_DECODED
    except BrokenPipeError:
        raise
    except OSError as error:
        _hang_up(sys.stdout)
        print(f"specflow: the answer cannot be written ({said(error)})", file=sys.stderr)
        return OUTPUT_FAILED


def _opened(stream: TextIO | None) -> TextIO:
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream


def _hang_up(stream: TextIO) -> None:
    """Send the rest of what was written nowhere, or the interpreter would complain when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _warn(message: Warning | str, *where: object) -> None:
    print(f"specflow: {message}", file=sys.stderr)


@contextmanager
def _one_sentence(happened: str) -> Iterator[None]:
    """What a model raises, as a `DecodeError`: it is somebody else's program, and may raise whatever it likes."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        remedy = "try another --dtype, or --accelerate no"
        raise DecodeError("model", happened, said(error), remedy) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="specflow", description="Compose LLM decoders, and trust what comes out.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="answer a prompt, streaming the text as it is decoded")
    generate.add_argument("prompt", help="what to say to the model")
    generate.add_argument("--model", default=SMOLLM2, help="smollm2 (default), a local path or a hub name")
    generate.add_argument("--raw", action="store_true", help="continue the prompt itself, without the chat template")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    generate.add_argument(
        "--accelerate",
        choices=tuple(ACCELERATE),
        default="no",
        help="decode with an accelerated model (docs/acceleration.md)",
    )
    generate.add_argument(
        "--drafter",
        choices=tuple(DRAFTERS),
        help=f"what proposes tokens ({USUAL}; with --draft-model {USUAL_OF_MODELS})",
    )
    generate.add_argument(
        "--bigrams",
        type=Path,
        metavar="FILE",
        help="let --drafter tree know the model's own bigrams; it is asked for them once, and FILE keeps them",
    )
    generate.add_argument("--draft-model", metavar="MODEL", help="let a smaller model with the same tokenizer draft")
    generate.add_argument(
        "--policy",
        choices=tuple(POLICIES),
        default="fixed",
        help="how many tokens to draft, in a row or a tree (fixed); cost measures what passes and drafts take and "
        "picks the fastest",
    )
    generate.add_argument("--gamma", type=int, default=10, metavar="N", help="the most tokens drafted a step (10)")
    generate.add_argument(
        "--rule",
        choices=tuple(RULES),
        help=f"what judges the drafts ({USUAL_RULE}; with --seed {USUAL_RULE_OF_SEEDS}); the text has the model's law "
        "under each",
    )
    generate.add_argument("--sample", action="store_true", help="sample; the next three options imply it")
    generate.add_argument("--temperature", type=float, metavar="T", help="1.0 unless given")
    generate.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="sample from the nucleus of mass P")
    generate.add_argument(
        "--seed", type=int, metavar="S", help="make sampling repeatable: one text for a seed, whatever drafts it"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer at this text; may be given again"
    )
    generate.set_defaults(run=_run_generate)
    measure = commands.add_parser("bench", help="measure decoders against each other")
    bench.add_arguments(measure)
    measure.set_defaults(run=bench.main)
    return parser


def _run_generate(parsed: argparse.Namespace) -> int:
    names = {attribute.name for attribute in fields(Options)}
    return unwrap(_generate(Options(**{name: value for name, value in vars(parsed).items() if name in names})))


def _generate(options: Options) -> Result[int, DecodeError]:
    if smollm2_is_converted() if options.model == SMOLLM2 else Path(options.model).is_dir():
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    rng = _randomness(options.seed)
    return Result.do(
        _stream(step, state, loaded)
        for _ in _consistent(options)
        for processor in _processor(options)
        for pacing in _pacing(options, processor.temperature)
        for loaded in load(options.model, options.dtype)
        for state in _started(options, loaded)
        for until in _until(options.stop, loaded)
        for assistant in _assistant(options)
        for drafting in _drafting(options, processor, rng, loaded, state, assistant)
        for target in _target(options, loaded)
        for step in _step(options.judges, drafting, pacing, target, processor, rng, until)
    )


@safe(exceptions=(DecodeError,))
def _consistent(options: Options) -> None:
    """Refuses texts that are none, and an option that another one would make meaningless."""
    check_text("prompt", options.prompt)
    for string in options.stop:
        check_text("stop", string)
    whole(1, "draft at least one token")("gamma", options.gamma)
    if options.gamma > sys.maxsize:
        raise DecodeError("gamma", "gamma is beyond the longest text", options.gamma, "draft fewer tokens")
    entry = DRAFTERS[options.drafts]
    if options.draft_model is not None and not entry.assisted:
        received = f"--drafter {options.drafter} and --draft-model {options.draft_model}"
        raise DecodeError("drafter", "a drafter and a draft model are both given", received, "give one of them")
    if options.draft_model is None and entry.assisted:
        received, remedy = f"--drafter {options.drafter}", "name one with --draft-model"
        raise DecodeError("drafter", "there is no model to draft with", received, remedy)
    if options.bigrams is not None and not entry.bigrams:
        received = options.draft_model or options.drafts
        raise DecodeError("bigrams", "only trees are drafted from bigrams", received, "use --drafter tree")
    if options.bigrams is not None and not _can_hold(options.bigrams):
        received = str(options.bigrams)
        raise DecodeError("bigrams", "no file can be kept there", received, "name a file in a folder")
    if options.seed is not None and options.judges not in COUPLED:
        happened, remedy = "a seed has no text of its own under this rule", f"use --rule {' or '.join(COUPLED)}"
        raise DecodeError("rule", happened, options.judges, remedy)


def _randomness(seed: int | None) -> Dice | SharedNoise:
    """With a seed a text depends on the model, the prompt and the seed alone: not on what drafts it, nor on how far."""
    if seed is not None:
        return SharedNoise(seed)
    generator = torch.Generator()
    generator.seed()
    return Dice(generator)


@safe(exceptions=(DecodeError,))
def _processor(options: Options) -> LogitsProcessor:
    temperature = 1.0 if options.temperature is None else options.temperature
    match options.top_k, options.top_p:
        case int(top_k), float(top_p):
            return TopKNucleusProcessor(temperature, top_k, top_p)
        case int(top_k), None:
            return TopKProcessor(temperature, top_k)
        case None, float(top_p):
            return NucleusProcessor(temperature, top_p)
    if options.sample or options.temperature is not None:
        return MultinomialProcessor(temperature)
    return GreedyProcessor()


@safe(exceptions=(DecodeError,))
def _pacing(options: Options, temperature: float) -> Pacing:
    return POLICIES[options.policy](options.gamma, temperature, perf_counter)


def _assistant(options: Options) -> Result[Module | None, DecodeError]:
    if options.draft_model is None:
        return Success(None)
    return load(options.draft_model, options.dtype).map(lambda loaded: loaded.model)


@safe(exceptions=(DecodeError,))
def _drafting(
    options: Options,
    processor: LogitsProcessor,
    rng: Sampling,
    loaded: Loaded,
    state: DecodeState,
    assistant: Module | None,
) -> Drafting:
    bigrams = partial(_bigrams, options.bigrams, loaded)
    setting = Setting(loaded.model, _vocabulary(loaded), state.tokens, processor, rng, assistant, bigrams)
    return DRAFTERS[options.drafts].make()(setting)


@safe(exceptions=(DecodeError,))
def _step(
    rule: str,
    drafting: Drafting,
    pacing: Pacing,
    target: CachedPredictor,
    processor: LogitsProcessor,
    rng: Dice | SharedNoise,
    until: Condition,
) -> Step:
    match rng:
        case SharedNoise() as noise:
            return step_of(drafting, pacing, target, processor, noise, COUPLED[rule](noise), (target,), until)
        case Dice() as dice:
            return step_of(drafting, pacing, target, processor, dice, RULES[rule](dice), (target,), until)


@safe(exceptions=(DecodeError,))
def _target(options: Options, loaded: Loaded) -> CachedPredictor:
    with _one_sentence(f"the model cannot be read in {options.dtype}"):
        return CachedPredictor(ACCELERATE[options.accelerate](loaded.model))


def _started(options: Options, loaded: Loaded) -> Result[DecodeState, DecodeError]:
    for token in sorted(loaded.never_said):
        happened = f"the stop token {token} is outside the model's vocabulary of {_vocabulary(loaded)}"
        print(f"specflow: {happened}, and ends no text", file=sys.stderr)
    limits = limits_of(loaded.model)
    return _prompt(options, loaded).bind(lambda prompt: start(prompt, options.max_new_tokens, loaded.stop, limits))


@safe(exceptions=(DecodeError,))
def _prompt(options: Options, loaded: Loaded) -> Tokens:
    return loaded.ids(options.prompt) if options.raw else loaded.chat(options.prompt)


@safe(exceptions=(DecodeError,))
def _until(strings: Sequence[str], loaded: Loaded) -> Condition:
    return stop_string(loaded.tokenizer, *strings) if strings else never


def _stream(step: Step, state: DecodeState, loaded: Loaded) -> int:
    """Print the text as it comes and one line about it at the end, also when interrupted."""
    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    began, code = perf_counter(), 0
    try:
        for outcome in _outcomes(step, state, loaded):
            after = outcome if isinstance(outcome, DecodeState) else outcome.state
            new = after.tokens[len(state.tokens) :]
            state = after
            if new:
                _check_shown(new, loaded)
                streamer.put(torch.tensor(new))
    except KeyboardInterrupt:
        code = INTERRUPTED
    streamer.end()
    print(_summary(state, perf_counter() - began), file=sys.stderr)
    return code


def _outcomes(step: Step, state: DecodeState, loaded: Loaded) -> Iterator[DecodeState | Finished]:
    with _one_sentence(f"the model cannot be run in {str(loaded.model.dtype).removeprefix('torch.')}"):
        yield from unfold(step, state)


def _check_shown(tokens: Tokens, loaded: Loaded) -> None:
    """Refuses a token that has no text: what is printed would not be what the model said."""
    size = len(loaded.tokenizer)
    for token in tokens:
        if token >= size and loaded.tokenizer.convert_ids_to_tokens(token) is None:
            happened = f"the model says a token that its tokenizer of {size} does not have"
            raise DecodeError("tokenizer", happened, token, "use the tokenizer that belongs to the model")


def _summary(state: DecodeState, seconds: float) -> str:
    tokens, tally, seconds = len(state.output), state.tally, max(seconds, 1e-9)
    return (
        f"[{tokens} tokens, {tokens / seconds:.1f} tokens/s, {tally.steps} steps, "
        f"acceptance {tally.accepted}/{tally.drafted} = {tally.acceptance_rate:.0%}]"
    )
