"""`specflow distill`: the command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging

from specflow.accelerate import Given
from specflow.commands import ACCELERATE, named_model, one_sentence
from specflow.corpus import Row, read_rows
from specflow.distill.folder import made_folder, refuse_filled
from specflow.distill.prompts import kept_prompts
from specflow.distill.train import Heard, Recipe, distill
from specflow.guards.checks import whole
from specflow.models import SMOLLM2, DType, Loaded
from specflow.state import Tokens

MADE_UP: Final = 500
"""How many prompts a model makes up to learn from its own answers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add, usual = parser.add_argument, Recipe()
    add("--model", default=SMOLLM2, help="smollm2 (default), a local path or a hub name")
    add("--dtype", choices=get_args(DType), default="float32")
    add("--accelerate", choices=ACCELERATE, default="no", help="answer and read with a faster model, which is the same")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the head is kept (docs/heads.md)")
    prompts = "what the model answers, to learn from it: JSONL, as for generate --file; if not given, it makes them up"
    add("--prompts", type=Path, metavar="FILE", help=prompts)
    add("--made-up", type=int, default=MADE_UP, metavar="N", help=f"how many prompts the model makes up ({MADE_UP})")
    for name, about in (
        ("drafts", "how many tokens the head can say, the most frequent ones"),
        ("ahead", "for how many drafts in a row it is trained"),
        ("steps", "how many steps it is trained"),
        ("texts", "how many texts it learns from in a step"),
        ("every", "after how many steps it is tried on other texts, and kept"),
        ("new-tokens", "how long the answers may be"),
        ("seed", "which training this is"),
    ):
        standard: int = getattr(usual, name.replace("-", "_"))
        add(f"--{name}", type=int, default=standard, metavar="N", help=f"{about} ({standard})")
    add("--rate", type=float, default=usual.rate, help=f"the largest learning rate ({usual.rate})")
    add("--resume", action="store_true", help="go on with the training in --out")


def main(args: argparse.Namespace) -> int:
    """Train a head, saying how it does as it goes. What was learnt up to the last trial stays, whatever happens."""
    recipe = Recipe(
        args.drafts,
        args.ahead,
        args.steps,
        args.texts,
        args.rate,
        args.every,
        new_tokens=args.new_tokens,
        seed=args.seed,
    )
    whole(1, "ask for one prompt at least")("made_up", args.made_up)
    asked = None if args.prompts is None else read_rows(args.prompts, raw=False)
    folder = made_folder(args.out)
    if not args.resume:
        refuse_filled(folder)
    logging.set_verbosity_error()
    loaded = named_model(args)
    reading = ACCELERATE[args.accelerate](loaded.model, Given.KEPT)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        making = progress.add_task("prompts", total=args.made_up, visible=asked is None)
        answers = progress.add_task("answers", total=args.made_up if asked is None else len(asked))
        steps = progress.add_task("steps", total=args.steps)

        def tell(heard: Heard) -> None:
            rates = " ".join([f"{rate:.0%}" for rate in heard.right])
            progress.print(
                f"step {heard.step}: loss {heard.loss:.3f}; held out: {rates} right in a row, "
                f"{heard.length:.2f} tokens a pass",
                markup=False,
            )

        with one_sentence("model", "the head cannot be trained", "try another --dtype, or see the cause"):
            if asked is None:

                def told(done: int) -> None:
                    progress.update(making, completed=done)

                prompts = kept_prompts(loaded, args.made_up, args.seed, folder, told, reading)
            else:
                prompts = [_prompt(loaded, row) for row in asked]
            distill(
                loaded.model,
                prompts,
                folder,
                recipe,
                sorted(loaded.stop),
                tell,
                lambda done: progress.update(answers, completed=done),
                lambda step: progress.update(steps, completed=step),
                reading,
                resume=args.resume,
            )
    print(f"the head is in {args.out}: specflow generate --head {args.out} …", file=sys.stderr)
    return 0


def _prompt(loaded: Loaded, row: Row) -> Tokens:
    return loaded.chat(row.asked) if isinstance(row.asked, str) else loaded.conversation(row.asked)
