"""Block verification against token rejection on a real model: how much of the same drafts each of them accepts.

    python -m benchmarks.block_verification

SmolLM2 in fp32, sampled, with its own first layers as drafter. Along a text the drafter drafts γ tokens at each
position; on those drafts and the target's laws, the accepted tokens of both rules are exact expectations, by taking
every branch of the rule. Nothing is left to chance but the drafts, which both rules share. On a single draft either
rule may accept more; it is the mean over drafts that block verification never lowers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Final, TypeAlias

import torch

from benchmarks.seed_invariance import first_layers
from specflow import (
    CachedPredictor,
    Dice,
    Drafter,
    Fixed,
    LLMDrafter,
    MultinomialProcessor,
    Predictor,
    Processor,
    Tokens,
    autoregressive_step,
    limits_of,
    run,
    start,
)
from specflow.models import load
from specflow.randomness import Randomness
from specflow.stages import Block, Draft, Reject, Score
from specflow.state import Rule, Scored
from specflow.testing import Branch, exact_law

LAYERS: Final = 28

PROMPTS: Final = (
    "Explain how a refrigerator works, step by step.",
    "Write a short story about a lighthouse keeper.",
    "Translate into French: The library opens at nine and closes at six.",
)


MakeRule: TypeAlias = Callable[[Branch], Rule[Randomness]]
"""A rule, on randomness that takes every branch."""


def accepted(rule: MakeRule, scored: Scored) -> float:
    """The exact expectation of how many of these drafts a rule accepts."""
    return exact_law(lambda branch: len(rule(branch)(scored).path)).mean(float)


def both_rules(
    target: Predictor, drafter: Drafter, processor: Processor, text: Tokens, ends: Sequence[int], gamma: int
) -> Iterator[tuple[float, float]]:
    """For a draft behind each of these prefixes: the accepted tokens by token rejection, and by block verification."""
    draft, score = Draft(drafter, Fixed(gamma)), Score(target, processor)
    for end in ends:
        scored = start(text[:end], gamma + 1).unwrap().then(draft).then(score)
        yield accepted(Reject, scored), accepted(Block, scored)


def main() -> None:
    """Print a row for each length of the draft."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gammas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--new", type=int, default=40, help="positions of each text")
    parser.add_argument("--drafts", type=int, default=4, help="drafts at each position")
    parser.add_argument("--layers", type=int, default=LAYERS, help="how many of the model's layers draft")
    options = parser.parse_args()
    loaded = load().unwrap()
    target = CachedPredictor(loaded.model)
    dice, processor = Dice(torch.Generator().manual_seed(0)), MultinomialProcessor(1.0)
    drafter = LLMDrafter(CachedPredictor(first_layers(loaded.model, options.layers)), processor, dice)
    texts = []
    for prompt in PROMPTS:
        state = start(loaded.chat(prompt), options.new, loaded.stop, limits_of(loaded.model)).unwrap()
        texts.append((run(autoregressive_step(target, processor, dice), state).state.tokens, len(state.tokens)))
    print("| gamma | drafts | accepted by token rejection | by block | difference, ± standard error |")
    print("|---|---|---|---|---|")
    for gamma in options.gammas:
        pairs = [
            pair
            for text, prompt in texts
            for pair in both_rules(
                target, drafter, processor, text, sorted([*range(prompt, len(text))] * options.drafts), gamma
            )
        ]
        more = [block - tokens for tokens, block in pairs]
        print(
            f"| {gamma} | {len(pairs)} | {fmean(tokens for tokens, _ in pairs):.3f} | "
            f"{fmean(block for _, block in pairs):.3f} | {fmean(more):+.3f} ± {stdev(more) / sqrt(len(more)):.3f} |"
        )


if __name__ == "__main__":
    main()
