"""A small model drafts for a large one, which scores all drafts of a step in one pass.

python examples/draft_model.py

LARGE and SMALL may be two sizes of one family, as local paths, GGUF files or names on the hub. As they stand, SmolLM2
and a copy of it in 8 bits run: that shows how it is written, and what a copy gains on your machine.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final

from specflow import (
    CachedPredictor,
    CostAware,
    Dice,
    GreedyProcessor,
    LLMDrafter,
    accelerate,
    autoregressive_step,
    limits_of,
    run,
    speculative_step,
    start,
)
from specflow.models import load

LARGE: Final = "smollm2"
SMALL: Final[str | None] = None


def main() -> None:
    """Prints the text, how many drafts were accepted, and how long it took with drafts and without."""
    loaded = load(LARGE).unwrap()
    small = accelerate.lossy_int8(loaded.model) if SMALL is None else load(SMALL).unwrap().model
    target, assistant, dice, greedy = CachedPredictor(loaded.model), CachedPredictor(small), Dice(), GreedyProcessor()
    drafter = LLMDrafter.fitting(assistant, limits_of(small), limits_of(loaded.model), greedy, dice)
    plain = autoregressive_step(target, greedy, dice)
    drafted = speculative_step(drafter, target, greedy, dice, CostAware(target.meter), prune=(target, assistant))
    prompt = loaded.chat("Count to ten, twice.")
    texts = set()
    for _ in ("to try the models and learn what passes cost", "to measure"):
        for name, step in (("without drafts", plain), ("with drafts", drafted)):
            began = perf_counter()
            state = run(step, start(prompt, 48, loaded.stop, limits_of(loaded.model)).unwrap()).state
            texts.add(state.output)
            print(f"{name}: {perf_counter() - began:.1f} s, {state.mean_accepted_length:.2f} tokens a step", end=", ")
            print(f"{state.tally.accepted} of {state.tally.drafted} drafts accepted")
    print(*map(loaded.text, texts), sep="\n")
    print("the same text" if len(texts) == 1 else "another text")


if __name__ == "__main__":
    main()
