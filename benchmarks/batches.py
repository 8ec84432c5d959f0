"""Many texts at once, measured: decoded one by one, as a batch, with drafts, and by peers, all in one process.

python -m benchmarks.batches --accelerate no fast --repeats 3
python -m benchmarks.batches --dtype bfloat16 --accelerate fast bit-for-bit
python -m benchmarks.batches --prompts FILE.jsonl --limit 16 --slots 8

Each decoder decodes all prompts, greedily and to the same length; they take turns, and what is told are medians of
ratios within a turn. Texts are compared with those that are decoded one by one. `economize` is measured where it is
installed (`pip install --no-deps economize`). Also told: how many tokens the second turns of chats read, and
specflow's own time for a text and step, with a model that answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final, TypeAlias, get_args

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from specflow import (
    CachedPredictor,
    CostAware,
    CostMeter,
    Dice,
    Drafter,
    Finished,
    GreedyProcessor,
    LookupTree,
    Predictor,
    Step,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.accelerate import bit_for_bit, fast
from specflow.batch import Asked, BatchPredictor, Failed, Reply, Shared, together
from specflow.bench import read_prompts
from specflow.bench.prompts import OWN_PROMPTS, spread
from specflow.models import SMOLLM2, DType, Loaded, load

Decode: TypeAlias = Callable[[Sequence[Tokens]], list[Tokens]]
"""New tokens after each prompt."""

ACCELERATE: Final[Mapping[str, Callable[[Module], Module]]] = {
    "no": lambda model: model,
    "fast": fast,
    "bit-for-bit": bit_for_bit,
}


def plain(target: Predictor) -> Step:
    """One token a step."""
    return autoregressive_step(target, GreedyProcessor(), Dice())


def one_by_one(model: Module, new: int) -> Decode:
    """Each prompt alone."""
    predictor = CachedPredictor(model)
    return lambda prompts: [run(plain(predictor), start(prompt, new).unwrap()).state.output for prompt in prompts]


def batched(model: Module, new: int, slots: int, drafter: Callable[[], Drafter] | None = None) -> Decode:
    """`slots` prompts at a time, with drafts that are paced by what they cost in a full batch."""

    def decode(prompts: Sequence[Tokens]) -> list[Tokens]:
        meter = CostMeter()
        target = BatchPredictor(model, slots, meter=meter)

        def one(prompt: Tokens) -> Finished:
            step = plain(target)
            if drafter is not None:
                step = speculative_step(drafter(), target, GreedyProcessor(), Dice(), CostAware(meter, 10))
            return run(step, start(prompt, new).unwrap())

        return in_order(together([partial(one, prompt) for prompt in prompts], slots), len(prompts))

    return decode


def in_order(ends: Iterable[tuple[int, Finished | Failed]], count: int) -> list[Tokens]:
    """The texts of a batch by their numbers."""
    texts: dict[int, Tokens] = {}
    for number, end in ends:
        if isinstance(end, Failed):
            raise end.error
        texts[number] = end.state.output
    return [texts[number] for number in range(count)]


def generate(model: PreTrainedModel, new: int, slots: int) -> Decode:
    """transformers, over batches that are padded on the left."""

    def decode(prompts: Sequence[Tokens]) -> list[Tokens]:
        texts: list[Tokens] = []
        for begin in range(0, len(prompts), slots):
            some = prompts[begin : begin + slots]
            longest = max(map(len, some))
            ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in some])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some])
            ends = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
            )
            texts += [tuple(end[longest:].tolist()) for end in ends]
        return texts

    return decode


def economize(model: PreTrainedModel, new: int, slots: int, *, looks_up: bool) -> Decode:
    """economize's ragged batches, plain or with drafts that it looks up."""
    library = import_module("economize")
    configs = [import_module("economize.techniques.lookup").LookupConfig()] if looks_up else []
    applied = library.apply(model, *configs)

    def decode(prompts: Sequence[Tokens]) -> list[Tokens]:
        texts: list[Tokens] = []
        for begin in range(0, len(prompts), slots):
            some = [torch.tensor(prompt) for prompt in prompts[begin : begin + slots]]
            texts += [tuple(end.tokens.tolist()) for end in applied.decode_batch(some, new)]
        return texts

    return decode


