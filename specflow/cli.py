"""The `specflow` command: watch a model answer, and measure decoders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Final, TypeAlias, final

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
from specflow.gamma import EGAG, SVIP, AdaEDL, Fixed, Heuristic, StopAfter, Unsure
from specflow.gamma_cost import CostAware, CostMeter
from specflow.gamma_tree import CostAwareTree
from specflow.loop import shared_vocabulary, start, unfold
from specflow.models import SMOLLM2, DType, Loaded, bigrams_of, load, smollm2_is_converted
from specflow.predictor import CachedPredictor, fitted, limits_of
from specflow.processors import (
    GreedyProcessor,
    LogitsProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    TopKNucleusProcessor,
    TopKProcessor,
)
from specflow.random import Dice, Randomness
from specflow.stages import Condition, UpdateNgram, never, stop_string
from specflow.state import DecodeState, Drafter, GammaPolicy, Predictor, Step, TreePolicy, TreePredictor
from specflow.steps import ngram_step, speculative_step, tree_step


@final
@frozen(eq=False)
class Pacing:
    """A gamma policy, and the predictor that it wants the target to be read through: for most the target itself."""

    gamma: GammaPolicy
    watched: Callable[[Predictor], Predictor] = lambda target: target


@final
@frozen(eq=False)
class TreePacing:
    """The same for trees."""

    gamma: TreePolicy
    watched: Callable[[TreePredictor], TreePredictor] = lambda target: target


def _cost_aware(gamma: int, temperature: float) -> Pacing:
    meter = CostMeter()
    return Pacing(CostAware(meter, gamma), meter.timed)


def _cost_aware_tree(gamma: int) -> TreePacing:
    meter = CostMeter()
    return TreePacing(CostAwareTree(meter, gamma), meter.timed_tree)


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

TREE_POLICIES: Final[Mapping[str, Callable[[int], TreePacing]]] = {
    "fixed": lambda gamma: TreePacing(Fixed(gamma)),
    "cost": _cost_aware_tree,
}
"""Tree policies that draft at most `gamma` nodes."""


@final
@frozen(eq=False)
class Parts:
    """What any step here is composed of."""

    target: CachedPredictor
    processor: LogitsProcessor
    rng: Randomness
    until: Condition
    loaded: Loaded
    state: DecodeState


Compose: TypeAlias = Callable[[Parts], Step]


def _with(drafter: Drafter) -> Callable[[Pacing], Compose]:
    def paced(pacing: Pacing) -> Compose:
        return lambda parts: speculative_step(
            drafter,
            pacing.watched(parts.target),
            parts.processor,
            parts.rng,
            pacing.gamma,
            prune=(parts.target,),
            until=parts.until,
        )

    return paced


def _with_ngrams(pacing: Pacing) -> Compose:
    def compose(parts: Parts) -> Step:
        storage = NGramStorage(4, parts.loaded.model.config.vocab_size)
        storage.initialize(parts.state.tokens)
        drafter, update, target = NGramDrafter(storage), UpdateNgram(storage), pacing.watched(parts.target)
        return ngram_step(
            drafter, target, parts.processor, parts.rng, update, pacing.gamma, (parts.target,), until=parts.until
        )

    return compose


def _with_model(model: Module, vocab_size: int | None, pacing: Pacing) -> Compose:
    known, predictor = limits_of(model), CachedPredictor(model)
    fit = predictor if vocab_size is None else fitted(predictor, vocab_size)
    return lambda parts: speculative_step(
        LLMDrafter(fit, parts.processor, parts.rng, known.context, known.vocab_size),
        pacing.watched(parts.target),
        parts.processor,
        parts.rng,
        pacing.gamma,
        prune=(predictor, parts.target),
        until=parts.until,
    )


@safe(exceptions=(DecodeError,))
def _with_trees(path: Path | None, pacing: TreePacing, loaded: Loaded) -> Compose:
    drafter = LookupTree(None if path is None else _bigrams(path, loaded))
    return lambda parts: tree_step(
        drafter,
        pacing.watched(parts.target.read_tree),
        parts.processor,
        parts.rng,
        pacing.gamma,
        prune=(parts.target,),
        until=parts.until,
    )


def _bigrams(path: Path, loaded: Loaded) -> Bigrams:
    """The table in the file; where there is none, the model is asked, and its answers are kept there."""
    vocab_size = loaded.model.config.vocab_size
    if not path.exists():
        print(f"asking the model for its bigrams, once; they are kept in {path}", file=sys.stderr)
        bigrams_of(loaded.model, loaded.tokenizer).save(path)
    bigrams = Bigrams.load(path)
    if len(bigrams.tokens) != vocab_size:
        remedy = "give the table of this model, or the name of a new file"
        received = f"a table of {len(bigrams.tokens)} tokens for {vocab_size}"
        raise DecodeError("bigrams", "the table is of another vocabulary", received, remedy)
    return bigrams


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
    drafter: str
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
    if options.policy not in TREE_POLICIES:
        remedy = f"use {' or '.join(TREE_POLICIES)}"
        raise DecodeError("policy", "this policy paces chains of drafts, not trees", options.policy, remedy)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise DecodeError("bigrams", "no file can be kept there", str(path), "name a file in a folder")
    pacing = TREE_POLICIES[options.policy](options.gamma)
    return lambda target: _with_trees(path, pacing, target)


def _pacing(options: Options, temperature: float) -> Pacing:
    if options.bigrams is not None:
        received = options.draft_model or options.drafter
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

ACCELERATE: Final[Mapping[str, Callable[[Module], Module]]] = {
    "no": lambda model: model,
    "fast": lambda model: fast(model, Given.TAKEN),
    "bit-for-bit": lambda model: bit_for_bit(model, Given.TAKEN),
}
"""What becomes of the target before it decodes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for what cannot be decoded, and 130 after Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except DecodeError as error:  # a value where the decode starts, an exception from a model that breaks down later
        print(f"specflow: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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
    generate.add_argument("--drafter", choices=tuple(DRAFTERS), default="suffix", help="what proposes tokens (suffix)")
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
    generate.add_argument("--sample", action="store_true", help="sample; the options below imply it")
    generate.add_argument("--temperature", type=float, metavar="T", help="1.0 unless given")
    generate.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="sample from the nucleus of mass P")
    generate.add_argument("--seed", type=int, metavar="S", help="make sampling repeatable")
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
    if options.model == SMOLLM2 and smollm2_is_converted():
        logging.disable_progress_bar()
    return Result.do(
        _stream(compose(Parts(target, processor, rng, until, loaded, state)), state, loaded)
        for rng in _dice(options.seed)
        for processor in _processor(options)
        for drafting in _drafting(options, processor.temperature)
        for loaded in load(options.model, options.dtype)
        for state in _started(options, loaded)
        for until in _until(options.stop, loaded)
        for compose in drafting(loaded)
        for target in _target(options, loaded)
    )


