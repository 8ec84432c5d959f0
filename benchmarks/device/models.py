"""Random models in published shapes, and what is made of them: accelerated ones, and their first layers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from random import Random
from typing import Final, final

import torch
from attrs import frozen
from torch.nn import Linear, Module
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.device.decoders import GAMMA, GREEDY
from specflow import CachedPredictor, Dice, Drafter, LLMDrafter, Tokens, accelerate
from specflow.accelerate.captured import Captured
from specflow.drafters import GreedyBlockDrafter
from specflow.errors import DecodeError
from specflow.predictors import layer_skip


@final
@frozen
class Shape:
    """A published shape: the model type, and what its config holds. `tiny` is what makes it small."""

    name: str
    kind: str
    config: Mapping[str, object]
    tiny: Mapping[str, object]


_TINY: Final[Mapping[str, object]] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _shape(name: str, kind: str, sizes: tuple[int, int, int, int, int, int, int], **more: object) -> Shape:
    config = dict(zip(_TINY, sizes, strict=True)) | {"max_position_embeddings": 4096} | more
    window = {"sliding_window": 16} if "sliding_window" in more else {}
    return Shape(name, kind, config, {**_TINY, **window})


LLAMA_1B: Final = _shape("llama 1B", "llama", (128256, 2048, 8192, 16, 32, 8, 64), rope_theta=5e5)
LLAMA_8B: Final = _shape("llama 8B", "llama", (128256, 4096, 14336, 32, 32, 8, 128), rope_theta=5e5)
QWEN: Final = _shape("qwen3 0.6B", "qwen3", (151936, 1024, 3072, 28, 16, 8, 128))
GEMMA: Final = _shape("gemma 3 1B", "gemma3_text", (262144, 1152, 6912, 26, 4, 1, 256), sliding_window=512)
MAMBA: Final = Shape(
    "mamba 370M",
    "mamba",
    {"vocab_size": 50280, "hidden_size": 1024, "num_hidden_layers": 48, "state_size": 16, "initializer_range": 0.02},
    {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
)


@final
@frozen
class Setup:
    """Where models run and how much is done: texts of `new` tokens after prompts of `before`."""

    device: torch.device
    tiny: bool

    @property
    def before(self) -> int:
        """Tokens of a prompt."""
        return 12 if self.tiny else 96

    @property
    def new(self) -> int:
        """Tokens of a text."""
        return 8 if self.tiny else 64

    @property
    def repeats(self) -> int:
        """How often a text is timed."""
        return 1 if self.tiny else 3

    def model(self, shape: Shape, dtype: torch.dtype, most: int = sys.maxsize) -> PreTrainedModel:
        """A random model, with at most so many layers, and no more than a third of the free memory holds.

        What the layers after the first quarter add is scaled down, so that the first quarter is a drafter for it.
        """
        values = {**shape.config, **(shape.tiny if self.tiny else {})}
        # With tied embeddings the text of random layers is a row of one token.
        values |= {"use_cache": True, "tie_word_embeddings": False}
        layers = values["num_hidden_layers"]
        assert isinstance(layers, int)
        layers = min(layers, most)
        while True:
            config = AutoConfig.for_model(shape.kind, **values | {"num_hidden_layers": layers})
            if layers == 1 or _bytes(config, dtype) <= self._room / 3:
                break
            layers //= 2
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        assert isinstance(model, PreTrainedModel)
        model.eval().requires_grad_(requires_grad=False)
        for name, weight in model.named_parameters():
            parts = name.split(".")
            if name.endswith(("o_proj.weight", "down_proj.weight")) and int(parts[2]) >= quarter(model):
                weight.mul_(0.1)
        return model

    def sure(self, shape: Shape, dtype: torch.dtype, most: int = sys.maxsize) -> PreTrainedModel:
        """Such a model, where each token is followed by the next id, by a margin that is out of reach of rounding.

        In 16 bits two of many random logits are often one number, and texts part for nothing. A pass takes what it
        takes with any other weights; but what comes before a token hardly shows in its row, so rows prove little.
        """
        model = self.model(shape, dtype, most)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(head, Linear)
        head.weight.copy_(embeddings.weight.roll(1, 0))
        embeddings.weight.mul_(500)  # far above what the layers add, wide and many ones too
        return model

    @property
    def _room(self) -> float:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 4e9

    def prompt(self, model: Module, number: int = 0) -> Tokens:
        """A prompt of no meaning."""
        size = vocabulary_of(model)
        return tuple(Random(number).choices(range(size), k=self.before))


def _bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        model: Module = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def vocabulary_of(model: Module) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", 2))


def quarter(model: Module) -> int:
    """How many layers the first quarter of a model has."""
    return max(1, int(getattr(getattr(model, "config", None), "num_hidden_layers", 1)) // 4)


def layers_of(model: Module) -> int:
    return int(getattr(getattr(model, "config", None), "num_hidden_layers", 0))


@final
class NotCaptured(UserWarning):
    """The note that `fast` gave something else than captured passes where those are what is to be measured."""


def versions(setup: Setup, model: Module) -> Mapping[str, Module]:
    """The model as it is given and, by the name of what it is, what `accelerate.fast` makes of it, if anything.

    Where that is nothing, the note says why, and no row stands under the name of what did not run.
    """
    fast = accelerate.fast(model)
    if fast is model:
        return {"given": model}
    if isinstance(fast, Captured):
        return {"given": model, "captured": fast}
    if setup.device.type == "cuda":
        warnings.warn(NotCaptured(f"fast made a {type(fast).__name__}: its passes are not captured"), stacklevel=2)
    return {"given": model, "fast": fast}


@final
class NoFirstLayers(UserWarning):
    """The note that a model's first layers do not draft for it, and why."""


def first_layers(model: Module) -> Callable[[], Drafter] | None:
    """Makes drafters of a model's first quarter, for one text each; None, with a note, where its layers are not found.

    They share one model without the other layers, as each such model is tried anew.
    """
    kept = quarter(model)
    try:
        without = layer_skip(model, range(kept, max(kept, layers_of(model))))
    except DecodeError as error:
        note = NoFirstLayers(f"{type(model).__name__}: no row of drafts of its first layers: {error}")
        warnings.warn(note, stacklevel=2)
        return None
    on_host = next(model.parameters()).is_cpu

    def drafter() -> Drafter:
        predictor = CachedPredictor(without)
        return LLMDrafter(predictor, GREEDY, Dice()) if on_host else GreedyBlockDrafter(predictor, GAMMA)

    return drafter
