"""The `specflow` command: watch a model answer, and measure decoders."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache, partial
from io import TextIOWrapper
from pathlib import Path
from time import perf_counter
from typing import Final, TextIO, TypeAlias, TypeVar, final, get_args

import torch
from attrs import evolve, frozen
from returns.result import Result
from rich import progress as bars
from rich.console import Console
from torch.nn import Module
from transformers.utils import logging

from specflow import bench, chat, distill, doctor, replay
from specflow.accelerate import Given
from specflow.batch import BatchPredictor, seed_of
from specflow.catalogue import (
    COUPLED,
    DRAFTERS,
    POLICIES,
    RULES,
    USUAL_MOST,
    USUAL_POLICY,
    Make,
    Setting,
    all_drafts,
    step_of,
)
from specflow.commands import (
    ACCELERATE,
    ENGINES,
    LLAMA_CPP,
    REMEDY,
    TORCH,
    Told,
    check_engine,
    named_model,
    one_sentence,
    outcomes,
    prompt_of,
    version_of,
    vocabulary_of,
)
from specflow.constraints import Constrained, CutForbidden, Forced, Grammar
from specflow.converted import copy_of
from specflow.corpus import Answer, Answers, Id, Progress, Row, answer_all, answers_in, read_rows, summary
from specflow.drafters import Bigrams, first_of, propose_nothing, then
from specflow.errors import DecodeError, said, unwrap
from specflow.files import can_be_written
from specflow.guards.checks import or_none, shown, whole
from specflow.heads import HeadPredictor, load_head
from specflow.interop.llama_cpp import USUAL_CONTEXT, LlamaCpp
from specflow.loop import start
from specflow.models import (
    SMOLLM2,
    DType,
    Loaded,
    bigrams_of,
    check_text,
    file_of,
    load,
    shared_tokens,
)
from specflow.origin import law_of, refuse_other, short, weights_of
from specflow.predictors import CachedPredictor, limits_of
from specflow.processors import (
    GreedyProcessor,
    LogitsProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    Processor,
    TopKNucleusProcessor,
    TopKProcessor,
)
from specflow.randomness import Dice, Sampling, SharedNoise
from specflow.stages import Condition, Observer, any_of, never, stop_string, unobserved
from specflow.state import DecodeState, Drafted, Finished, Predictor, Reason, Rule, Step, Tokens
from specflow.trace import Recorder, Trace
from specflow.trace import command as tracing
from specflow.trace.words import visible
from specflow.vocabulary import SharedTokens

S = TypeVar("S", bound=Sampling)

USUAL, USUAL_OF_MODELS, USUAL_OF_HEADS = "suffix", "llm", "head"
"""What drafts unless another drafter is named: alone, where there is a draft model, and where there is a head."""

USUAL_RULE, USUAL_RULE_OF_SEEDS = "reject", "match"
"""What judges drafts unless another rule is named: without a seed, and with one."""

SLOTS: Final = 8
"""How many texts of a file are decoded at a time unless it is said."""

AS_BEFORE: Final = "name another file, or decode as before"
"""What to do where a file holds answers that come of something else."""

Read: TypeAlias = Callable[[Module], CachedPredictor | BatchPredictor]
"""What reads a model."""

AddArguments: TypeAlias = Callable[[argparse.ArgumentParser], None]
RunCommand: TypeAlias = Callable[[argparse.Namespace], int]

ReadTarget: TypeAlias = Callable[[Module, tuple[int, ...] | None], CachedPredictor | BatchPredictor | LlamaCpp]
"""What reads the target, and shows these of its hidden states."""

COMMANDS: Final[Mapping[str, tuple[str, AddArguments, RunCommand]]] = {
    "distill": ("train a head that drafts for a model, on the model's answers", distill.add_arguments, distill.main),
    "bench": ("measure decoders against each other", bench.add_arguments, bench.main),
    "doctor": ("tell what works here, and how to add the rest", doctor.add_arguments, doctor.main),
}
"""The commands beside `generate`: what each does, its options, and what runs it."""

PROMPT: Final = "what to say to the model; standard input where there is none, or it is -"

OUTPUT_FAILED: Final = 1
NOT_DECODED: Final = 2
INTERRUPTED: Final = 130
HUNG_UP: Final = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. The exit code is 0; 2 for what cannot be decoded; 1 where the answer cannot be written.

    130 after Ctrl-C, and 141 where the reader of a pipe has gone, as the shell has it for a program that ends by that
    signal.
    """
    # What is meant for a closed stream goes nowhere: the stream is None, and print(file=None) writes to stdout.
    sys.stdout, sys.stderr = _opened(sys.stdout), _opened(sys.stderr)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape what the terminal cannot show
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
                warnings.showwarning = lambda message, *_: print(f"specflow: {message}", file=sys.stderr)
                return run(parsed)
        finally:
            sys.stdout.flush()  # what fails here would fail at the interpreter's end, where nobody can catch it
    except DecodeError as error:
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
    """Drop what is still buffered, or the interpreter would complain when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="specflow", description="Compose LLM decoders, and trust what comes out.")
    version = version_of("specflow") or "(not installed)"
    parser.add_argument("--version", action="version", version=f"specflow {version}")
    parser.set_defaults(run=partial(_help, parser))
    commands = parser.add_subparsers(dest="command")
    about = "answer a prompt, streaming the text as it is decoded, or many prompts of a file at once"
    generate = commands.add_parser("generate", help=about, parents=[_options()])
    add = generate.add_argument
    add("prompt", nargs="?", help=PROMPT)
    add("--json", action="store_true", help="print one JSON object instead: the text, and what it took")
    file = 'prompts to answer instead, JSONL: {"id": 1, "prompt": "…"}, or messages or turns (docs/batches.md)'
    add("--file", type=Path, metavar="FILE", help=file)
    add("--out", type=Path, metavar="FILE", help="where the answers to --file go, a line each as it is ready")
    add("--slots", type=int, metavar="N", help=f"how many texts of --file are decoded at a time ({SLOTS})")
    add("--resume", action="store_true", help="go on with an --out that was begun: only what is not in it is decoded")
    generate.set_defaults(run=_generate)
    about = "talk with a model, see which of its words were drafted, and change how it decodes while you do"
    talk = commands.add_parser("chat", help=about, parents=[_options()])
    talk.set_defaults(run=_chat, file=None)
    show = commands.add_parser(
        "trace", help="answer a prompt, and show how each token came to be", parents=[_options()]
    )
    show.add_argument("prompt", nargs="?", help=PROMPT)
    tracing.add_arguments(show)
    show.set_defaults(run=_trace, file=None, out=None, slots=None, resume=False)
    for name, (about, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        add_arguments(command)
        command.set_defaults(run=run)
    replay.add_commands(commands.add_parser)
    return parser


def _options() -> argparse.ArgumentParser:
    """The options that say how texts are decoded."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="smollm2 (default), a local path, a GGUF file or a hub name")
    add("--raw", action="store_true", help="continue the prompt itself, without the chat template")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--dtype", choices=get_args(DType), default="float32")
    add("--accelerate", choices=ACCELERATE, default="no", help="decode with a faster model (docs/acceleration.md)")
    add(
        "--engine",
        choices=ENGINES,
        default=TORCH,
        help="what runs --model; llama.cpp runs GGUF files (docs/interop.md)",
    )
    usual = f"{USUAL}; with --draft-model {USUAL_OF_MODELS}, with --head {USUAL_OF_HEADS}"
    add("--drafter", choices=DRAFTERS, help=f"what proposes tokens ({usual})")
    knowing = ", ".join(name for name, entry in DRAFTERS.items() if entry.bigrams)
    bigrams = f"let {knowing} know the model's own bigrams; it is asked for them once, and FILE keeps them"
    add("--bigrams", type=Path, metavar="FILE", help=bigrams)
    add("--draft-model", metavar="MODEL", help="let a smaller model draft; its tokenizer may be another one")
    head = "let a head draft that reads what the model holds: EAGLE, Medusa and others (docs/heads.md)"
    add("--head", metavar="FOLDER", help=f"{head}; a folder or a hub name")
    policy = "how many tokens to draft, in a row or a tree; cost measures passes and drafts and picks the fastest"
    add("--policy", choices=POLICIES, default=USUAL_POLICY, help=f"{policy} ({USUAL_POLICY})")
    add("--gamma", type=int, default=USUAL_MOST, metavar="N", help=f"the most tokens drafted in a step ({USUAL_MOST})")
    rule = f"what judges the drafts ({USUAL_RULE}; with --seed {USUAL_RULE_OF_SEEDS}); each keeps the model's law"
    add("--rule", choices=RULES, help=rule)
    add("--sample", action="store_true", help="sample; the next three options imply it")
    add("--temperature", type=float, metavar="T", help="1.0 unless given")
    add("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    add("--top-p", type=float, metavar="P", help="sample from the nucleus of mass P")
    add("--seed", type=int, metavar="S", help="make sampling repeatable: one text for a seed, whatever drafts it")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer with this text, which stays; may be given again",
    )
    obeys = "let the answer be"
    add("--json-schema", type=Path, metavar="FILE", help=f"{obeys} JSON that this schema allows (docs/grammars.md)")
    add("--regex", metavar="R", help=f"{obeys} a text that this regular expression matches")
    add("--grammar", type=Path, metavar="FILE", help=f"{obeys} a text of this grammar, in Lark")
    add("--choices", nargs="+", metavar="TEXT", help=f"{obeys} one of these texts")
    return parser


