"""One seed, one text: a real model under seed coupling, through every decoder.

    python -m benchmarks.seed_invariance --seeds 50

decodes a prompt with each seed through each decoder below and compares every text with that of no drafter at all. The
drafter model is the target's own first layers. SmolLM2 in fp32, sampled at temperature 1. Prints one line a decoder,
and each pair of texts that differ; exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specflow import (
    CachedPredictor,
    DecodeState,
    Drafter,
    Fixed,
    GammaPolicy,
    LLMDrafter,
    MultinomialProcessor,
    NGramDrafter,
    NGramStorage,
    Predictor,
    Processor,
    PromptLookup,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    at_most,
    autoregressive_step,
    first_of,
    limits_of,
    run,
    seed_coupled_step,
    start,
    then,
)
from specflow.loop import once
from specflow.models import load
from specflow.stages import Adjust, Draft, Match, UpdateNgram, Verify, advance, commit
from specflow.state import Tally

LAYERS: Final = 25
PROMPT: Final = "List five fruits. Then list the same five fruits again, each with its colour."


def decoders(
    target: Predictor, small: Predictor, processor: Processor, seed: int, prompt: Tokens, vocab_size: int
) -> Mapping[str, Callable[[], Step]]:
    """Every decoder that draws from `SharedNoise(seed)`, built afresh by each call; the first has no drafter."""
    noise = SharedNoise(seed)
    model, stranger = LLMDrafter(small, processor, noise), LLMDrafter(small, processor, SharedNoise(seed + 1))
    alone = autoregressive_step(target, processor, noise)

    def through(drafter: Drafter, gamma: GammaPolicy = Fixed()) -> Step:
        return seed_coupled_step(drafter, target, processor, noise, gamma)

    def learning() -> Step:
        storage = NGramStorage(3, vocab_size)
        storage.initialize(prompt)
        draft, verify = Draft(NGramDrafter(storage)), Verify(target, processor, Match(noise))
        adjust, update = Adjust(noise), UpdateNgram(storage)
        return lambda state: state.then(draft).then(verify).then(adjust).then(commit).then(update).then(advance)

    return {
        "no drafter": lambda: alone,
        "model, gamma 1": lambda: through(model, Fixed(1)),
        "model, gamma 5": lambda: through(model),
        "model with noise of its own, gamma 3": lambda: through(stranger, Fixed(3)),
        "first token from the target, then model, gamma 8": lambda: once(alone, through(model, Fixed(8))),
        "n-gram storage": learning,
        "suffix": lambda: through(SuffixDrafter()),
        "prompt lookup": lambda: through(PromptLookup()),
        "suffix, else model": lambda: through(first_of(SuffixDrafter(shortest=2), at_most(4, model))),
        "model, then suffix": lambda: through(then(at_most(2, model), SuffixDrafter(most=2))),
    }


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model's own first layers under its own head: a drafter that costs no download."""
    config = type(model.config)(**model.config.to_dict() | {"num_hidden_layers": layers})
    small = AutoModelForCausalLM.from_config(config)
    weights = model.state_dict()
    small.load_state_dict({name: weights[name] for name in small.state_dict()})
    small.to(model.dtype)
    small.eval()
    return small


def main() -> int:
    """Compare, print, and exit."""
    parser = argparse.ArgumentParser(description="One seed, one text, through every decoder.")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()

    loaded = load().unwrap()
    state = start(loaded.chat(options.prompt), options.max_new_tokens, loaded.stop, limits_of(loaded.model)).unwrap()
    target, small = CachedPredictor(loaded.model), CachedPredictor(first_layers(loaded.model, LAYERS))
    texts: list[DecodeState] = []
    tallies: dict[str, Tally] = {}
    wrong: dict[str, int] = {}
    for seed in range(options.seeds):
        arguments = (MultinomialProcessor(1.0), seed, state.tokens, len(loaded.tokenizer))
        for name, compose in decoders(target, small, *arguments).items():
            end = run(compose(), state).state
            if len(texts) == seed:
                texts.append(end)
            tallies[name] = tallies.get(name, Tally()) + end.tally
            wrong[name] = wrong.get(name, 0) + (end.output != texts[seed].output)
            if end.output != texts[seed].output:
                print(f"seed {seed}, {name}:\n  {end.output}\n  {texts[seed].output}")
    emitted = sum(len(end.output) for end in texts)
    different = len({end.output for end in texts})
    print(
        f"{options.seeds} seeds, {different} different texts, {emitted} tokens; fp32, {torch.get_num_threads()} threads"
    )
    print("| decoder | texts that differ | drafts accepted | tokens a pass |")
    print("|---|---|---|---|")
    for name, tally in tallies.items():
        print(f"| {name} | {wrong[name]} | {tally.acceptance_rate:.0%} | {emitted / tally.steps:.2f} |")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
