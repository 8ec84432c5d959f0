"""A small model drafts for a large one, which scores all drafts of a step in one pass.

python examples/draft_model.py [LARGE SMALL]

LARGE and SMALL may be two sizes of one family, as local paths, GGUF files or names on the hub. Without them SmolLM2
and a copy of it in 8 bits run: that shows how it is written, and what a copy gains on your machine.
"""

from __future__ import annotations

from argparse import ArgumentParser
from time import perf_counter

from specflow import (
    CachedPredictor,
    CostAware,
    Dice,
    GreedyProcessor,
    LLMDrafter,
    accelerate,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.models import load


def main() -> None:
    """Prints the text, how many drafts were accepted, and how long it took with drafts and without."""
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("large", nargs="?", default="smollm2", help="the target (smollm2)")
    parser.add_argument("small", nargs="?", help="the model that drafts (a copy of the target in 8 bits)")
    args = parser.parse_args()
    loaded = load(args.large).unwrap()
    small = accelerate.lossy_int8(loaded.model) if args.small is None else load(args.small).unwrap().model
    target, assistant, dice, greedy = CachedPredictor(loaded.model), CachedPredictor(small), Dice(), GreedyProcessor()
    drafter = LLMDrafter.fitting(assistant, assistant.limits, target.limits, greedy, dice)
    plain = autoregressive_step(target, greedy, dice)
    drafted = speculative_step(drafter, target, greedy, dice, CostAware(target.meter), prune=(target, assistant))
    prompt = loaded.chat("Count to ten, twice.")
    texts = set()
    for _ in ("to try the models and learn what passes cost", "to measure"):
        for name, step in (("without drafts", plain), ("with drafts", drafted)):
            began = perf_counter()
            state = run(step, start(prompt, 48, loaded.stop, target.limits).unwrap()).state
            texts.add(state.output)
            print(f"{name}: {perf_counter() - began:.1f} s, {state.mean_accepted_length:.2f} tokens a step", end=", ")
            print(f"{state.tally.accepted} of {state.tally.drafted} drafts accepted")
    print(*map(loaded.text, texts), sep="\n")
    print("the same text" if len(texts) == 1 else "another text")


if __name__ == "__main__":
    main()
