"""`specflow bench`: the command."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, get_args

import torch
from attrs import evolve
from returns.result import Failure, Success
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import Module

from specflow.bench.batches import Turn, in_batches, one_by_one, turns
from specflow.bench.batches import show as show_batches
from specflow.bench.batches import to_json as batches_to_json
from specflow.bench.decoders import NAMES, Decoder, Models, decoder, imported
from specflow.bench.engines import Gguf
from specflow.bench.measure import Plan, Run, measure, warmed_up
from specflow.bench.prompts import OWN_PROMPTS, read_prompts, spread
from specflow.bench.report import Absent, build, facts_of, show, to_json
from specflow.catalogue import POLICIES, RULES
from specflow.commands import (
    ENGINES,
    LLAMA_CPP,
    TORCH,
    check_engine,
    one_sentence,
    version_of,
)
from specflow.errors import DecodeError, said, unwrap
from specflow.files import can_be_written, save_text
from specflow.guards.checks import a, or_none, shown, whole
from specflow.heads import load_head
from specflow.models import SMOLLM2, DType, file_of, load, shared_tokens
from specflow.processors import GreedyProcessor, MultinomialProcessor

USUAL: Final[Mapping[str, tuple[str, ...]]] = {
    TORCH: ("autoregressive", "suffix@cost", "generate", "hf-lookup@10"),
    LLAMA_CPP: ("llama.cpp", "llama.cpp-lookup@10", "autoregressive", "suffix@cost"),
}
"""The decoders of each engine, unless others are named."""

PIPED: Final = 130
"""The width of the tables where they go to a file and not to a terminal."""

INSTALL: Final = "pip install 'specflow[bench]'"

_decoding: Final = partial(one_sentence, "decoders", "a decoder fails", "leave it out, or see the cause")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add, dtypes = parser.add_argument, get_args(DType)
    names = f"names: {', '.join(NAMES)}; policies: {', '.join(POLICIES)}; rules: {', '.join(RULES)}"
    decoders = f"[model/]name[@gamma or policy][@rule] or [model/]module:function; {names}"
    add("--decoders", nargs="+", metavar="NAME", help=decoders)
    add("--baseline", metavar="NAME", help="the decoder that others are divided by (default: the first)")
    add("--model", default=SMOLLM2, help="the target: smollm2, a local path or a hub name")
    add("--dtype", choices=dtypes, default="float32")
    engine = "what runs --model; llama.cpp runs GGUF files, and its own decoders are measured, too (docs/interop.md)"
    add("--engine", choices=ENGINES, default=TORCH, help=engine)
    add("--draft-model", metavar="MODEL", help="what drafts in llm, retokenised and hf-assistant")
    add("--draft-dtype", choices=dtypes, help="of --draft-model; default: as --dtype")
    add(
        "--head",
        metavar="FOLDER",
        help="the head of head, head-chain, head+tree, …: a folder or a hub name (docs/heads.md)",
    )
    example = "--also fast=specflow.accelerate:fast --decoders autoregressive fast/suffix@cost"
    also = f"more targets, made from the model by a function: {example}"
    add("--also", nargs="+", default=[], metavar="NAME=module:function", help=also)
    prompts = "JSONL in Spec-Bench's format (default: our own)"
    add("--prompts", type=Path, default=OWN_PROMPTS, metavar="FILE", help=prompts)
    add("--limit", type=int, metavar="N", help="only N prompts, spread over the categories")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--max-prompt-tokens", type=int, default=1024, metavar="N", help="keep the end of longer prompts")
    add("--repeats", type=int, default=1, metavar="N")
    add("--temperature", type=float, metavar="T", help="sample instead of decoding greedily")
    add("--seed", type=int, default=0)
    add("--slots", type=int, metavar="N", help="decode N texts at a time, and one by one by the first decoder")
    add("--device", default="cpu", help="where the models run: cpu, cuda, …")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--html", type=Path, metavar="FILE", help=f"write a page with plots; needs {INSTALL}")


def main(args: argparse.Namespace) -> int:
    """Measure and report: 0, or 130 after Ctrl-C, which still reports. `DecodeError` for what cannot be measured."""
    args.decoders = args.decoders or [*USUAL[args.engine]]
    _check(args)
    errors = Console(stderr=True)
    plan, absent = _planned(args, errors)
    facts = facts_of(plan, args.model)
    if args.engine == LLAMA_CPP:
        facts["engine"] = f"{LLAMA_CPP}, llama-cpp-python {version_of('llama-cpp-python')}"
    if args.draft_model is not None:
        facts["draft model"] = f"{args.draft_model}, {args.draft_dtype or args.dtype}"
    if args.head is not None:
        facts["head"] = args.head
    if args.also:
        facts["also"] = ", ".join(args.also)
    if args.slots is not None:
        return _compare_batches(plan, absent, args, facts, errors)
    runs, code = _measured(plan, errors)
    if not runs:
        return code
    report = build(plan, runs, args.baseline or plan.decoders[0].label, absent, facts)
    _print(partial(show, report))
    if args.json is not None:
        save_text(args.json, to_json(report))
    if args.html is not None and _can_draw():
        from specflow.bench.page import to_html  # noqa: PLC0415 - its imports are an optional extra

        save_text(args.html, to_html(report))
    elif args.html is not None:
        missing = f"absent: {args.html}: matplotlib or jinja2 is not installed; run `{INSTALL}`"
        errors.print(missing, style="yellow", markup=False)
    return code


def _print(tell: Callable[[Console], None]) -> None:
    """What is told, on the standard output."""
    console = Console(width=None if sys.stdout.isatty() else PIPED)
    with console.capture() as tables:  # rich would end the program where the reader of a pipe has gone
        tell(console)
    print(tables.get(), end="", flush=True)


def _compare_batches(
    plan: Plan, absent: Sequence[Absent], args: argparse.Namespace, facts: Mapping[str, str], errors: Console
) -> int:
    """The same of whole batches: 0, or 130 after Ctrl-C, which still reports the turns that all decoders had."""
    first = plan.decoders[0]
    decoders, absent = {f"{first.label}, one by one": one_by_one(plan, first)}, [*absent]
    for each in plan.decoders:
        errors.print(f"warming up batches of {each.label}", style="dim", markup=False, emoji=False)
        match in_batches(plan, each, args.slots):
            case Success(decode):
                decoders[each.label] = decode
            case Failure(DecodeError() as error):
                absent.append(Absent(each.label, str(error)))
    if len(decoders) == 1:
        raise DecodeError("decoders", "none decodes several texts at once", first.label, "name others")
    found: list[Turn] = []
    code = 0
    try:
        with _decoding():
            for turn in turns(decoders, plan):
                errors.print(f"{turn.decoder}: {turn.rate:.1f} tokens/s", style="dim", markup=False, emoji=False)
                found.append(turn)
    except KeyboardInterrupt:
        code, found = 130, found[: len(found) // len(decoders) * len(decoders)]
    if found:
        _print(lambda console: show_batches(plan, found, absent, args.slots, console))
        if args.json is not None:
            save_text(args.json, batches_to_json(found, args.slots, facts))
    return code


def _check(args: argparse.Namespace) -> None:
    """Refuses, before a model is loaded, what could not be measured, and what could not be kept afterwards."""
    if args.max_new_tokens == 0:
        raise DecodeError("max_new_tokens", "there is nothing to measure", "0 tokens", "give 1 or more")
    check_engine(args, {"--device": None if args.device == "cpu" else args.device})
    for name in ("max_prompt_tokens", "repeats"):
        whole(1, "give 1 or more")(name, getattr(args, name))
    or_none(whole(1, "leave it out for all prompts"))("limit", args.limit)
    or_none(whole(1, "decode one text at a time at least"))("slots", args.slots)
    if args.slots is not None and (args.html is not None or args.baseline is not None):
        received = "--html" if args.html is not None else "--baseline"
        happened = f"{received} means nothing beside --slots"
        raise DecodeError(received.strip("-"), happened, received, "leave it out; the first decoder is the baseline")
    if args.draft_model is None and args.draft_dtype is not None:
        raise DecodeError("draft_dtype", "there is no draft model", args.draft_dtype, "name --draft-model")
    twice = [label for label in args.decoders if args.decoders.count(label) > 1]
    if twice:
        raise DecodeError("decoders", "a decoder is named twice", twice[0], "name each once; --repeats measures again")
    made = [declared.partition("=")[0] for declared in args.also]
    again = [name for name in made if made.count(name) > 1]
    if again:
        raise DecodeError("also", "two models have one name", again[0], "name each by itself")
    _check_baseline(args.baseline, args.decoders)
    for name in ("json", "html"):
        path: Path | None = getattr(args, name)
        if path is not None and not can_be_written(path):
            raise DecodeError(name, "no file can be written there", shown(str(path)), "name a file in a folder")


def _check_baseline(baseline: str | None, labels: Sequence[str]) -> None:
    if baseline not in {None, *labels}:
        raise DecodeError("baseline", "the baseline is not among the decoders that run", baseline, "name one")


def _moved(model: Module, device: str) -> None:
    try:
        if torch.device(device).type == "meta":
            raise DecodeError("device", "nothing is computed there", device, "name cpu or cuda")
        model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DecodeError("device", f"the model cannot be moved there ({said(error)})", device, "name cpu") from error


def _made(declared: str, model: Module) -> tuple[str, Module]:
    """A target that a user's function makes of the model."""
    name, _, path = declared.partition("=")
    if not name or "/" in name or ":" not in path:
        raise DecodeError("also", "this declares no model", declared, "give NAME=module:function")
    function = imported(path)
    try:
        made = function(model)
    except DecodeError:
        raise
    except Exception as error:  # it is the user's
        raise DecodeError("also", f"the function fails ({said(error)})", declared, "see the cause") from error
    a(Module, "return a model from the function")("also", made)
    assert isinstance(made, Module)
    return name, made


