"""Cost-aware gamma where drafting can only lose: on a real model, beside the loop that does not draft.

    python -m benchmarks.adversaries --count 6 > random.jsonl
    specflow bench --prompts random.jsonl \\
      --decoders autoregressive suffix@cost benchmarks.adversaries:wrong benchmarks.adversaries:dear \\
      benchmarks.adversaries:wrong_tree

The first command writes prompts of random words, in the format of Spec-Bench. `wrong` drafts tokens that are rejected,
`dear` does so after thinking for a while, and `wrong_tree` drafts trees of them. Each text meets its drafter anew:
nothing is known of it from other texts. `suffix_anew` and `tree_anew` are our own drafters that meet each text so. With
`suffix@cost` and `tree@cost`, which keep what they learnt, they tell what a first text loses, as the median of three
interleaved repeats of every prompt; the table names the worst prompt of each decoder:

    specflow bench --prompts question.jsonl --limit 60 --repeats 3 --json never.json \\
      --decoders autoregressive suffix@cost tree@cost benchmarks.adversaries:suffix_anew \\
      benchmarks.adversaries:tree_anew
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from random import Random
from time import sleep
from typing import Final

from specflow import Drafter, LookupTree, PointMass, Proposal, Step, SuffixDrafter, speculative_step
from specflow.bench import Context, read_prompts
from specflow.policies import CostAware, CostMeter

MOST: Final = 10
"""How many tokens the adversaries offer to draft in a step."""

THINKING: Final = 0.01
"""Seconds that `dear` thinks about each token: a third of a pass of SmolLM2, or all of it, as machines go."""

WORDS: Final = 200
"""How many words a prompt has."""


def always(token: int) -> Iterator[Proposal[PointMass]]:
    """The same token again and again."""
    return (Proposal(token, source="wrong") for _ in range(MOST))


def slowly(proposals: Iterator[Proposal[PointMass]]) -> Iterator[Proposal[PointMass]]:
    """The same proposals, each thought about."""
    for proposal in proposals:
        sleep(THINKING)
        yield proposal


def cost_aware(context: Context, drafter: Drafter) -> Step:
    """A step with a cost-aware gamma that has seen no text before."""
    meter = CostMeter()
    target, policy = meter.timed(context.target), CostAware(meter)
    return speculative_step(context.timed(drafter), target, context.processor, context.rng, policy, (context.target,))


def suffix_anew(context: Context) -> Step:
    """The suffix drafter, of which and of the machine nothing is known from other texts."""
    return cost_aware(context, SuffixDrafter())


def tree_anew(context: Context) -> Step:
    """The same with trees of what the text repeats."""
    return cost_aware(context, LookupTree())


def wrong(context: Context) -> Step:
    """Drafts a token that no model writes behind words: the last one of its vocabulary."""
    token = len(context.tokenizer) - 1
    return cost_aware(context, lambda tokens: always(token))


def dear(context: Context) -> Step:
    """The same, and takes its time for it."""
    token = len(context.tokenizer) - 1
    return cost_aware(context, lambda tokens: slowly(always(token)))


def wrong_tree(context: Context) -> Step:
    """Drafts trees of such tokens, and is sure of them."""
    last = len(context.tokenizer) - 1
    drafts = [
        Proposal(last - i % 2, parent=i // 2 - 1, source="wrong", chance=0.9 ** (1 + i // 2)) for i in range(MOST)
    ]
    return cost_aware(context, lambda tokens: iter(drafts))


def main() -> None:
    """Print prompts of random words, which a model answers at some length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=6, help="how many prompts")
    random = Random(0)
    words = sorted({word for prompt in read_prompts().unwrap() for word in prompt.text.split() if word.isalpha()})
    for number in range(parser.parse_args().count):
        text = "Write a long story with these words: " + " ".join(random.choices(words, k=WORDS))
        print(json.dumps({"question_id": number, "category": "random words", "turns": [text]}))


if __name__ == "__main__":
    main()
