"""The `specflow` command: watch a model answer, and measure decoders."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from typing import Final, TextIO, TypeAlias, final

import torch
from attrs import fields, frozen
from returns.result import Result, Success, safe
from torch.nn import Module
from transformers import TextStreamer
from transformers.utils import logging

from specflow import bench
from specflow.accelerate import Given, bit_for_bit, fast
from specflow.drafters import (
    Bigrams,
    LLMDrafter,
    LookupTree,
    NGramDrafter,
    NGramStorage,
    PromptLookup,
    SuffixDrafter,
    propose_nothing,
)
from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import whole
from specflow.loop import start, unfold
from specflow.models import SMOLLM2, DType, Loaded, bigrams_of, check_text, load, said, smollm2_is_converted
from specflow.policies import EGAG, SVIP, AdaEDL, CostAware, CostMeter, Fixed, Heuristic, StopAfter, Unsure
from specflow.predictors import CachedPredictor, limits_of
from specflow.processors import (
    GreedyProcessor,
    LogitsProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    TopKNucleusProcessor,
    TopKProcessor,
)
from specflow.protocols import Prunable
from specflow.randomness import Dice, SharedNoise
from specflow.stages import Condition, Observer, UpdateNgram, never, stop_string, unobserved
from specflow.state import (
    DecodeState,
    Drafter,
    Finished,
    GammaPolicy,
    Predictor,
    Step,
    Tokens,
)
from specflow.steps import seed_coupled_step, speculative_step
from specflow.vocabulary import fitted, shared_vocabulary


@final
@frozen(eq=False)
class Pacing:
    """A gamma policy, and the predictor that it wants the target to be read through: for most the target itself."""

    gamma: GammaPolicy
    watched: Callable[[Predictor], Predictor] = lambda target: target


def _cost_aware(gamma: int, temperature: float) -> Pacing:
    meter = CostMeter()
    return Pacing(CostAware(meter, gamma), meter.timed)


POLICIES: Final[Mapping[str, Callable[[int, float], Pacing]]] = {
    "fixed": lambda gamma, temperature: Pacing(Fixed(gamma)),
    "heuristic": lambda gamma, temperature: Pacing(Heuristic(min(5, gamma), gamma)),
    "egag": lambda gamma, temperature: Pacing(EGAG(gamma_max=gamma, temperature=temperature)),
    "confidence": lambda gamma, temperature: Pacing(StopAfter(Unsure(temperature=temperature), Fixed(gamma))),
    "svip": lambda gamma, temperature: Pacing(StopAfter(SVIP(temperature=temperature), Fixed(gamma))),
    "adaedl": lambda gamma, temperature: Pacing(StopAfter(AdaEDL(temperature=temperature), Fixed(gamma))),
    "cost": _cost_aware,
}
"""Gamma policies that draft at most `gamma` tokens."""


@final
@frozen(eq=False)
class Parts:
    """What any step here is composed of.

    With a seed the randomness is `SharedNoise`, so that a text depends on the model, the prompt and the seed alone: not
    on what drafts it, nor on how far, which a cost-aware policy reads off the clock.
    """

    target: CachedPredictor
    processor: LogitsProcessor
    rng: Dice | SharedNoise
    until: Condition
    loaded: Loaded
    state: DecodeState

    def step(
        self, drafter: Drafter, pacing: Pacing, memos: Sequence[Prunable] = (), observe: Observer = unobserved
    ) -> Step:
        """A step that drafts and verifies."""
        target, processor, gamma, prune = (
            pacing.watched(self.target),
            self.processor,
            pacing.gamma,
            (*memos, self.target),
        )
        match self.rng:
            case SharedNoise() as noise:
                return seed_coupled_step(drafter, target, processor, noise, gamma, prune, observe, self.until)
            case Dice() as dice:
                return speculative_step(drafter, target, processor, dice, gamma, prune, observe, self.until)


Compose: TypeAlias = Callable[[Parts], Step]


def _with(drafter: Drafter) -> Callable[[Pacing], Compose]:
    return lambda pacing: lambda parts: parts.step(drafter, pacing)


def _with_ngrams(pacing: Pacing) -> Compose:
    def compose(parts: Parts) -> Step:
        storage = NGramStorage(4, _vocabulary(parts.loaded))
        storage.initialize(parts.state.tokens)
        return parts.step(NGramDrafter(storage), pacing, observe=UpdateNgram(storage))

    return compose


def _with_model(model: Module, vocab_size: int | None, pacing: Pacing) -> Compose:
    known, predictor = limits_of(model), CachedPredictor(model)
    fit = predictor if vocab_size is None else fitted(predictor, vocab_size)
    return lambda parts: parts.step(
        LLMDrafter(fit, parts.processor, parts.rng, known.context, known.vocab_size), pacing, (predictor,)
    )


@safe(exceptions=(DecodeError,))
def _with_trees(path: Path | None, pacing: Pacing, loaded: Loaded) -> Compose:
    drafter = LookupTree(None if path is None else _bigrams(path, loaded))
    return lambda parts: parts.step(drafter, pacing)


def _bigrams(path: Path, loaded: Loaded) -> Bigrams:
    """The table in the file; where there is none, the model is asked, and its answers are kept there."""
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
    sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: Sequence[str]


Drafting: TypeAlias = Callable[[Loaded], Result[Compose, DecodeError]]
"""How drafts are made for a target, once that is loaded."""

Draft: TypeAlias = Callable[[Options, float], Drafting]
"""(options, temperature) → drafting; `DecodeError` for options that do not go together."""


def _chains(make: Callable[[Pacing], Compose]) -> Draft:
    """A drafter of chains."""

    def drafting(options: Options, temperature: float) -> Drafting:
        compose = make(_pacing(options, temperature))
        return lambda target: Success(compose)

    return drafting


def _model(name: str) -> Draft:
    """A smaller model that drafts chains."""

    def drafting(options: Options, temperature: float) -> Drafting:
        pacing = _pacing(options, temperature)
        return lambda target: Result.do(
            _with_model(drafter.model, vocab_size, pacing)
            for drafter in load(name, options.dtype)
            for vocab_size in shared_vocabulary(limits_of(target.model), limits_of(drafter.model))
        )

    return drafting


def _trees(options: Options, temperature: float) -> Drafting:
    """Trees, from the text and the target's bigrams."""
    path = options.bigrams
    if path is not None and not _can_hold(path):
        raise DecodeError("bigrams", "no file can be kept there", str(path), "name a file in a folder")
    pacing = POLICIES[options.policy](options.gamma, temperature)
    return lambda target: _with_trees(path, pacing, target)


