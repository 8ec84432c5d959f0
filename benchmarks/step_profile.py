"""Where a step of an accelerated model goes, beside the time that it takes just to read the weights.

    python -m benchmarks.step_profile --dtype float32
    python -m benchmarks.step_profile --dtype bfloat16 --beside bf16.gguf

One token behind a text of 300, SmolLM2, on this machine with torch's threads. The floor is the time in which all
threads together read as many bytes as the model's weights have, from memory. Times of single operations are those of
torch's profiler, which slows down small ones; the step is timed without it, in turns with the others. `--beside` is a
GGUF file in the same precision, as `benchmarks.dequantized` writes it, which llama.cpp reads with as many threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

from specflow import CachedPredictor, accelerate
from specflow.interop.llama_cpp import LlamaCpp
from specflow.models import DType, load
from specflow.state import Predictor

GROUPS: Final = {
    "linear layers": ("mkldnn", "linear", "addmm", "mm"),
    "attention": ("attention", "softmax"),
    "norms": ("layer_norm", "cat"),
    "reading the logits": ("amax", "argmax", "_local_scalar_dense"),
}
"""Which operations belong together, by parts of their names. The others are copies and elementwise."""

STEPS: Final = 40


def milliseconds(works: Mapping[str, Callable[[], object]], times: int = STEPS) -> dict[str, float]:
    """The median duration of each of some works, done in turns."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times):
        for name, work in works.items():
            began = perf_counter()
            work()
            took[name].append(perf_counter() - began)
    return {name: 1e3 * median(seconds) for name, seconds in took.items()}


def group_of(operation: str) -> str:
    """Where an operation belongs."""
    return next((name for name, parts in GROUPS.items() if any(part in operation for part in parts)), "the rest")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--length", type=int, default=300, help="tokens of the text before")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="a GGUF file for llama.cpp")
    options = parser.parse_args()
    dtype: DType = options.dtype
    loaded = load("smollm2", dtype).unwrap()
    size = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    predict = CachedPredictor(accelerate.fast(loaded.model))
    models: dict[str, Predictor] = {"given model": CachedPredictor(loaded.model), "fast": predict}
    models["bit for bit"] = CachedPredictor(accelerate.bit_for_bit(loaded.model))
    if options.beside is not None:
        models["llama.cpp"] = LlamaCpp(options.beside, context=2 * options.length + 64)
    text = (*loaded.chat("Count."), *[7] * options.length)
    for model in models.values():
        model(text[:-1], ())
        model(text, ())
    everything = torch.zeros(size // 4)  # at least as large as any cache of the processor
    print(f"SmolLM2-135M, {dtype}, {size / 1e6:.0f} MB of weights, {torch.get_num_threads()} threads")
    works = {f"{name}, one token": partial(model, text, ()) for name, model in models.items()}
    for name, took in milliseconds({"reading as many bytes": everything.sum, **works}).items():
        print(f"{name}: {took:.1f} ms")
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
