"""How well the replay lab predicts time: every prompt is recorded and decoded live, in turns, by each decoder.

    python -m benchmarks.replayed

SmolLM2 decodes a few prompts of our own, in fp32 on one thread. A recording is made right before each live decode, so
that what else the machine does meets both. Seconds are of processor time, in which waiting for others does not count;
`--wall` takes those of the clock on the wall. Figures are medians over the repeats, of all prompts together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final, final

import torch
from attrs import frozen

from specflow import CachedPredictor, CostMeter, Dice, GreedyProcessor, start, unfold
from specflow.bench import read_prompts
from specflow.bench.prompts import OWN_PROMPTS, spread
from specflow.catalogue import Setting, step_of
from specflow.errors import unwrap
from specflow.models import SMOLLM2, Loaded, load
from specflow.policies.meter import Clock
from specflow.predictors import limits_of
from specflow.replay import Decoder, record, replay
from specflow.replay.command import decoder_of
from specflow.state import DecodeState, Finished

PLAIN: Final = "autoregressive"
DECODERS: Final = ("suffix@10", "tree@8", "suffix@cost")
PROMPTS, NEW_TOKENS, REPEATS = 3, 48, 2


@final
@frozen
class Turn:
    """Texts by one decoder: seconds and passes, of the replay and of the live decode."""

    predicted: float = 0.0
    live: float = 0.0
    predicted_passes: int = 0
    live_passes: int = 0

    def __add__(self, more: Turn) -> Turn:
        return Turn(
            self.predicted + more.predicted,
            self.live + more.live,
            self.predicted_passes + more.predicted_passes,
            self.live_passes + more.live_passes,
        )


def decoded(
    loaded: Loaded, decoder: Decoder, state: DecodeState, vocab_size: int, clock: Clock
) -> tuple[DecodeState, float]:
    """The end of a text that is decoded live, and the seconds it took."""
    target, dice, processor = CachedPredictor(loaded.model, meter=CostMeter(clock)), Dice(), GreedyProcessor()
    drafting = decoder.make(Setting(loaded.model, vocab_size, state.tokens, processor, dice))
    policy = decoder.policy(target.meter)
    step = step_of(drafting, policy, target, processor, dice, decoder.rule, (target,))
    began = clock()
    for outcome in unfold(step, state):
        state = outcome.state if isinstance(outcome, Finished) else outcome
    return state, clock() - began


def turn(loaded: Loaded, label: str, prompt: Sequence[int], new_tokens: int, clock: Clock) -> Turn:
    """A prompt is recorded, decoded live, and replayed."""
    limits = limits_of(loaded.model)
    recording = record(CachedPredictor(loaded.model), [prompt], new_tokens, loaded.stop, limits, clock=clock)
    decoder = decoder_of(label, recording, None, None)
    begun = unwrap(start(prompt, new_tokens, loaded.stop, limits))
    state, seconds = decoded(loaded, decoder, begun, recording.vocab_size, clock)
    assert state.output == recording.texts[0].output, "a live decode says something else"
    played = replay(recording, decoder, most=None, clock=clock)
    return Turn(played.seconds, seconds, played.passes, state.tally.steps)


def repeat(
    loaded: Loaded, labels: Sequence[str], prompts: Sequence[Sequence[int]], new_tokens: int, clock: Clock
) -> Mapping[str, Turn]:
    """All prompts by all decoders, which take turns."""
    found = dict.fromkeys(labels, Turn())
    for number, prompt in enumerate(prompts):
        first = number % len(labels)
        for label in (*labels[first:], *labels[:first]):
            found[label] += turn(loaded, label, prompt, new_tokens, clock)
    return found


def show(repeats: Sequence[Mapping[str, Turn]]) -> None:
    """Print a table."""
    print(f"| decoder | predicted / live | times {PLAIN}: predicted | live | passes: predicted | live |")
    print("|---|---|---|---|---|---|")
    for label in repeats[0]:
        turns = [(found[label], found[PLAIN]) for found in repeats]
        share = median(one.predicted / one.live for one, _ in turns)
        faster = median(plain.predicted / one.predicted for one, plain in turns)
        live = median(plain.live / one.live for one, plain in turns)
        passes = median(one.predicted_passes for one, _ in turns), median(one.live_passes for one, _ in turns)
        print(f"| {label} | {share:.2f} | {faster:.2f} | {live:.2f} | {passes[0]:.0f} | {passes[1]:.0f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default=SMOLLM2, help="a name that specflow.models.load takes")
    add(
        "--decoders", nargs="+", default=DECODERS, metavar="NAME", help=f"beside {PLAIN}, as specflow replay names them"
    )
    add("--prompts", type=Path, default=OWN_PROMPTS, metavar="FILE", help="JSONL in Spec-Bench's format")
    add("--limit", type=int, default=PROMPTS, metavar="N", help="how many prompts")
    add("--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N")
    add("--repeats", type=int, default=REPEATS, metavar="N")
    add("--threads", type=int, default=1, metavar="N")
    add("--wall", action="store_true", help="the clock on the wall in place of processor time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    loaded = unwrap(load(options.model))
    prompts = [loaded.chat(prompt.text) for prompt in spread(unwrap(read_prompts(options.prompts)), options.limit)]
    labels = (PLAIN, *options.decoders)
    for label in labels:  # what comes first also loads and compiles
        turn(loaded, label, prompts[0], 8, clock)
    asked = loaded, labels, prompts, options.max_new_tokens, clock
    show([repeat(*asked) for _ in range(options.repeats)])


if __name__ == "__main__":
    main()
