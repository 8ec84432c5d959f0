"""What `specflow bench --slots` measures, beside economize; and what the second turns of chats read.

python -m benchmarks.batches --accelerate no fast --repeats 3
python -m benchmarks.batches --dtype bfloat16 --accelerate fast bit-for-bit
python -m benchmarks.batches --prompts FILE.jsonl --limit 16 --slots 8

Each decoder decodes all prompts, greedily and as far as the others; they take turns, and what is told are medians of
ratios within a turn. Texts are compared with those that are decoded one by one. `economize` is measured where it is
installed (`pip install --no-deps economize`). Also told: how many tokens the second turns of chats read, and
specflow's own time for a text and step, with a model that answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final, get_args

import torch
from rich.console import Console
from torch.nn import Module
from transformers import PreTrainedModel

from specflow import Dice, Finished, GreedyProcessor, Tokens, autoregressive_step, run, start
from specflow.accelerate import bit_for_bit, fast
from specflow.batch import Asked, BatchPredictor, Reply, Shared, together
from specflow.bench import read_prompts
from specflow.bench.batches import All, in_batches, one_by_one, show, turns
from specflow.bench.decoders import Models, decoder
from specflow.bench.measure import Plan
from specflow.bench.prompts import OWN_PROMPTS, spread
from specflow.models import SMOLLM2, DType, load

ACCELERATE: Final[Mapping[str, Callable[[Module], Module]]] = {
    "no": lambda model: model,
    "fast": fast,
    "bit-for-bit": bit_for_bit,
}


def economize(model: PreTrainedModel, plan: Plan, slots: int, *, looks_up: bool) -> All:
    """economize's ragged batches, plain or with drafts that it looks up."""
    library = import_module("economize")
    configs = [import_module("economize.techniques.lookup").LookupConfig()] if looks_up else []
    applied = library.apply(model, *configs)
    stop = sorted(plan.loaded.stop)

    def decode(repeat: int) -> list[Tokens]:
        texts: list[Tokens] = []
        prompts = [torch.tensor(plan.state(prompt).unwrap().tokens) for prompt in plan.prompts]
        for begin in range(0, len(prompts), slots):
            ends = applied.decode_batch(prompts[begin : begin + slots], plan.max_new_tokens, stop=stop)
            texts += [tuple(end.tokens.tolist()) for end in ends]
        return texts

    return decode


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

    step = autoregressive_step(Shared(read), GreedyProcessor(), Dice())
    began = perf_counter()
    ends = list(together([partial(run, step, start([1, 2, 3], 64).unwrap()) for _ in range(64)], slots))
    return 1e6 * (perf_counter() - began) / sum(end.state.tally.steps for _, end in ends if isinstance(end, Finished))


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=get_args(DType), default="float32")
    parser.add_argument("--accelerate", nargs="+", choices=ACCELERATE, default=["no", "fast"])
    parser.add_argument("--decoders", nargs="+", default=["suffix@cost", "tree@cost"], metavar="NAME")
    parser.add_argument("--prompts", type=Path, default=OWN_PROMPTS)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    loaded, slots = load(SMOLLM2, args.dtype).unwrap(), args.slots
    targets = {name: loaded.model if name == "no" else ACCELERATE[name](loaded.model) for name in args.accelerate}
    models = Models({"": loaded.model, **targets})
    prompts = spread(read_prompts(args.prompts).unwrap(), args.limit)
    plan = Plan(loaded, models, (), prompts, GreedyProcessor(), args.max_new_tokens, repeats=args.repeats)
    lengths = [len(plan.state(prompt).unwrap().tokens) for prompt in prompts]
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {slots} slots, {args.dtype}", flush=True)
    for name, model in targets.items():
        measured = [decoder(f"{name}/{label}", models).unwrap() for label in ("autoregressive", *args.decoders)]
        decoders = {"one by one": one_by_one(plan, measured[0])}
        for each in [*measured, decoder("generate", models).unwrap()]:
            decoders[each.label] = in_batches(plan, each, slots).unwrap()
        if find_spec("economize") is not None:
            decoders["economize"] = economize(loaded.model, plan, slots, looks_up=False)
            decoders["economize, lookup"] = economize(loaded.model, plan, slots, looks_up=True)
        show(plan, list(turns(decoders, plan)), (), slots, Console(width=120))
        read, fresh = second_turns(model, slots)
        print(f"second turns of chats of 1,000 tokens: {read} tokens read, {fresh} of them new", flush=True)
    print(f"\nspecflow's own time: {median(own_time(slots) for _ in range(5)):.0f} µs a text and step")


if __name__ == "__main__":
    main()