def _dice(seed: int | None) -> Result[Dice, DecodeError]:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return Success(Dice(generator))


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
    make = DRAFTERS[options.drafter] if options.draft_model is None else _model(options.draft_model)
    return make(options, temperature)


@safe(exceptions=(DecodeError,))
def _target(options: Options, loaded: Loaded) -> CachedPredictor:
    return CachedPredictor(ACCELERATE[options.accelerate](loaded.model))


def _started(options: Options, loaded: Loaded) -> Result[DecodeState, DecodeError]:
    prompt = tuple(loaded.tokenizer(options.prompt).input_ids) if options.raw else loaded.chat(options.prompt)
    return start(prompt, options.max_new_tokens, loaded.stop, limits_of(loaded.model))


@safe(exceptions=(DecodeError,))
def _until(strings: Sequence[str], loaded: Loaded) -> Condition:
    return stop_string(loaded.tokenizer, *strings) if strings else never


def _stream(step: Step, state: DecodeState, loaded: Loaded) -> int:
    """Print the text as it comes and one line about it at the end, also when interrupted."""
    streamer = TextStreamer(loaded.tokenizer, skip_special_tokens=True)
    began, code = perf_counter(), 0
    try:
        for outcome in unfold(step, state):
            after = outcome if isinstance(outcome, DecodeState) else outcome.state
            new = after.tokens[len(state.tokens) :]
            state = after
            if new:
                streamer.put(torch.tensor(new))
    except KeyboardInterrupt:
        code = 130
    streamer.end()
    print(_summary(state, perf_counter() - began), file=sys.stderr)
    return code


def _summary(state: DecodeState, seconds: float) -> str:
    tokens, tally = len(state.output), state.tally
    return (
        f"[{tokens} tokens, {tokens / seconds:.1f} tokens/s, {tally.steps} steps, "
        f"acceptance {tally.accepted}/{tally.drafted} = {tally.acceptance_rate:.0%}]"
    )