def _can_hold(path: Path) -> bool:
    return path.is_file() or (not path.exists() and path.parent.is_dir() and os.access(path.parent, os.W_OK))


def _pacing(options: Options, temperature: float) -> Pacing:
    if options.bigrams is not None:
        received = options.draft_model or options.drafter or USUAL
        raise DecodeError("bigrams", "only trees are drafted from bigrams", received, "use --drafter tree")
    return POLICIES[options.policy](options.gamma, temperature)


DRAFTERS: Final[Mapping[str, Draft]] = {
    "none": _chains(_with(propose_nothing)),
    "ngram": _chains(_with_ngrams),
    "lookup": _chains(_with(PromptLookup())),
    "suffix": _chains(_with(SuffixDrafter())),
    "tree": _trees,
}
"""The drafters that need no other model and no training."""

USUAL: Final = "suffix"
"""What drafts unless somebody says otherwise."""

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
    generate.add_argument("--drafter", choices=tuple(DRAFTERS), help=f"what proposes tokens ({USUAL})")
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
        help="how many tokens to draft (fixed); cost measures what passes and drafts take and picks the fastest",
    )
    generate.add_argument("--gamma", type=int, default=10, metavar="N", help="the most tokens drafted a step (10)")
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
    return Result.do(
        _stream(compose(Parts(target, processor, _randomness(options.seed), until, loaded, state)), state, loaded)
        for _ in _consistent(options)
        for processor in _processor(options)
        for drafting in _drafting(options, processor.temperature)
        for loaded in load(options.model, options.dtype)
        for state in _started(options, loaded)
        for until in _until(options.stop, loaded)
        for compose in drafting(loaded)
        for target in _target(options, loaded)
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
    if options.draft_model is not None and options.drafter is not None:
        received = f"--drafter {options.drafter} and --draft-model {options.draft_model}"
        raise DecodeError("drafter", "a drafter and a draft model are both given", received, "give one of them")


def _randomness(seed: int | None) -> Dice | SharedNoise:
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
def _drafting(options: Options, temperature: float) -> Drafting:
    make = DRAFTERS[options.drafter or USUAL] if options.draft_model is None else _model(options.draft_model)
    return make(options, temperature)


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
