"""What near-ties do to greedy speculation in half precision, and what re-scoring them gives and costs.

    python -m benchmarks.margins --dtype bfloat16 --count 8

decodes prompts with SmolLM2 autoregressively and through suffix drafts, re-scoring near-ties or not, and counts texts
that differ from the autoregressive one, the tokens that an audit finds not to be greedy, and passes over the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, final

import torch
from attrs import define
from torch import Tensor

from specflow import (
    CachedPredictor,
    Dice,
    Fixed,
    GreedyProcessor,
    Predictor,
    Proposal,
    Step,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    limits_of,
    run,
    speculative_step,
    start,
)
from specflow.bench import read_prompts
from specflow.bench.prompts import OWN_PROMPTS, spread
from specflow.margins import Margins, audit
from specflow.models import DType, Loaded, load
from specflow.predictors import OneByOne, RescoreNearTies

BELOW: Final = (0.26, 0.51)
"""Margins below which near-ties are re-scored: bf16 logits between 16 and 32 are 0.125 apart."""


@final
@define(eq=False)
class Counted:
    """A predictor whose passes are counted."""

    predictor: Predictor
    passes: int = 0

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """The predictor's own answer."""
        self.passes += 1
        return self.predictor(tokens, drafts)


@final
@define
class Count:
    """What was seen of one decoder over all prompts."""

    texts_that_differ: int = 0
    not_greedy: int = 0
    steps: int = 0
    passes: int = 0


Build = Callable[[Loaded, Counted, Counted, int], Predictor]
"""(the model, its counted predictor, another one, tokens of the prompt) → the target that drafts are verified by."""


def as_it_is(loaded: Loaded, target: Counted, other: Counted, prompt: int) -> Predictor:
    """No near-tie is re-scored."""
    return target


def by_the_target(below: float) -> Build:
    """Near-ties are re-scored over the cache that all passes write."""
    return lambda loaded, target, other, prompt: RescoreNearTies(target, target, below)


def one_by_one(below: float) -> Build:
    """Near-ties are re-scored as autoregressive decoding would score them."""
    return lambda loaded, target, other, prompt: RescoreNearTies(target, OneByOne(other, prompt), below)


DECODERS: Final[Mapping[str, Build]] = {
    "as it is": as_it_is,
    **{f"below {below}: the target itself": by_the_target(below) for below in BELOW},
    **{f"below {below}: one by one": one_by_one(below) for below in BELOW},
}


def decode(loaded: Loaded, prompt: Tokens, new: int, step: Step) -> tuple[Tokens, int]:
    """The text, prompt included, and the steps."""
    state = run(step, start(prompt, new, loaded.stop, limits_of(loaded.model)).unwrap()).state
    return state.tokens, state.tally.steps


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--prompts", type=Path, default=OWN_PROMPTS, help="JSONL in Spec-Bench's format")
    parser.add_argument("--count", type=int, default=8, help="how many prompts, spread over the categories")
    parser.add_argument("--new", type=int, default=64, help="new tokens for each prompt")
    parser.add_argument("--longest", type=int, default=256, help="keep so many of a prompt's last tokens")
    options = parser.parse_args()
    dtype: DType = options.dtype
    loaded = load("smollm2", dtype).unwrap()
    prompts = spread(read_prompts(options.prompts).unwrap(), options.count)
    counts = {name: Count() for name in DECODERS}
    recorder, tokens = Margins(), 0
    for prompt in prompts:
        ids = loaded.chat(prompt.text)[-options.longest :]
        alone = autoregressive_step(CachedPredictor(loaded.model), GreedyProcessor(), Dice(), observe=recorder)
        expected, steps = decode(loaded, ids, options.new, alone)
        tokens += steps
        for name, build in DECODERS.items():
            target, other = Counted(CachedPredictor(loaded.model)), Counted(CachedPredictor(loaded.model))
            predict = build(loaded, target, other, len(ids))
            step = speculative_step(SuffixDrafter(), predict, GreedyProcessor(), Dice(), Fixed(10))
            text, steps = decode(loaded, ids, options.new, step)
            count = counts[name]
            count.texts_that_differ += text != expected
            count.not_greedy += len(audit(text, loaded.model, len(ids)).differences)
            count.steps += steps
            count.passes += target.passes + other.passes
    ties = [sum(margin < below for margin in recorder.recorded) for below in (1e-9, *BELOW)]
    print(f"SmolLM2-135M, {dtype}, {len(prompts)} prompts, {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"margin 0: {ties[0]} tokens; below {BELOW[0]}: {ties[1]}; below {BELOW[1]}: {ties[2]}")
    print("| suffix drafts | texts that differ | tokens that are not greedy | steps | passes | passes a token |")
    print("|---|---|---|---|---|---|")
    for name, count in counts.items():
        print(
            f"| {name} | {count.texts_that_differ} of {len(prompts)} | {count.not_greedy} | {count.steps} | "
            f"{count.passes} | {count.passes / tokens:.2f} |"
        )


if __name__ == "__main__":
    main()
