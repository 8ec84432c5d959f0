"""Where a step of an accelerated model goes, beside the time that it takes just to read the weights.

    python -m benchmarks.step_profile --dtype float32

One token behind a text of 300, SmolLM2, on this machine with torch's threads. The floor is the time in which all
threads together read as many bytes as the model's weights have, from memory. Times of single operations are those of
torch's profiler, which slows down small ones; the step is timed without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

from specflow import CachedPredictor, accelerate
from specflow.models import DType, load

GROUPS: Final = {
    "linear layers": ("mkldnn", "linear", "addmm", "mm"),
    "attention": ("attention", "softmax"),
    "norms": ("layer_norm", "cat"),
    "reading the logits": ("amax", "argmax", "_local_scalar_dense"),
}
"""Which operations belong together, by parts of their names. The others are copies and elementwise."""

STEPS: Final = 40


def milliseconds(work: Callable[[], object], times: int = STEPS) -> float:
    """The median duration of some work."""
    took = []
    for _ in range(times):
        began = perf_counter()
        work()
        took.append(perf_counter() - began)
    return 1e3 * median(took)


def group_of(operation: str) -> str:
    """Where an operation belongs."""
    return next((name for name, parts in GROUPS.items() if any(part in operation for part in parts)), "the rest")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--length", type=int, default=300, help="tokens of the text before")
    options = parser.parse_args()
    dtype: DType = options.dtype
    loaded = load("smollm2", dtype).unwrap()
    given = CachedPredictor(loaded.model)
    size = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    predict, steady = (CachedPredictor(make(loaded.model)) for make in (accelerate.fast, accelerate.bit_for_bit))
    text = (*loaded.chat("Count."), *[7] * options.length)
    for model in (given, predict, steady):
        model(text[:-1], ())
        model(text, ())
    everything = torch.zeros(size // 4)  # at least as large as any cache of the processor
    print(f"SmolLM2-135M, {dtype}, {size / 1e6:.0f} MB of weights, {torch.get_num_threads()} threads")
    print(f"reading as many bytes: {milliseconds(everything.sum):.1f} ms")
    for name, model in (("given model", given), ("fast", predict), ("bit for bit", steady)):
        print(f"{name}, one token: {milliseconds(partial(model, text, ())):.1f} ms")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(STEPS):
            predict(text, ())
    groups: dict[str, float] = {}
    for event in record.key_averages():
        name = group_of(event.key)
        groups[name] = groups.get(name, 0.0) + event.self_cpu_time_total / 1e3 / STEPS
    total = sum(groups.values())
    print("| fast, one token | ms | share |")
    print("|---|---|---|")
    for name, took in sorted(groups.items(), key=lambda pair: -pair[1]):
        print(f"| {name} | {took:.2f} | {took / total:.0%} |")


if __name__ == "__main__":
    main()
