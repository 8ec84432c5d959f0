"""A model without some of its layers, over the same weights: it drafts for the whole model, and needs no other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol, runtime_checkable

import numpy
from torch import Tensor
from torch.nn import Module, ModuleList

from specflow.errors import DecodeError
from specflow.guards.checks import a, is_whole, shown
from specflow.guards.ids import ids_of
from specflow.predictors.copying import copy_sharing_weights
from specflow.predictors.features import stack_of
from specflow.predictors.reader import config_of, layers_of, refuse_weightless

NUMBERS: Final = frozenset({"layer_idx", "layer_id"})
"""Where transformers' layers keep the number by which they find their part of a cache."""


@runtime_checkable
class SkipsLayers(Protocol):
    """A model that makes copies of itself without some of its layers, as accelerated ones do."""

    def without_layers(self, skip: frozenset[int], /) -> Module:
        """The model without these layers, which are counted from 0. Weights are shared."""
        ...


def layer_skip(model: Module, skip: Iterable[int]) -> Module:
    """The model without the layers `skip`, counted from 0: self-speculation without another model.

    It shares the weights of `model` and changes nothing about it. Give it to a drafter: `LLMDrafter(CachedPredictor(
    layer_skip(model, (4, 5, 8))), …)`. Its law is another than the model's, so it is no target. Which layers can be
    missed depends on the model: try some, and look at the acceptance rate. The target reads the drafts from its first
    layer on; where the first layers draft, `early_exit` spares it those.

    `DecodeError` for numbers that are no layers', for all of them, for a model whose layers are not found, and for one
    that cannot be copied.
    Source: Zhang et al. 2309.08168 (Draft & Verify).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    >>> len(layer_skip(model, (1,)).model.layers), len(model.model.layers)
    (2, 3)
    """
    a(Module, "give a model, such as specflow.models.load gives")("model", model)
    refuse_weightless("model", model)
    remedy = "give a model of transformers, or of specflow.accelerate"
    layers = layers_of(model)
    if layers is None:
        raise DecodeError("model", "its config does not tell how many layers it has", type(model).__name__, remedy)
    skipped = _numbers(skip, layers)
    if len(skipped) == layers:
        raise DecodeError("skip", "no layer is left", f"all {layers} layers", "keep one at least")
    if isinstance(model, SkipsLayers):
        return model.without_layers(skipped)
    stack_of(model, layers, "model", remedy)
    copy = copy_sharing_weights(model)
    owner, stack = stack_of(copy, layers, "model", remedy)
    kept = ModuleList([layer for i, layer in enumerate(stack) if i not in skipped])
    for name, child in owner.named_children():
        if child is stack:
            setattr(owner, name, kept)
    for i, layer in enumerate(kept):
        for module in layer.modules():
            for name in NUMBERS & vars(module).keys():
                vars(module)[name] = i
    config = config_of(copy)
    for name, value in list(vars(config).items()):
        if name.endswith(("layer_types", "layers_block_type")) and isinstance(value, list | tuple):
            setattr(config, name, type(value)(each for i, each in enumerate(value) if i not in skipped))
    setattr(config, "num_hidden_layers", len(kept))  # noqa: B010 - whatever class a config is of
    return copy


def _numbers(skip: object, layers: int) -> frozenset[int]:
    """Numbers of some of a model's layers, in whatever holds them."""
    remedy, numbers = f"give numbers from 0 to {layers - 1}", set[int]()
    given = ids_of("skip", skip) if isinstance(skip, Tensor | numpy.ndarray) else skip
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | bytearray):
        raise DecodeError("skip", "skip does not hold numbers of layers", shown(skip), remedy)
    for number in given:
        if not is_whole(number) or not 0 <= number < layers:
            raise DecodeError("skip", f"the model has {layers} layers", shown(number), remedy)
        numbers.add(int(number))
    return frozenset(numbers)