def _help(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """What is said where no command is named."""
    parser.print_help()
    return 0


def _generate(args: argparse.Namespace) -> int:
    steps = _asked(args)
    return _answer(steps) if args.file is None else _answer_all(steps)


def _asked(args: argparse.Namespace) -> _Steps:
    """What makes the steps of what is asked, in the arguments, a file or on the standard input."""
    if args.file is None:
        args.prompt = prompt_of(args.prompt, sys.stdin)
    _check_source(args)
    return _prepared(args)


def _prepared(args: argparse.Namespace) -> _Steps:
    """What makes the steps that the options name. `DecodeError` before any model is loaded."""
    drafts: str = args.drafter or _usual(args)
    judges: str = args.rule or (USUAL_RULE if args.seed is None else USUAL_RULE_OF_SEEDS)
    _check(args, drafts, judges)
    if args.model == SMOLLM2 or os.path.exists(args.model):  # else it may be fetched, which takes its time
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    processor = _processor(args)
    return _Steps(args, drafts, DRAFTERS[drafts].make(), judges, processor, ACCELERATE[args.accelerate])


def _chat(args: argparse.Namespace) -> int:
    _prepared(args)
    loaded = _target(args)
    model = ACCELERATE[args.accelerate](loaded.model, Given.KEPT)
    load_helper, read_helper = cache(load), cache(partial(CachedPredictor))
    most = limits_of(loaded.model).context or sys.maxsize
    context = min(USUAL_CONTEXT, most)
    # One predictor, whatever else is changed: what was read of the conversation stays.
    cached, by_llama_cpp = cache(partial(_alone, model)), lru_cache(1)(partial(LlamaCpp, file_of(args.model)))

    def read(features: tuple[int, ...] | None) -> CachedPredictor | LlamaCpp:
        return by_llama_cpp(context) if args.engine == LLAMA_CPP else cached(features)

    def prepare(args: argparse.Namespace) -> Callable[[DecodeState], tuple[Step, Recorder]]:
        steps = evolve(_prepared(args), accelerate=lambda given, _: model, load_helper=load_helper)
        grammar = _grammar(args, loaded)

        def over() -> Callable[[DecodeState, int | None, Recorder | None], Step]:
            return steps.over(loaded, grammar, lambda _, features: read(features), read_helper)

        step, made_for = over(), context

        def recorded(state: DecodeState) -> tuple[Step, Recorder]:
            nonlocal context, step, made_for
            if state.request.limit > context:  # llama.cpp's memory is made at once: it grows with the conversation
                context = min(max(2 * context, state.request.limit), most)
            if made_for != context and args.engine == LLAMA_CPP:
                step, made_for = over(), context
            recorder = Recorder(loaded.tokenizer, steps.about)
            return step(state, args.seed, recorder), recorder

        return recorded

    return chat.talk(args, loaded, prepare, sys.stdin)


def _target(args: argparse.Namespace) -> Loaded:
    """The target. Where llama.cpp runs it, without its weights, unless they are asked for bigrams."""
    asks = args.bigrams is not None and not os.path.exists(args.bigrams)
    return named_model(args, weights=args.engine == TORCH or asks)


def _usual(args: argparse.Namespace) -> str:
    if args.draft_model is not None:
        return USUAL_OF_MODELS
    return USUAL if args.head is None else USUAL_OF_HEADS


@final
@frozen(eq=False)
class _Steps:
    """Makes the steps of a command's texts: what drafts for all of them, what judges, and how tokens are drawn."""

    args: argparse.Namespace
    drafts: str
    make: Make
    judges: str
    processor: LogitsProcessor
    accelerate: Callable[[Module, Given], Module]
    load_helper: Callable[[str, DType], Result[Loaded, DecodeError]] = load

    @property
    def about(self) -> dict[str, str]:
        """What a reader wants to know of the decode."""
        args = self.args
        drawn = {"temperature": args.temperature, "top-k": args.top_k, "top-p": args.top_p, "seed": args.seed}
        options = [f"{name} {value}" for name, value in drawn.items() if value is not None]
        policy = f"{args.policy}, {args.gamma} at most"
        return {
            "title": f"{self.drafts}, {policy}",
            "model": f"{args.model}, {args.dtype}",
            "drafter": self.drafts,
            "policy": policy,
            "rule": self.judges,
            "processor": ", ".join([type(self.processor).__name__, *options]),
            "accelerate": args.accelerate,
        }

    @property
    def asked(self) -> dict[str, str]:
        """What the options say of what a text comes of, beside its model, its prompt and its seed.

        Whatever drafts it, the text is the same.
        """
        args = self.args
        passes = {} if args.engine == LLAMA_CPP else {"dtype": args.dtype, "accelerate": args.accelerate}
        files = [("json-schema", args.json_schema), ("grammar", args.grammar)]
        grammar = [args.regex, args.choices, *[None if path is None else _read(name, path) for name, path in files]]
        return {
            "engine": args.engine,
            **passes,
            "processor": law_of(self.processor),
            "max-new-tokens": str(args.max_new_tokens),
            "template": "none" if args.raw else "chat",
            "stop": json.dumps(args.stop),
            "grammar": "none" if not any(grammar) else short(json.dumps(grammar).encode()),
        }

    def origin(self, loaded: Loaded) -> dict[str, str]:
        """All that a text comes of, beside its prompt and its seed."""
        if self.args.engine == LLAMA_CPP:  # the weights are its own, and the copy's name is that of the file's content
            return {**self.asked, "model": copy_of(file_of(self.args.model), weights=False).name}
        return {**self.asked, "model": weights_of(loaded.model)}

    def over(
        self, loaded: Loaded, grammar: Grammar | None, read: ReadTarget, read_assistant: Read
    ) -> Callable[[DecodeState, int | None, Recorder | None], Step]:
        """(the state before the first step, the seed, what records it) → a text's step, over one predictor for all.

        With a seed the text depends on the model, the prompt and the seed alone: not on the drafter or draft length.
        """
        args, vocab_size, assistant = self.args, vocabulary_of(loaded), None
        shared: SharedTokens | None = None
        until = stop_string(loaded.tokenizer, *args.stop) if args.stop else never
        if args.draft_model is not None:
            helper = unwrap(self.load_helper(args.draft_model, args.dtype))
            assistant, shared = helper.model, shared_tokens(loaded, helper)
        bigrams = _bigrams(args.bigrams, loaded)
        head = None if args.head is None else load_head(args.head, loaded.model)
        given = Given.TAKEN if head is None else Given.KEPT  # its embeddings and its head are what the head reads, too
        with one_sentence("model", f"the model cannot be read in {args.dtype}", REMEDY):
            target = read(self.accelerate(loaded.model, given), None if head is None else head.reads)
        drafts = None if head is None or isinstance(target, LlamaCpp) else HeadPredictor(head, target)

        def setting(state: DecodeState, processor: Processor, rng: Sampling) -> Setting:
            return Setting(
                loaded.model,
                vocab_size,
                state.tokens,
                processor,
                rng,
                assistant,
                lambda: bigrams,
                read_assistant,
                shared,
                drafts,
            )

        def judged(state: DecodeState, rng: S, rule: Rule[S], recorder: Recorder | None) -> Step:
            gamma = POLICIES[args.policy](args.gamma, self.processor.temperature, target.meter)
            answer = None if grammar is None else grammar.after(state.tokens)
            processor: Processor = self.processor if answer is None else Constrained(self.processor, answer)
            drafting = self.make(setting(state, processor, rng))
            over: Condition = until
            cut: Callable[[Drafted], Drafted] = all_drafts
            if answer is not None:
                if drafting.drafter is not propose_nothing:  # who drafts nothing drafts nothing that is forced, either
                    # A head reads what the target holds, of forced drafts too: that would be a pass of its own.
                    before = first_of if DRAFTERS[self.drafts].headed else then
                    drafting = evolve(drafting, drafter=before(Forced(answer), drafting.drafter))
                over, cut = any_of(until, answer.is_over), CutForbidden(answer)
            observe: Observer = unobserved
            reading: Predictor = target
            if recorder is not None:
                drafting = evolve(drafting, drafter=recorder.drafting(drafting.drafter))
                reading, observe = recorder.reading(target), recorder
            return step_of(drafting, gamma, reading, processor, rng, rule, (target,), over, cut, observe)

        def step(state: DecodeState, seed: int | None, recorder: Recorder | None) -> Step:
            if seed is None:
                dice = _dice()
                return judged(state, dice, RULES[self.judges](dice), recorder)
            noise = SharedNoise(seed)
            return judged(state, noise, COUPLED[self.judges](noise), recorder)

        return step


def _answer(steps: _Steps) -> int:
    args = steps.args
    loaded, state = _begun(args)
    grammar = _grammar(args, loaded)
    step = steps.over(loaded, grammar, _reading(args, state), partial(CachedPredictor))(state, args.seed, None)
    code, end = _stream(step, state, loaded) if not args.json else _tell(step, state, loaded, args.seed)
    if (
        grammar is not None
        and isinstance(end, Finished)
        and end.reason is Reason.LIMIT
        and not grammar.after(state.tokens).is_complete(end.state)
    ):
        print("specflow: the answer is the beginning of one; give it more with --max-new-tokens", file=sys.stderr)
    return code


def _begun(args: argparse.Namespace) -> tuple[Loaded, DecodeState]:
    loaded = _target(args)
    tokens = loaded.ids(args.prompt) if args.raw else loaded.chat(args.prompt)
    return loaded, _started(loaded, tokens, args.max_new_tokens)


def _trace(args: argparse.Namespace) -> int:
    return tracing.main(args, lambda: _record(_asked(args)))


def _record(steps: _Steps) -> tuple[Trace, int]:
    """The trace of an answer, also where Ctrl-C ended it, and the exit code."""
    args = steps.args
    whole(1, "there is nothing to trace in 0 tokens")("max_new_tokens", args.max_new_tokens)
    loaded, state = _begun(args)
    recorder = Recorder(loaded.tokenizer, steps.about)
    read, helping = _reading(args, state), partial(CachedPredictor)
    step = steps.over(loaded, _grammar(args, loaded), read, helping)(state, args.seed, recorder)
    code = 0
    console = Console(stderr=True)
    with bars.Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("decoding", total=args.max_new_tokens)
        try:
            for new, _ in outcomes(step, state, loaded):
                progress.advance(task, len(new))
        except KeyboardInterrupt:
            code = INTERRUPTED
    return recorder.trace, code


def _reading(args: argparse.Namespace, state: DecodeState) -> ReadTarget:
    """What reads the target of one text."""
    return _alone if args.engine == TORCH else partial(_by_llama_cpp, file_of(args.model), state.request.limit)


def _alone(model: Module, features: tuple[int, ...] | None) -> CachedPredictor:
    return CachedPredictor(model, features=features)


def _by_llama_cpp(path: Path, context: int, model: Module, features: tuple[int, ...] | None) -> LlamaCpp:
    return LlamaCpp(path, max(1, context))


GRAMMARS: Final = ("--json-schema", "--regex", "--grammar", "--choices")
"""The options that say what an answer may be; one of them is given, or none."""


def _grammar(args: argparse.Namespace, loaded: Loaded) -> Grammar | None:
    """What the answer has to obey."""
    tokenizer, stop = loaded.tokenizer, loaded.stop
    if args.json_schema is not None:
        return Grammar.json_schema(_read("json-schema", args.json_schema), tokenizer, stop)
    if args.regex is not None:
        return Grammar.regex(args.regex, tokenizer, stop)
    if args.grammar is not None:
        return Grammar.lark(_read("grammar", args.grammar), tokenizer, stop)
    return None if args.choices is None else Grammar.choice(args.choices, tokenizer, stop)


def _read(name: str, path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DecodeError(name, f"--{name} cannot be read ({said(error)})", str(path), "give a file of text") from error


def _answer_all(steps: _Steps) -> int:
    """Answer what the file asks. What is answered stays, whatever ends the command."""
    args = steps.args
    rows = read_rows(args.file, raw=args.raw)
    seeds = {row.id: None if args.seed is None else seed_of(args.seed, row.id) for row in rows}
    unwrap(start((0,), args.max_new_tokens))
    with answers_in(args.out, rows, seeds, resume=args.resume) as answers:
        asked = steps.asked
        for there in answers.done.values():
            refuse_other("out", there, {**there, **asked}, AS_BEFORE)  # before a model is loaded, if one is
        left = [row for row in rows if row.id not in answers.done]
        progress = Progress(sys.stderr, len(rows), len(answers.done))
        try:
            if left:
                decode = _decoding(steps, left, seeds, answers, progress)
                answer_all(left, decode, args.slots or SLOTS, answers, progress)
        except KeyboardInterrupt:
            progress.end()
            progress.say(f"specflow: {progress.done} of {len(rows)} texts are done; --resume goes on with the others")
            return INTERRUPTED
        progress.end()
    if progress.done == len(rows):
        return 0
    progress.say(f"specflow: {len(rows) - progress.done} of {len(rows)} texts failed; --resume tries them again")
    return NOT_DECODED


def _decoding(
    steps: _Steps, rows: Sequence[Row], seeds: Mapping[Id, int | None], answers: Answers, progress: Progress
) -> Callable[[Row], Answer]:
    """What decodes a row, in a batch with others. `DecodeError` where `answers` holds those of another origin."""
    args, loaded = steps.args, _target(steps.args)
    origin = steps.origin(loaded)
    for there in answers.done.values():
        refuse_other("out", there, {**origin, "prompt": there["prompt"]}, AS_BEFORE)
    if not all(isinstance(row.asked, str) for row in rows):
        loaded.check_template()
    slots = min(args.slots or SLOTS, len(rows))

    def begun(row: Row) -> DecodeState:
        ids = loaded.ids if args.raw else loaded.chat
        tokens = ids(row.asked) if isinstance(row.asked, str) else loaded.conversation(row.asked)
        return _started(loaded, tokens, args.max_new_tokens)

    def read(model: Module, features: tuple[int, ...] | None) -> BatchPredictor | LlamaCpp:
        if args.engine == TORCH:
            return BatchPredictor(model, slots, features=features)
        lengths = [1]
        for row in rows:
            with suppress(DecodeError):  # it is told when the row's turn comes
                lengths.append(begun(row).request.limit)
        return LlamaCpp(file_of(args.model), max(lengths), slots=slots)

    step_for = steps.over(loaded, _grammar(args, loaded), read, cache(partial(BatchPredictor, slots=slots)))
    progress.begin()

    def decode(row: Row) -> Answer:
        state, seed = begun(row), seeds[row.id]
        end: DecodeState | Finished = state
        for new, end in outcomes(step_for(state, seed, None), state, loaded):  # noqa: B007 - the last
            progress.decoded(len(new))
        assert isinstance(end, Finished)
        of = {**origin, "prompt": row.name}
        return Answer.of(row.id, loaded.text(end.state.output), end.state, end.reason, seed, of)

    return decode


def _check(args: argparse.Namespace, drafts: str, judges: str) -> None:
    """Refuses what is not a text, and an option that another one makes meaningless."""
    given = [option for option in GRAMMARS if getattr(args, option[2:].replace("-", "_")) is not None]
    if len(given) > 1:
        raise DecodeError("grammar", "an answer obeys one grammar", " and ".join(given), "give one of them")
    for name in ("json_schema", "grammar"):
        if (path := getattr(args, name)) is not None:
            _read(name.replace("_", "-"), path)  # what is wrong with it is told before a model is loaded
    for string in args.stop:
        check_text("stop", string)
    whole(1, "draft at least one token")("gamma", args.gamma)
    if args.gamma > sys.maxsize:
        raise DecodeError("gamma", "gamma is beyond the longest text", args.gamma, "draft fewer tokens")
    _check_drafter(args, drafts)
    accelerate = None if args.accelerate == "no" else args.accelerate
    check_engine(args, {"--head": args.head, "--accelerate": accelerate})
    if args.seed is not None and judges not in COUPLED:
        happened, remedy = "a seed has no text of its own under this rule", f"use --rule {' or '.join(COUPLED)}"
        raise DecodeError("rule", happened, judges, remedy)


def _check_drafter(args: argparse.Namespace, drafts: str) -> None:
    """The same of what drafts, and of what it drafts with."""
    entry = DRAFTERS[drafts]
    if args.draft_model is not None and not entry.assisted:
        received = f"--drafter {args.drafter} and --draft-model {args.draft_model}"
        raise DecodeError("drafter", "a drafter and a draft model are both given", received, "give one of them")
    if args.draft_model is None and entry.assisted:
        received, remedy = f"--drafter {args.drafter}", "name one with --draft-model"
        raise DecodeError("drafter", "there is no model to draft with", received, remedy)
    if args.head is not None and not entry.headed:
        received = f"--drafter {drafts} and --head {args.head}"
        raise DecodeError("drafter", "a drafter and a head are both given", received, "give one of them")
    if args.head is None and entry.headed:
        received, remedy = f"--drafter {args.drafter}", "name one with --head"
        raise DecodeError("drafter", "there is no head to draft with", received, remedy)
    if args.bigrams is not None and not entry.bigrams:
        received = args.draft_model or drafts
        raise DecodeError("bigrams", "only trees are drafted from bigrams", received, "use --drafter tree")
    if args.bigrams is not None and not _can_hold(args.bigrams):
        remedy = "name a file in a folder"
        raise DecodeError("bigrams", "no file can be kept there", str(args.bigrams), remedy)


def _check_source(args: argparse.Namespace) -> None:
    """The same of what is asked, and of the options that only a file of prompts gives a meaning."""
    if (args.prompt is None) is (args.file is None):
        happened, remedy = "a prompt and a file of prompts are both given", "give one of them"
        received = f"{shown(args.prompt)} and --file {args.file}"
        if args.file is None:
            happened, received = "there is nothing to answer", "no prompt"
            remedy = "give one, pipe one into the command, or name a file with --file"
        raise DecodeError("prompt", happened, received, remedy)
    if args.file is None:
        check_text("prompt", args.prompt)
        needless = {"--out": args.out, "--slots": args.slots, "--resume": args.resume or None}
        option = next((option for option, given in needless.items() if given is not None), None)
        if option is not None:
            happened = f"{option} means nothing without a file of prompts"
            raise DecodeError(option.strip("-"), happened, option, "leave it out, or name the file with --file")
    elif args.json:
        happened, remedy = "--json means nothing beside --file, whose answers are JSON", "leave it out"
        raise DecodeError("json", happened, "--json", remedy)
    elif args.out is None:
        raise DecodeError("out", "there is no file for the answers", f"--file {args.file}", "name one with --out")
    or_none(whole(1, "decode one text at a time at least"))("slots", args.slots)


def _can_hold(path: Path) -> bool:
    return os.path.isfile(path) or (not os.path.exists(path) and can_be_written(path))


def _dice() -> Dice:
    """Dice of their own, whatever torch's default generator is seeded with."""
    generator = torch.Generator()
    generator.seed()
    return Dice(generator)


def _processor(args: argparse.Namespace) -> LogitsProcessor:
    temperature = 1.0 if args.temperature is None else args.temperature
    match args.top_k, args.top_p:
        case int(top_k), float(top_p):
            return TopKNucleusProcessor(temperature, top_k, top_p)
        case int(top_k), None:
            return TopKProcessor(temperature, top_k)
        case None, float(top_p):
            return NucleusProcessor(temperature, top_p)
    if args.sample or args.temperature is not None:
        return MultinomialProcessor(temperature)
    return GreedyProcessor()


def _started(loaded: Loaded, prompt: Tokens, max_new_tokens: int) -> DecodeState:
    return unwrap(start(prompt, max_new_tokens, loaded.stop, limits_of(loaded.model)))


def _bigrams(path: Path | None, loaded: Loaded) -> Bigrams | None:
    """The table in the file; if there is no file, the model is asked, and its answers are kept there."""
    if path is None:
        return None
    if not path.exists():
        print(f"asking the model for its bigrams, once; they are kept in {path}", file=sys.stderr)
        with one_sentence("model", f"the model cannot be asked in {loaded.model.dtype}", REMEDY):
            bigrams_of(loaded.model, loaded.tokenizer).save(path)
    bigrams, vocab_size = Bigrams.load(path), vocabulary_of(loaded)
    if len(bigrams.tokens) != vocab_size:
        remedy = "give the table of this model, or the name of a new file"
        received = f"a table of {len(bigrams.tokens)} tokens for {vocab_size}"
        raise DecodeError("bigrams", "the table is of another vocabulary", received, remedy)
    return bigrams


def _stream(step: Step, state: DecodeState, loaded: Loaded) -> tuple[int, DecodeState | Finished]:
    """Print the text as it comes and one line about it at the end, also when interrupted."""
    seen = visible if sys.stdout.isatty() else str  # a model shall not command a terminal; a file gets what it said
    told, began, code = Told(loaded), perf_counter(), 0
    end: DecodeState | Finished = state
    try:
        for new, end in outcomes(step, state, loaded):
            state = end if isinstance(end, DecodeState) else end.state
            print(seen("".join([told.more(token) for token in new])), end="", flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    print(seen(told.rest()), flush=True)
    print(f"[{summary(len(state.output), perf_counter() - began, state.tally)}]", file=sys.stderr)
    return code, end


def _tell(step: Step, state: DecodeState, loaded: Loaded, seed: int | None) -> tuple[int, DecodeState | Finished]:
    """Print the text and its accounting as one JSON object once it is whole, also when interrupted."""
    end: DecodeState | Finished = state
    with suppress(KeyboardInterrupt):
        for _, end in outcomes(step, state, loaded):  # noqa: B007 - the last
            pass
    state, reason = (end.state, end.reason) if isinstance(end, Finished) else (end, None)
    print(Answer.of(None, loaded.text(state.output), state, reason, seed).line)
    return INTERRUPTED if reason is None else 0, end
