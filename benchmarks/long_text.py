"""What specflow itself costs a step over texts of up to 32k tokens, beside the model's own passes, and what it keeps.

python -m benchmarks.long_text
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Final, TypeAlias

import torch
from attrs import define
from torch.nn import Module
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from specflow import (
    CachedPredictor,
    DecodeState,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    PointMass,
    Proposal,
    Step,
    Tokens,
    autoregressive_step,
    speculative_step,
    start,
    unfold,
)
from specflow.drafters import SuffixDrafter
from specflow.protocols import Prunable

LENGTHS: Final = (1024, 4096, 16384, 32768)
TURNS: Final = 15
STEPS: Final = 3


def tiny() -> PreTrainedModel:
    """A random llama that reads 34k tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=34000,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.eval()
    return model


@define
class Watch:
    """The seconds spent in the passes of some models."""

    seconds: float = 0.0
    _since: float = 0.0

    def __call__(self, model: Module) -> None:
        """Watch this model, too."""

        def begin(module: Module, inputs: object) -> None:
            self._since = perf_counter()

        def end(module: Module, inputs: object, output: object) -> None:
            self.seconds += perf_counter() - self._since

        model.register_forward_pre_hook(begin)
        model.register_forward_hook(end)


def repeat(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """Drafts the last token for ever: nearly always wrong, so that each step rolls back."""
    while True:
        yield Proposal(tokens[-1])


def autoregressive(target: CachedPredictor, watch: Watch) -> Step:
    """One token a step."""
    return autoregressive_step(target, GreedyProcessor(), Dice())


def rejected(target: CachedPredictor, watch: Watch) -> Step:
    """Five drafts a step, rejected."""
    return speculative_step(repeat, target, GreedyProcessor(), Dice(), Fixed(5), (target,))


def suffix(target: CachedPredictor, watch: Watch) -> Step:
    """Drafts of the suffix automaton."""
    return speculative_step(SuffixDrafter(), target, GreedyProcessor(), Dice(), Fixed(5), (target,))


def llm(target: CachedPredictor, watch: Watch) -> Step:
    """Drafts of a model."""
    model = tiny()
    watch(model)
    drafter = CachedPredictor(model)
    memos: tuple[Prunable, ...] = (drafter, target)
    draft = LLMDrafter(drafter, GreedyProcessor(), Dice(), 34000)
    return speculative_step(draft, target, GreedyProcessor(), Dice(), Fixed(5), memos)


Build: TypeAlias = Callable[[CachedPredictor, Watch], Step]


def text(length: int) -> DecodeState:
    """A random text with room for 400 more tokens."""
    return start(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1)).tolist(), 400).unwrap()


def decoding(build: Build, length: int) -> Iterator[tuple[float, float]]:
    """Reads a text, then yields for each step the milliseconds of specflow's own and of the models'."""
    model, watch = tiny(), Watch()
    watch(model)
    outcomes = unfold(build(CachedPredictor(model), watch), text(length))
    next(outcomes)
    while True:
        watch.seconds, begun = 0.0, perf_counter()
        next(outcomes)
        taken = perf_counter() - begun
        yield 1e3 * (taken - watch.seconds), 1e3 * watch.seconds


def costs(build: Build) -> list[tuple[float, float]]:
    """The medians for each length. The lengths take turns, so that a busy machine is as busy for each of them.

    What a turn before has driven out of the processor's caches is read again in the first step, which does not count.
    """
    decodings = [decoding(build, length) for length in LENGTHS]
    steps: list[list[tuple[float, float]]] = [[] for _ in LENGTHS]
    for _ in range(TURNS):
        for taken, one in zip(steps, decodings, strict=True):
            taken.extend(islice(one, STEPS + 1))
            del taken[-STEPS - 1]
    return [(median([own for own, _ in taken]), median([models for _, models in taken])) for taken in steps]


def kept(build: Build, length: int) -> float:
    """KiB that Python keeps besides tensors."""
    model = tiny()
    gc.collect()
    tracemalloc.start()
    step = build(CachedPredictor(model), Watch())
    outcomes = unfold(step, text(length))
    for _ in range(TURNS):
        next(outcomes)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / 1024


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    print(f"{'':16}{'tokens':>8}{'specflow, ms':>14}{'model, ms':>12}{'kept, KiB':>12}")
    for build in (autoregressive, rejected, suffix, llm):
        for length, (own, models) in zip(LENGTHS, costs(build), strict=True):
            print(f"{build.__name__:16}{length:8}{own:14.3f}{models:12.2f}{kept(build, length):12.0f}")


if __name__ == "__main__":
    main()
