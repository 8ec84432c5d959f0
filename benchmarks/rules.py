"""The rules that judge drafts against each other: how many of the same drafts each of them accepts.

    python -m benchmarks.rules tables
    python -m benchmarks.rules smollm2 --drafter layers

`tables`: pairs of table models with three tokens, where the accepted tokens of a step are an exact expectation over
drafts and rule. `smollm2`: SmolLM2 in fp32, sampled at temperature 1, under drafts of its own first layers or of its
copy with weights of 8 bits. Along a text a draft is drawn at each position; how much of it each rule accepts is an
exact expectation over the rule's own randomness. Only the drafts are left to chance, and all rules share them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import sqrt
from statistics import fmean, stdev
from typing import Final, TypeAlias

import torch

from benchmarks.seed_invariance import first_layers
from specflow import (
    CachedPredictor,
    Dice,
    Drafted,
    Drafter,
    Fixed,
    LLMDrafter,
    MultinomialProcessor,
    Predictor,
    Tokens,
    autoregressive_step,
    limits_of,
    run,
    start,
)
from specflow.accelerate import lossy_int8
from specflow.models import Loaded, load
from specflow.randomness import Randomness
from specflow.stages import Block, Draft, Match, Reject, Score, Traverse
from specflow.state import Rule, Scored
from specflow.testing import Branch, TableModel, exact_law
from specflow.trees import preorder

MakeRule: TypeAlias = Callable[[Branch], Rule[Randomness]]
"""A rule, on randomness that takes every branch."""

Shape: TypeAlias = tuple[int, tuple[int, ...]]
"""How many drafts, and the widths of their tree; of a chain there are none."""

RULES: Final[dict[str, MakeRule]] = {"token rejection": Reject, "block": Block, "traversal": Traverse}
"""What is compared with one another, in the order of the columns."""

SAMPLED: Final = MultinomialProcessor(1.0)

SMALL: Final[tuple[Shape, ...]] = (
    (1, ()),
    (2, ()),
    (3, ()),
    (4, ()),
    (2, (2,)),
    (4, (2,)),
    (3, (1, 2)),
    (6, (2, 2)),
)
LARGE: Final[tuple[Shape, ...]] = ((4, ()), (8, ()), (12, (3,)), (14, (2, 2)))

DRAFTERS: Final[dict[str, Callable[[Loaded], torch.nn.Module]]] = {
    "layers": lambda loaded: first_layers(loaded.model, 28),
    "int8": lambda loaded: lossy_int8(loaded.model),
}

PROMPTS: Final = (
    "Explain how a refrigerator works, step by step.",
    "Write a short story about a lighthouse keeper.",
    "Translate into French: The library opens at nine and closes at six.",
)


def named(shape: Shape) -> str:
    """A shape in words."""
    drafts, widths = shape
    return f"tree of {drafts}, widths {', '.join(map(str, widths))}" if widths else f"chain of {drafts}"


def on_tables(rule: MakeRule, shape: Shape, seed: int) -> float:
    """The exact expectation of how many drafts stand, over two models of three tokens."""
    target, drafter = TableModel(3, 2 * seed), TableModel(3, 2 * seed + 1)
    drafts, widths = shape
    state, score = start((0,), drafts + 1).unwrap(), Score(target, SAMPLED)

    def step(branch: Branch) -> int:
        stream = LLMDrafter(drafter, SAMPLED, branch, widths=widths)((0,))
        return len(rule(branch)(score(Drafted(state, preorder(tuple(islice(stream, drafts)))))).path)

    return exact_law(step).mean(float)


def accepted(rule: MakeRule, scored: Scored) -> float:
    """The exact expectation of how many of these drafts stand."""
    return exact_law(lambda branch: len(rule(branch)(scored).path)).mean(float)


def on_texts(
    target: Predictor, drafter: Drafter, texts: Sequence[tuple[Tokens, int]], drafts: int, each: int
) -> Iterator[list[float]]:
    """For `each` drafts behind each prefix of the texts: how many stand under each of the rules."""
    draft, score = Draft(drafter, Fixed(drafts)), Score(target, SAMPLED)
    for text, prompt in texts:
        for end in sorted([*range(prompt, len(text))] * each):
            scored = start(text[:end], drafts + 1).unwrap().then(draft).then(score)
            yield [accepted(rule, scored) for rule in RULES.values()]


def with_error(differences: Sequence[float]) -> str:
    """A mean and its standard error."""
    return f"{fmean(differences):+.3f} ± {stdev(differences) / sqrt(len(differences)):.3f}"


def tables(pairs: int) -> str:
    """A row for each shape, in Markdown: the means over pairs of models, and in how many pairs a rule is ahead."""
    columns: list[MakeRule] = [Match, *RULES.values()]
    lines = [
        "| drafts | sample-and-match | token rejection | block | traversal | block > rejection | traversal > block |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SMALL:
        match, *rows = ([on_tables(rule, shape, seed) for seed in range(pairs)] for rule in columns)
        ahead = [sum(more - less > 1e-9 for less, more in zip(*two, strict=True)) for two in (rows[:2], rows[1:])]
        behind = [less - more for two in (rows[:2], rows[1:]) for less, more in zip(*two, strict=True)]
        assert max(behind) < 1e-12, "never fewer in the mean"
        means = " | ".join(f"{fmean(row):.4f}" for row in (match, *rows))
        lines.append(f"| {named(shape)} | {means} | {ahead[0]} of {pairs} | {ahead[1]} of {pairs} |")
    return "\n".join(lines)


def smollm2(which: str, new: int, each: int) -> Iterator[str]:
    """A row for each shape, in Markdown, as it is ready."""
    loaded = load().unwrap()
    target, dice = CachedPredictor(loaded.model), Dice(torch.Generator().manual_seed(0))
    small = CachedPredictor(DRAFTERS[which](loaded))
    texts = []
    for prompt in PROMPTS:
        state = start(loaded.chat(prompt), new, loaded.stop, limits_of(loaded.model)).unwrap()
        texts.append((run(autoregressive_step(target, SAMPLED, dice), state).state.tokens, len(state.tokens)))
    yield "| drafts | drawn | token rejection | block | traversal | block - rejection | traversal - block |"
    yield "|---|---|---|---|---|---|---|"
    for drafts, widths in LARGE:
        drafter = LLMDrafter(small, SAMPLED, dice, widths=widths)
        rows = list(on_texts(target, drafter, texts, drafts, each))
        means = " | ".join(f"{fmean(column):.3f}" for column in zip(*rows, strict=True))
        more = [with_error([row[i + 1] - row[i] for row in rows]) for i in (0, 1)]
        yield f"| {named((drafts, widths))} | {len(rows)} | {means} | {more[0]} | {more[1]} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    small = commands.add_parser("tables", help="exactly, on small models")
    small.add_argument("--pairs", type=int, default=20, help="pairs of a target and a drafter")
    small.set_defaults(lines=lambda options: [tables(options.pairs)])
    large = commands.add_parser("smollm2", help="on drafts for SmolLM2")
    large.add_argument("--drafter", choices=DRAFTERS, default="layers")
    large.add_argument("--new", type=int, default=24, help="positions of each text")
    large.add_argument("--drafts", type=int, default=4, help="drafts at each position")
    large.set_defaults(lines=lambda options: smollm2(options.drafter, options.new, options.drafts))
    options = parser.parse_args()
    for line in options.lines(options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
