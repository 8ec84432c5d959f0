"""`specflow record` and `specflow replay`: the commands."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Final, get_args

import torch
from attrs import asdict, evolve
from rich.console import Console
from rich.table import Table
from torch.nn import Module
from transformers.utils import logging

from specflow.accelerate import Given
from specflow.bench import read_prompts
from specflow.bench.decoders import PEERS, Parts, imported
from specflow.bench.prompts import OWN_PROMPTS, spread
from specflow.bench.report import accepted_text, positions_text
from specflow.bench.stopwatch import clock_for
from specflow.catalogue import DRAFTERS, POLICIES, RULES, Drafting, Setting
from specflow.commands import ACCELERATE, named_model, one_sentence, processor_name
from specflow.drafters import Bigrams
from specflow.errors import DecodeError, unwrap
from specflow.files import can_be_written, save_text
from specflow.guards.checks import a, or_none, shown, whole
from specflow.models import SMOLLM2, DType, Loaded, load
from specflow.origin import refuse_other, weights_of
from specflow.predictors import CachedPredictor, limits_of
from specflow.processors import GreedyProcessor, MultinomialProcessor
from specflow.randomness import Dice
from specflow.replay.played import MOST_LOOKED, Decoder, Replay, replay
from specflow.replay.record import KEPT, record
from specflow.replay.recording import Recording
from specflow.state import Predictor

USUAL: Final = ("autoregressive", "suffix", "suffix@cost", "tree@8")

SHOWN: Final = 8
"""How many positions of a draft the table shows."""

PIPED: Final = 130
"""The width of the table where it goes to a file and not to a terminal."""

OFTEN: Final = 30.0
"""The seconds between two savings of a recording."""

NOT_RECORDED: Final = 130

PEER: Final = "decoders of transformers and llama.cpp are not replayed"

RECORDED: Final = "name the recorded model as it was recorded (--dtype, --accelerate), or record again"
"""What to do where `replay --model` is another."""

_decoding: Final = partial(one_sentence, "model", "the model cannot be read", "try another --dtype")


def add_commands(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """`record` and `replay`, added to the commands."""
    keep = add_parser("record", help="decode prompts once, to try decoders on the texts with replay")
    _add_record_arguments(keep)
    keep.set_defaults(run=_record)
    again = add_parser("replay", help="try decoders on recorded texts, without the model")
    _add_replay_arguments(again)
    again.set_defaults(run=_replay)


def _add_record_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="smollm2 (default), a local path or a hub name")
    add("--dtype", choices=get_args(DType), default="float32")
    add("--accelerate", choices=ACCELERATE, default="no", help="record a faster model (docs/acceleration.md)")
    prompts = "JSONL in Spec-Bench's format (default: our own)"
    add("--prompts", type=Path, default=OWN_PROMPTS, metavar="FILE", help=prompts)
    add("--out", type=Path, required=True, metavar="RECORDING", help="the file that the recording is kept in")
    add("--limit", type=int, metavar="N", help="only N prompts, spread over the categories")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--max-prompt-tokens", type=int, default=1024, metavar="N", help="keep the end of longer prompts")
    add("--temperature", type=float, metavar="T", help="sample instead of decoding greedily")
    add("--seed", type=int, metavar="S", help="the noise of sampled texts, which then are those of the seed")
    add("--kept", type=int, default=KEPT, metavar="K", help=f"how many tokens of each row are kept ({KEPT})")
    add("--resume", action="store_true", help="go on with an --out that was begun")


def _add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recording", type=Path, metavar="RECORDING", help="what `specflow record` kept")
    names = f"names: {', '.join(DRAFTERS)}; policies: {', '.join(POLICIES)}; rules: {', '.join(RULES)}"
    decoders = f"autoregressive, name[@gamma or policy][@rule] or module:function; {names}"
    add("--decoders", nargs="+", default=list(USUAL), metavar="NAME", help=decoders)
    add("--draft-model", metavar="MODEL", help="what drafts in llm")
    add("--dtype", choices=get_args(DType), default="float32", help="of --draft-model and --model")
    add("--bigrams", type=Path, metavar="FILE", help="the target's bigrams for trees, as generate --bigrams keeps them")
    live = "the recorded model, asked for rows that are missing; RECORDING then holds them"
    add("--model", metavar="MODEL", help=live)
    add("--accelerate", choices=ACCELERATE, default="no", help="of --model, as it was recorded")
    add(
        "--hindsight",
        type=int,
        default=MOST_LOOKED,
        metavar="N",
        help=f"how many drafts hindsight sees ({MOST_LOOKED})",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures")


def _record(args: argparse.Namespace) -> int:
    """Record: 0, or 130 after Ctrl-C; what was recorded up to then is kept. `DecodeError` for what cannot be."""
    or_none(whole(1, "leave it out for all prompts"))("limit", args.limit)
    for name in ("max_new_tokens", "max_prompt_tokens", "kept"):
        whole(1, "give 1 or more")(name, getattr(args, name))
    if args.seed is not None and args.temperature is None:
        raise DecodeError("seed", "greedy texts have no seed", args.seed, "give a --temperature, too")
    processor = GreedyProcessor() if args.temperature is None else MultinomialProcessor(args.temperature)
    if not can_be_written(args.out):
        raise DecodeError("out", "no file can be written there", shown(str(args.out)), "name a file in a folder")
    onto = Recording.load(args.out) if args.resume and args.out.exists() else None
    if onto is None and args.out.exists():
        remedy = "add --resume to go on with it, or name another file"
        raise DecodeError("out", "the file is there already", shown(str(args.out)), remedy)
    prompts = spread(unwrap(read_prompts(args.prompts)), args.limit)
    logging.set_verbosity_error()
    loaded, console = named_model(args), Console(stderr=True)
    last: list[Recording] = []
    saved = perf_counter()

    def keep(recording: Recording) -> None:
        nonlocal saved
        last[:] = [recording]
        console.print(f"{len(recording.texts)} of {len(prompts)} texts", style="dim")
        if perf_counter() - saved > OFTEN:
            recording.save(args.out)
            saved = perf_counter()

    code = 0
    try:
        with _decoding():
            model = ACCELERATE[args.accelerate](loaded.model, Given.KEPT)
            record(
                CachedPredictor(model),
                [loaded.chat(prompt.text)[-args.max_prompt_tokens :] for prompt in prompts],
                args.max_new_tokens,
                loaded.stop,
                limits_of(loaded.model),
                processor,
                args.seed,
                args.kept,
                onto=onto,
                facts=_facts(args, loaded),
                progress=keep,
                clock=clock_for(loaded.model),
                origin=_origin(args, loaded),
            )
    except KeyboardInterrupt:
        code = NOT_RECORDED
        print(f"specflow: {len(last[-1].texts if last else ())} texts are recorded; --resume goes on", file=sys.stderr)
    finally:
        if last:  # whatever ended it
            last[-1].save(args.out)
    return code


def _origin(args: argparse.Namespace, loaded: Loaded) -> dict[str, str]:
    """What rows of `--model` come of: a recording holds those of one."""
    return {"dtype": args.dtype, "accelerate": args.accelerate, "model": weights_of(loaded.model)}


def _facts(args: argparse.Namespace, loaded: Loaded) -> dict[str, str]:
    """What a reader must know of a recording."""
    return {
        "model": f"{args.model}, {args.dtype}, accelerate {args.accelerate}",
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads, {loaded.model.device}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _replay(args: argparse.Namespace) -> int:
    """Replay and print the table. `DecodeError` for what cannot be replayed."""
    whole(0, "give 0 or more")("hindsight", args.hindsight)
    if args.json is not None and not can_be_written(args.json):
        raise DecodeError("json", "no file can be written there", shown(str(args.json)), "name a file in a folder")
    _check_needless(args)
    recording = Recording.load(args.recording)
    bigrams = None if args.bigrams is None else Bigrams.load(args.bigrams)
    if bigrams is not None and len(bigrams.tokens) != recording.vocab_size:
        received = f"a table of {len(bigrams.tokens)} tokens for {recording.vocab_size}"
        raise DecodeError("bigrams", "the table is of another vocabulary", received, "give that of the recorded model")
    for label in args.decoders:
        _check(label, args)
    logging.set_verbosity_error()
    assistant = None if args.draft_model is None else unwrap(load(args.draft_model, args.dtype)).model
    live = None if args.model is None else _live(args, recording)
    decoders = [decoder_of(label, recording, assistant, bigrams) for label in args.decoders]
    found: dict[str, Replay] = {}
    with one_sentence("decoders", "a decoder fails", "leave it out, or see the cause"):
        for label, decoder in zip(args.decoders, decoders, strict=True):
            found[label] = replay(recording, decoder, live, most=args.hindsight)
            recording = found[label].recording
    if live is not None:
        recording.save(args.recording)
    console = Console(width=None if sys.stdout.isatty() else PIPED)
    with console.capture() as table:  # rich would end the program where the reader of a pipe has gone
        console.print(_table(found, recording))
    print(table.get(), end="", flush=True)
    if args.json is not None:
        save_text(args.json, json.dumps(_figures(found, recording), indent=1))
    return 0


def _check_needless(args: argparse.Namespace) -> None:
    """Refuses an option that says something of a model which is not named."""
    if args.model is None and args.accelerate != "no":
        received, remedy = f"--accelerate {args.accelerate}", "name the recorded one with --model"
        raise DecodeError("accelerate", "there is no model to accelerate", received, remedy)
    if args.model is None and args.draft_model is None and args.dtype != "float32":
        received, remedy = f"--dtype {args.dtype}", "name one with --model or --draft-model"
        raise DecodeError("dtype", "there is no model to load", received, remedy)


def _check(label: str, args: argparse.Namespace) -> None:
    """Refuses what cannot be replayed, before a model is loaded."""
    if ":" in label:
        return
    base = Parts.of(label).base
    entry = DRAFTERS.get(base)
    if base in PEERS or (entry is not None and entry.headed):
        happened = "a head reads what the target holds, which is not recorded" if base not in PEERS else PEER
        raise DecodeError("decoders", happened, label, "measure it with specflow bench")
    if entry is not None and entry.assisted and args.draft_model is None:
        raise DecodeError("decoders", "there is no draft model", label, "name one with --draft-model")
    if entry is not None and entry.bigrams and args.bigrams is None:
        print(f"specflow: {label} is replayed without the target's bigrams; --bigrams names them", file=sys.stderr)


def _live(args: argparse.Namespace, recording: Recording) -> Predictor:
    """The recorded model. `DecodeError` for any other: its rows would stand beside those of the recorded one."""
    loaded = named_model(args)
    refuse_other("model", recording.origin, {**recording.origin, **_origin(args, loaded)}, RECORDED)
    with _decoding():
        return CachedPredictor(ACCELERATE[args.accelerate](loaded.model, Given.KEPT))


def decoder_of(label: str, recording: Recording, assistant: Module | None, bigrams: Bigrams | None) -> Decoder:
    """The decoder that `specflow bench` knows by this name, to be replayed; or what a user's function makes."""
    if ":" in label:
        with one_sentence("decoders", "a decoder cannot be made", "give a function of nothing that returns a Decoder"):
            made: object = imported(label)()
        a(Decoder, "return a Decoder from the function")("decoders", made)
        assert isinstance(made, Decoder)
        return made
    parts = Parts.of(label)
    entry = DRAFTERS["none" if parts.base == "autoregressive" else parts.base]
    policy, most = parts.paced
    make, heat = entry.make(), recording.temperature

    def drafting(setting: Setting) -> Drafting:
        return make(evolve(setting, assistant=assistant, bigrams=lambda: bigrams))

    rule = RULES[parts.rule or "reject"](Dice())
    return Decoder(drafting, lambda meter: policy(most, 1.0 if heat is None else heat, meter), rule)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _table(found: Mapping[str, Replay], recording: Recording) -> Table:
    about = ", ".join(filter(None, (recording.facts.get("model"), recording.facts.get("machine"))))
    table = Table(title=f"{len(recording.texts)} texts replayed{' of ' * bool(about)}{about}")
    headings = ("decoder", "tokens", "accepted", "by position, %", "tok/s", "drafting", "best", "regret", "regret")
    for heading in headings:
        left = heading in ("decoder", "by position, %")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    table.add_row("", "a pass", "", "", "predicted", "", "gamma", "fixed", "each step", style="dim")
    for label, played in found.items():
        tally = played.tally
        table.add_row(
            label,
            f"{played.tokens_per_pass:.3f}",
            accepted_text(tally),
            positions_text(tally, SHOWN),
            f"{played.tokens / played.seconds:.1f}" if played.seconds else "",
            _share(played.drafting / played.seconds if played.seconds else None),
            "" if played.best_gamma is None else str(played.best_gamma),
            _share(played.regret),
            _share(played.regret_of_steps),
        )
    return table


def _figures(found: Mapping[str, Replay], recording: Recording) -> dict[str, object]:
    """What `--json` writes."""

    def of(played: Replay) -> dict[str, object]:
        names = ("tokens", "passes", "tokens_per_pass", "seconds", "drafting", "best_gamma")
        figures: dict[str, object] = {name: getattr(played, name) for name in names}
        texts = [{"passes": len(text.rounds), "seconds": text.seconds} for text in played.texts]
        regrets = {"regret": played.regret, "regret_of_steps": played.regret_of_steps}
        return figures | regrets | {"tally": asdict(played.tally), "texts": texts}

    return {"facts": dict(recording.facts), "decoders": {label: of(played) for label, played in found.items()}}
