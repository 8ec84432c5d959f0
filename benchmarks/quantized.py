"""What quantized models do: how each is fed, whether its cache conforms, and whether drafts change its text.

    pip install torchao==0.18.0 bitsandbytes==0.50.0 optimum-quanto==0.2.7
    python -m benchmarks.quantized

A tiny random llama in fp32 is quantized in each way whose library is installed. Its cache goes through the conformance
kit, and greedy texts with drafts that are partly wrong, and with suffix drafts, are compared with the plain ones.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypeAlias

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.utils import logging

from benchmarks.device.decoders import Told
from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    SuffixDrafter,
    run,
    speculative_step,
    start,
)
from specflow.drafters import propose_nothing
from specflow.state import Tokens
from specflow.testing import model_conformance

VOCABULARY, CONTEXT, NEW, TEXTS = 256, 128, 64, 6

Quantize: TypeAlias = Callable[[Path], nn.Module]
"""Loads the model that lies in a folder, quantized."""


def original() -> PreTrainedModel:
    """A llama wide enough for groups of 128 weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, initializer_range=0.1, **sizes)
    return LlamaForCausalLM(config).eval()


def plain(folder: Path, **settings: object) -> PreTrainedModel:
    """The model of a folder, as transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    return model.eval()


def torchao(name: str, **settings: object) -> Quantize:
    """A config of torchao's, through transformers."""

    def load(folder: Path) -> nn.Module:
        return plain(
            folder, quantization_config=TorchAoConfig(getattr(import_module("torchao.quantization"), name)(**settings))
        )

    return load


def one_scale(folder: Path) -> nn.Module:
    """Activations with one scale for a whole pass."""
    library = import_module("torchao.quantization")
    model = plain(folder)
    scale = library.PerTensor()
    library.quantize_(model, library.Int8DynamicActivationInt8WeightConfig(granularity=scale))
    return model


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with other linear layers, but for its head."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            above, _, last = name.rpartition(".")
            setattr(model.get_submodule(above), last, make(module))
    return model


def eight_bits(threshold: float) -> Quantize:
    """bitsandbytes' layer of 8 bits."""

    def load(folder: Path) -> nn.Module:
        layers = import_module("bitsandbytes.nn")

        def made(linear: nn.Linear) -> nn.Module:
            layer: nn.Module = layers.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=threshold
            )
            layer.load_state_dict(linear.state_dict())
            return layer.to("cpu")

        return replaced(plain(folder), made)

    return load


def four_bits(kind: str) -> Quantize:
    """bitsandbytes' 4 bits, through transformers."""
    return lambda folder: plain(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    )


def quanto_weights(folder: Path) -> nn.Module:
    """quanto's weights, through transformers."""
    return plain(folder, quantization_config=QuantoConfig(weights="int8"))


def quanto_activations(folder: Path) -> nn.Module:
    """quanto's weights and calibrated activations."""
    library = import_module("optimum.quanto")
    model = plain(folder)
    library.quantize(model, weights=library.qint8, activations=library.qint8)
    with library.Calibration(), torch.no_grad():
        model(torch.arange(CONTEXT)[None] % VOCABULARY)
    library.freeze(model)
    return model


def dynamic(folder: Path) -> nn.Module:
    """torch's own, with one scale for all rows."""
    quantized: nn.Module = import_module("torch.ao.quantization").quantize_dynamic(plain(folder), {nn.Linear})
    return quantized


WAYS: Final[dict[str, Quantize]] = {
    "none": plain,
    "torchao: int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao: intx weights": torchao("IntxWeightOnlyConfig"),
    "torchao: float8 weights": torchao("Float8WeightOnlyConfig"),
    "torchao: int8 weights, int8 activations, row by row": torchao("Int8DynamicActivationInt8WeightConfig"),
    "the same, one scale for a pass": one_scale,
    "torchao: intx weights, int8 activations": torchao("Int8DynamicActivationIntxWeightConfig"),
    "torchao: int4 weights": torchao("Int4WeightOnlyConfig"),
    "bitsandbytes: int8, no threshold": eight_bits(0.0),
    "bitsandbytes: int8, threshold 6": eight_bits(6.0),
    "bitsandbytes: nf4": four_bits("nf4"),
    "bitsandbytes: fp4": four_bits("fp4"),
    "torch's `quantize_dynamic`": dynamic,
    "quanto: int8 weights": quanto_weights,
    "quanto: int8 weights, int8 activations": quanto_activations,
}
"""What is tried."""


def texts(model: nn.Module) -> tuple[int, int]:
    """How many texts with drafts are the plain ones, and how many there are."""
    target, alike = CachedPredictor(model), 0

    def decoded(prompt: Tokens, drafter: Drafter) -> Tokens:
        step = speculative_step(drafter, target, GreedyProcessor(), Dice(), Fixed(5), prune=(target,))
        return run(step, start(prompt, NEW, (), target.limits).unwrap()).state.tokens

    for first in range(TEXTS):
        prompt = tuple([(7 * i * i + first) % 199 for i in range(8)])
        text = decoded(prompt, propose_nothing)
        told = Told(prompt, text[len(prompt) :], VOCABULARY)
        alike += sum(decoded(prompt, drafter) == text for drafter in (told, SuffixDrafter()))
    return alike, 2 * TEXTS


def row(name: str, quantize: Quantize, folder: Path) -> str:
    """A line of the table."""
    try:
        model = quantize(folder)
    except Exception as error:  # whatever a library says where it cannot: it is what the line tells
        return f"| {name} | not loaded: {str(error).splitlines()[0][:90]} | | |"
    try:
        fed = CachedPredictor(model).feeding.name
        found = model_conformance(model, steps=40)
        alike, many = texts(model)
    except DecodeError as error:
        return f"| {name} | refused: {error.happened} | | |"
    cache = "conforms" if found.holds else f"differs by {found.largest:.1g}"
    return f"| {name} | {fed} | {cache} | {alike} of {many} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="these alone")
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print("| quantized by | fed | cache | texts that are the same |")
    print("|---|---|---|---|")
    with TemporaryDirectory() as folder:
        original().save_pretrained(folder)
        for name in options.only:
            print(row(name, WAYS[name], Path(folder)), flush=True)


if __name__ == "__main__":
    main()