def measured(decoders: Mapping[str, Decode], prompts: Sequence[Tokens], repeats: int) -> None:
    """Print each decoder's tokens per second, and what it is of the others, turn by turn."""
    expected = next(iter(decoders.values()))(prompts)
    same = {name: sum(map(tuple.__eq__, decode(prompts), expected)) for name, decode in decoders.items()}
    turns: list[dict[str, float]] = []
    for _ in range(repeats):
        turn = {}
        for name, decode in decoders.items():
            began = perf_counter()
            decode(prompts)
            turn[name] = perf_counter() - began
        turns.append(turn)
    tokens, (first, second, *_) = sum(map(len, expected)), decoders
    print(f"{'':32} tokens/s   / {first:12} / {second:12} same texts")
    for name in decoders:
        alone, plainly = (median(turn[base] / turn[name] for turn in turns) for base in (first, second))
        speed = tokens / median(turn[name] for turn in turns)
        print(f"{name:32} {speed:8.1f} {alone:14.2f} {plainly:14.2f} {same[name]:8}/{len(prompts)}", flush=True)


def second_turns(model: Module, slots: int) -> tuple[int, int]:
    """How many tokens the second turns of chats of about 1,000 tokens read, and how many of those are new."""
    target, read = BatchPredictor(model, slots), list[int]()
    handle = model.register_forward_pre_hook(
        lambda module, given, named: read.append(read_by(given, named)), with_kwargs=True
    )
    chats = [tuple((7 * i + 13 * k) % 40000 + 3 for i in range(1000)) for k in range(3)]
    list(together([partial(target, chat, ()) for chat in chats], slots))
    read.clear()
    list(together([partial(target, (*chat, 5, 6, 7, 8, 9), ()) for chat in chats], slots))
    handle.remove()
    return sum(read), 5 * len(chats)


def read_by(given: tuple[object, ...], named: Mapping[str, object]) -> int:
    """How many tokens a pass reads, padding among them."""
    texts = named.get("texts") or ()
    assert isinstance(texts, Sequence)
    return (
        sum(len(text.ids) for text in texts)
        if texts
        else sum(ids.numel() for ids in given if isinstance(ids, torch.Tensor))
    )


def own_time(slots: int) -> float:
    """Microseconds that specflow takes for a text and step, with a model that answers at once."""
    rows = torch.randn(1, 49152)

    def read(asked: Sequence[Asked]) -> list[Reply]:
        return [rows for _ in asked]

    step = plain(Shared(read))
    began = perf_counter()
    ends = list(together([partial(run, step, start([1, 2, 3], 64).unwrap()) for _ in range(64)], slots))
    return 1e6 * (perf_counter() - began) / sum(end.state.tally.steps for _, end in ends if isinstance(end, Finished))


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=get_args(DType), default="float32")
    parser.add_argument("--accelerate", nargs="+", choices=ACCELERATE, default=["no", "fast"])
    parser.add_argument("--prompts", type=Path, default=OWN_PROMPTS)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    loaded = load(SMOLLM2, args.dtype).unwrap()
    prompts = prompts_of(loaded, args.prompts, args.limit)
    new, slots = args.max_new_tokens, args.slots
    lengths = [*map(len, prompts)]
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {slots} slots, {args.dtype}")
    for name in args.accelerate:
        model = ACCELERATE[name](loaded.model)
        decoders = {
            "one by one": one_by_one(model, new),
            "batched": batched(model, new, slots),
            "batched, suffix": batched(model, new, slots, SuffixDrafter),
            "batched, tree": batched(model, new, slots, LookupTree),
            "generate, padded on the left": generate(loaded.model, new, slots),
        }
        if find_spec("economize") is not None:
            decoders["economize"] = economize(loaded.model, new, slots, looks_up=False)
            decoders["economize, lookup"] = economize(loaded.model, new, slots, looks_up=True)
        print(f"\naccelerate: {name}")
        measured(decoders, prompts, args.repeats)
        read, fresh = second_turns(model, slots)
        print(f"second turns of chats of 1,000 tokens: {read} tokens read, {fresh} of them new")
    print(f"\nspecflow's own time: {median(own_time(slots) for _ in range(5)):.0f} µs a text and step")


def prompts_of(loaded: Loaded, path: Path, limit: int) -> list[Tokens]:
    """The ids of the prompts, which are questions of a chat."""
    return [loaded.chat(prompt.text) for prompt in spread(read_prompts(path).unwrap(), limit)]


if __name__ == "__main__":
    main()
