"""How much faster accelerated models decode: `python -m benchmarks.accelerate --help`.

Every contender decodes every prompt, one after the other in one process, and is compared with `generate` of the given
model on that prompt. On a machine that others use too, only such ratios mean something. The first contender after
`generate` is plain greedy decoding over `accelerate.fast`; its text is what the others' texts are compared with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final, TypeAlias

import torch
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel

from specflow import (
    CachedPredictor,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Step,
    SuffixDrafter,
    Tokens,
    accelerate,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.bench.peers import configured
from specflow.models import DType, Loaded, load
from specflow.state import Tally

PROMPTS: Final = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain how a refrigerator works, step by step.",
    "Translate into French: The library opens at nine and closes at six, but on Sundays it stays closed.",
    "Summarize: The committee met on Monday to discuss the budget. After two hours it agreed on the first draft, and "
    "the chair thanked all members. The next meeting is on Friday, when the second draft will be discussed.",
)

Decode: TypeAlias = Callable[[Tokens, int], tuple[Tokens, Tally]]
"""(prompt, n) → n new tokens, and what was drafted for them."""


def generating(model: PreTrainedModel, **more: object) -> Decode:
    """transformers' own greedy decoding, not stopping at eos; it is told what `more` says."""

    def decode(prompt: Tokens, n: int) -> tuple[Tokens, Tally]:
        ids = torch.tensor([prompt], device=model.device)
        mask = torch.ones_like(ids)  # else `generate` guesses one, and hides what it takes for padding
        with configured(model, GenerationConfig(max_new_tokens=n)):
            ids = model.generate(ids, attention_mask=mask, **more)
        return tuple(ids[0, len(prompt) :].tolist()), Tally()

    return decode


def stepping(make_step: Callable[[], Step]) -> Decode:
    """A decode by a new step: nothing is remembered from prompt to prompt."""

    def decode(prompt: Tokens, n: int) -> tuple[Tokens, Tally]:
        state = run(make_step(), start(prompt, n).unwrap()).state
        return state.output, state.tally

    return decode


def plain(model: Module) -> Decode:
    """One token at a time."""
    return stepping(lambda: autoregressive_step(CachedPredictor(model), GreedyProcessor(), Dice()))


def suffix(model: Module) -> Decode:
    """Drafts from the text itself."""
    return stepping(
        lambda: speculative_step(SuffixDrafter(), CachedPredictor(model), GreedyProcessor(), Dice(), Fixed(10))
    )


def drafted(model: Module, drafter: Module, gamma: int) -> Decode:
    """Drafts from another model."""
    greedy = GreedyProcessor()

    def step() -> Step:
        draft = LLMDrafter(CachedPredictor(drafter), greedy, Dice())
        return speculative_step(draft, CachedPredictor(model), greedy, Dice(), Fixed(gamma))

    return stepping(step)


def contenders(loaded: Loaded, gammas: list[int]) -> Mapping[str, Decode]:
    """Who decodes. Drafting with a lossy copy is worth a try for a model in fp32 only."""
    model = loaded.model
    fast, steady = accelerate.fast(model), accelerate.bit_for_bit(model)
    decoders = {
        "generate": generating(loaded.model),
        "fast": plain(fast),
        "bit for bit": plain(steady),
        "fast + suffix": suffix(fast),
        "bit for bit + suffix": suffix(steady),
    }
    if gammas:
        bf16, int8, int4 = accelerate.lossy_bf16(model), accelerate.lossy_int8(model), accelerate.lossy_int4(model)
        for gamma in gammas:
            decoders[f"fast + its bf16 copy, gamma {gamma}"] = drafted(fast, bf16, gamma)
            decoders[f"fast + its int8 copy, gamma {gamma}"] = drafted(fast, int8, gamma)
            decoders[f"fast + its int4 copy, gamma {gamma}"] = drafted(fast, int4, gamma)
    return decoders


def prompts_of(path: Path | None, count: int, loaded: Loaded, longest: int) -> list[Tokens]:
    """The first turns of a file in the format of Spec-Bench, evenly spread over it, or ours."""
    if path is None:
        texts = list(PROMPTS[:count])
    else:
        lines = path.read_text().splitlines()
        texts = [json.loads(line)["turns"][0] for line in lines[:: max(1, len(lines) // count)][:count]]
    return [loaded.chat(text)[-longest:] for text in texts]


def measure(decoders: Mapping[str, Decode], prompts: list[Tokens], n: int, repeat: int) -> None:
    """Print a row for each contender."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    tallies = dict.fromkeys(decoders, Tally())
    equal = dict.fromkeys(decoders, 0)
    for prompt in prompts:
        texts: dict[str, Tokens] = {}
        times: dict[str, list[float]] = {name: [] for name in decoders}
        for round_ in range(repeat + 1):
            for name, decode in decoders.items():
                began = perf_counter()
                texts[name], tally = decode(prompt, n if round_ else 4)  # the first round warms up
                if round_:
                    times[name].append(perf_counter() - began)
                    tallies[name] += tally
        for name in decoders:
            seconds[name].append(median(times[name]))
            equal[name] += texts[name] == texts["fast"]
    print(f"{'':32} tok/s  / generate (worst)  / fast (worst)  = fast  per pass  accepted")
    for name in decoders:
        ours = seconds[name]
        speed = n / median(ours)
        ratios = [base / mine for base, mine in zip(seconds["generate"], ours, strict=True)]
        against = [base / mine for base, mine in zip(seconds["fast"], ours, strict=True)]
        steps = tallies[name].steps
        per_pass = f"{n * len(prompts) * repeat / steps:.2f}" if steps else ""
        print(
            f"{name:32} {speed:5.1f} {median(ratios):9.2f} ({min(ratios):.2f}) {median(against):9.2f} "
            f"({min(against):.2f}) {equal[name]:3}/{len(prompts)} {per_pass:>8} {tallies[name].acceptance_rate:9.2f}"
        )


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=Path, help="a file in the format of Spec-Bench; a few of ours by default")
    parser.add_argument("--count", type=int, default=4, help="how many prompts")
    parser.add_argument("--new", type=int, default=128, help="new tokens for each prompt")
    parser.add_argument("--longest", type=int, default=1024, help="cut prompts to this many tokens")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--gammas", type=int, nargs="*", default=[], help="draft with lossy copies, this many tokens")
    options = parser.parse_args()
    dtype: DType = options.dtype
    loaded = load("smollm2", dtype).unwrap()
    prompts = prompts_of(options.prompts, options.count, loaded, options.longest)
    print(
        f"SmolLM2-135M, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, {len(prompts)} prompts"
    )
    measure(contenders(loaded, options.gammas), prompts, options.new, options.repeat)


if __name__ == "__main__":
    main()
