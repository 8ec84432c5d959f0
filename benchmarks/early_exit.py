"""Self-speculation with a model's first layers: what the layers read for it, and which models go on from a layer.

    python -m benchmarks.early_exit layers
    python -m benchmarks.early_exit architectures

`layers`: SmolLM2 in fp32, greedy, three prompts of `specflow bench`, 40 tokens each. For each new token it counts how
many tokens all layers read together, the prompt's own not among them: without drafts, with four drafts a step of the
first 10, 15 and 20 layers, which the target goes on from, and with those of the first 20, which it reads again.
`architectures`: those of `tests/architectures.py` whose target goes on from its first layer, and why others do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import logging

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Predictor,
    limits_of,
    run,
    speculative_step,
    start,
)
from specflow.bench.prompts import read_prompts
from specflow.drafters import propose_nothing
from specflow.models import load
from specflow.predictors import Resumed, early_exit, layer_skip
from tests.architectures import ARCHITECTURES

LAYERS: Final = 30
NEW: Final = 40
GREEDY: Final = GreedyProcessor()

Pair: TypeAlias = tuple[Drafter, Predictor, int]
"""A drafter, its target, and how many layers read the prompt, one that reads it twice counted twice."""


def plain(model: Module) -> Pair:
    """No drafts."""
    return propose_nothing, CachedPredictor(model), LAYERS


def gone_on_from(first: int, model: Module) -> Pair:
    """Drafts of the first layers, and a target that goes on from what those computed."""
    early = early_exit(model, first)
    return LLMDrafter(early, GREEDY, Dice()), Resumed(model, early), LAYERS


def read_again(first: int, model: Module) -> Pair:
    """The same drafts, and a target that reads them from its first layer on."""
    small = CachedPredictor(layer_skip(model, range(first, LAYERS)))
    return LLMDrafter(small, GREEDY, Dice()), CachedPredictor(model), LAYERS + first


def layers() -> None:
    """Print accepted drafts, and tokens that a layer reads for each new token."""
    loaded = load("smollm2", "float32").unwrap()
    prompts = [loaded.chat(prompt.text) for prompt in read_prompts().unwrap()[::13]]
    pairs: dict[str, Callable[[Module], Pair]] = {"no drafts": plain}
    pairs |= {f"{k} layers, gone on from": partial(gone_on_from, k) for k in (10, 15, 20)}
    pairs |= {"20 layers, read again": partial(read_again, 20)}
    counted = 0

    def count(module: Module, given: tuple[Tensor, ...]) -> None:
        nonlocal counted
        if isinstance(module, LlamaDecoderLayer):
            counted += given[0].shape[1]

    register_module_forward_pre_hook(count)
    print(f"{'':24}{'accepted':>10}{'tokens read by layers':>24}")
    for name, make in pairs.items():
        read = new = drafted = accepted = 0
        for prompt in prompts:
            drafter, target, readers = make(loaded.model)
            step = speculative_step(drafter, target, GREEDY, Dice(), Fixed(4))
            run(step, start((5, 6), 2).unwrap())  # both models are tried, on no beginning of a prompt
            counted = 0
            state = run(step, start(prompt, NEW, loaded.stop, limits_of(loaded.model)).unwrap()).state
            read += counted - len(prompt) * readers
            new += len(state.output)
            drafted, accepted = drafted + state.tally.drafted, accepted + state.tally.accepted
        print(f"{name:24}{accepted / max(1, drafted):10.1%}{read / new:24.1f}", flush=True)


def architectures() -> None:
    """Print why models cannot be gone on from after their first layer, and how many can."""
    logging.set_verbosity_error()
    able = 0
    for architecture in sorted(ARCHITECTURES, key=lambda architecture: architecture.kind):
        model = architecture.build()
        try:
            Resumed(model, early_exit(model, 1))((3, 4, 5), ())
            able += 1
        except DecodeError as error:
            print(f"{architecture.kind}: {error.happened}", flush=True)
    print(f"{able} of {len(ARCHITECTURES)} go on from their first layer")


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    what = {"layers": layers, "architectures": architectures}
    parser.add_argument("what", choices=what)
    torch.set_num_threads(1)
    what[parser.parse_args().what]()


if __name__ == "__main__":
    main()