def _planned(args: argparse.Namespace, errors: Console) -> tuple[Plan, tuple[Absent, ...]]:
    """What to measure, and which decoders cannot be. `DecodeError` where nothing can."""
    prompts = spread(unwrap(read_prompts(args.prompts)), args.limit)
    loaded = unwrap(load(args.model, args.dtype))
    _moved(loaded.model, args.device)
    targets: dict[str, Module] = {"": loaded.model} | dict(_made(declared, loaded.model) for declared in args.also)
    assistant, tokenizer, shared = None, None, None
    if args.draft_model is not None:
        helper = unwrap(load(args.draft_model, args.draft_dtype or args.dtype))
        assistant, tokenizer, shared = helper.model, helper.tokenizer, shared_tokens(loaded, helper)
        _moved(assistant, args.device)
    processor = GreedyProcessor() if args.temperature is None else MultinomialProcessor(args.temperature)
    head = None if args.head is None else load_head(args.head, loaded.model)
    models = Models(targets, assistant, shared, head, tokenizer)
    lengths = args.max_new_tokens, args.max_prompt_tokens
    plan = Plan(loaded, models, (), prompts, processor, *lengths, args.repeats, args.seed)
    longest = max(unwrap(plan.state(prompt)).request.limit for prompt in prompts)
    if args.engine == LLAMA_CPP:
        models = evolve(models, gguf=Gguf(file_of(args.model), longest))
        plan = evolve(plan, models=models)
    present, absent = [], []
    for label in args.decoders:
        errors.print(f"warming up {label}", style="dim", markup=False, emoji=False)
        match decoder(label, models).bind(partial(warmed_up, plan)):
            case Success(Decoder() as ready):
                present.append(ready)
            case Failure(DecodeError() as error):
                absent.append(Absent(label, str(error)))
    if not present:
        raise DecodeError("decoders", "no decoder can run", "; ".join(one.reason for one in absent), "name others")
    _check_baseline(args.baseline, [one.label for one in present])
    return evolve(plan, decoders=tuple(present)), tuple(absent)


def _measured(plan: Plan, errors: Console) -> tuple[list[Run], int]:
    """The runs, and the exit code. After Ctrl-C those of the rounds in which every decoder had its turn."""
    runs: list[Run] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with _decoding(), Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("measuring", total=plan.texts)
            for run in measure(plan):
                runs.append(run)
                progress.update(task, advance=1, description=f"{run.category} {run.question_id}: {run.decoder}")
    except KeyboardInterrupt:
        return runs[: len(runs) // len(plan.decoders) * len(plan.decoders)], 130
    return runs, 0


def _can_draw() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("matplotlib", "jinja2"))
