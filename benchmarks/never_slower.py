"""How much slower a cost-aware policy makes any one text, replayed: time is counted, so that no other work is in it.

    specflow record --prompts question.jsonl --limit 60 --max-new-tokens 48 --out texts.safetensors
    python -m benchmarks.never_slower texts.safetensors

Each text is given the medians of what passes took in all of them, as the machine wavers from text to text, and is
decoded by drafters under `CostAware`: kept from text to text, or new to each. Speed is against plain decoding, prompt
reading included. With `--costs` passes take what they took in another recording, such as that of a few texts on
another processor; prompts take what they took in their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from attrs import evolve

from specflow.catalogue import DRAFTERS, POLICIES
from specflow.drafters import propose_nothing
from specflow.policies import Fixed
from specflow.replay import Decoder, Recording, replay

NAMES: Final = ("suffix", "tree")
GOAL: Final = 0.97


def evened(recording: Recording, told: Recording) -> Recording:
    """The same texts, each with the median of the costs of all texts of `told`, but for its prompt's: a pass over one
    token takes the median of those, and one over several the median of what it took in passes over one."""
    every = [text.costs for text in told.texts]
    lengths = max([costs.lengths for costs in every], key=len)  # a text with little room tells of fewer
    single, own = median(costs.of(1) for costs in every), median(costs.own for costs in every)
    took = tuple([single * median(costs.of(k) / costs.of(1) for costs in every) for k in lengths])
    texts = [evolve(text, costs=evolve(text.costs, lengths=lengths, seconds=took, own=own)) for text in recording.texts]
    return evolve(recording, texts=tuple(texts))


def paced(name: str) -> Decoder:
    """A drafter of the catalogue under `CostAware`; both are new."""
    return Decoder(DRAFTERS[name].make(), lambda meter: POLICIES["cost"](16, 1.0, meter))


def seconds(recording: Recording, decoder: Decoder) -> list[float]:
    """What each text takes, by one decoder for all of them."""
    return [text.seconds for text in replay(recording, decoder, most=None).texts]


def row(label: str, plain: Sequence[float], took: Sequence[float]) -> str:
    """A line of the table."""
    ratios = [before / after for before, after in zip(plain, took, strict=True)]
    good = sum(ratio >= GOAL for ratio in ratios)
    return f"| {label} | {median(ratios):.2f} | {min(ratios):.3f} | {good} of {len(ratios)} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recording", type=Path, help="what `specflow record` kept")
    parser.add_argument("--costs", type=Path, help="another recording, which tells what passes take")
    options = parser.parse_args()
    given = Recording.load(options.recording)
    recording = evened(given, given if options.costs is None else Recording.load(options.costs))
    plain = seconds(recording, Decoder.of(propose_nothing, Fixed(1)))
    alone = [evolve(recording, texts=(text,)) for text in recording.texts]
    print(f"| CostAware, replayed | median | worst | at {GOAL} or above |")
    print("|---|---|---|---|")
    for name in NAMES:
        print(row(f"{name}, kept from text to text", plain, seconds(recording, paced(name))), flush=True)
        anew = [one for text in alone for one in seconds(text, paced(name))]
        print(row(f"{name}, each text anew", plain, anew), flush=True)


if __name__ == "__main__":
    main()
