"""Which models are of the llama family, and where they keep their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Final, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Embedding, Module, Parameter
from torch.nn import Linear as TorchLinear
from transformers import PreTrainedConfig, PreTrainedModel

from specflow.accelerate.any_model import weight_and_bias
from specflow.accelerate.linear import Linear, MakeLinear
from specflow.accelerate.llama import Layer, Rotary, Weights
from specflow.origin import weights_of as name_of
from specflow.predictors.reader import STATIC_ROTARY

Windows: TypeAlias = Callable[[PreTrainedConfig], list[int | None]]
"""A config → how many tokens each layer's queries see; None is all."""


def _no_windows(config: PreTrainedConfig) -> list[int | None]:
    return [None] * config.num_hidden_layers


def _one_window(config: PreTrainedConfig) -> list[int | None]:
    return [config.sliding_window] * config.num_hidden_layers


def _window_in_some(config: PreTrainedConfig) -> list[int | None]:
    kinds: list[str] = config.layer_types
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


MODELS: Final[Mapping[str, Windows]] = {
    "CwmForCausalLM": _window_in_some,
    "LlamaForCausalLM": _no_windows,
    "MinistralForCausalLM": _window_in_some,
    "MistralForCausalLM": _one_window,
    "Qwen2ForCausalLM": _window_in_some,
    "Qwen3ForCausalLM": _window_in_some,
    "SeedOssForCausalLM": _no_windows,
    "SmolLM3ForCausalLM": _window_in_some,
}
"""transformers' own classes whose forward pass is known to be this one, and where they have windows.

SmolLM2 is a Llama. A window that stands in the config of a model which does not look at it is none.
"""

PROJECTIONS: Final = frozenset(
    {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
)

NORMS: Final = frozenset({"input_layernorm", "post_attention_layernorm"})

QK_NORMS: Final = frozenset({"self_attn.q_norm", "self_attn.k_norm"})

SOME: Final = torch.linspace(-4, 4, 9, dtype=torch.float32, device="cpu")

ATTENTIONS: Final = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"})
"""transformers' own ways to compute softmax(q · kᵀ / √size) · v. Users register others, which may be anything."""

FOREIGN: Final = ("torch.nn.", "transformers.activations", "transformers.integrations.")
"""Where the leaves of a model of the family are defined, but for its norms."""


def strangeness(model: Module) -> str | None:
    """Why `model` cannot be read as one of the family; None if it can."""
    return next(_strange(model), None)


def _strange(model: Module) -> Iterator[str]:  # noqa: PLR0912 - one for each thing that may be odd
    kind = type(model)
    if kind.__name__ not in MODELS or not kind.__module__.startswith("transformers.models."):
        yield f"{kind.__name__} is not known to be of the llama family"
        return
    config = cast(PreTrainedModel, model).config
    # transformers takes a word for it from the config, for masks, and from each attention, where there is no mask.
    if not all(getattr(said, "is_causal", True) for said in (config, *model.modules())):
        yield "its attention is not causal"
    if config._attn_implementation not in ATTENTIONS:
        yield f"its attention ({config._attn_implementation}) is not one of transformers' own"
    if len([*model.get_submodule("model.layers").children()]) != len(MODELS[kind.__name__](config)):
        yield "its config names another number of layers than it has"
    other = next((module for module in model.modules() if not _is_of(module, kind)), None)
    if other is not None:
        yield f"it is built of other modules ({type(other).__name__})"
    if type(model.get_submodule("lm_head")) is not TorchLinear:
        yield "its head is not a plain linear layer"
    embedding = model.get_submodule("model.embed_tokens")
    if type(embedding) is not Embedding or embedding.max_norm is not None:
        yield "its embedding is not a plain table"
    if any(type(parameter) is not Parameter for parameter in model.parameters()):
        yield "its weights are not plain tensors"
    if len(_epsilons(model)) > 1:
        yield "its norms differ in their epsilon"
    for layer in model.get_submodule("model.layers").children():
        leaves = {name for name, module in layer.named_modules() if not any(module.children())}
        if leaves - QK_NORMS != PROJECTIONS | NORMS | {"mlp.act_fn"} or len(leaves & QK_NORMS) == 1:
            yield "a layer is built of other modules"
        if any(type(layer.get_submodule(name)) is not TorchLinear for name in PROJECTIONS):
            yield "a projection is not a plain linear layer"
        if not torch.allclose(layer.get_submodule("mlp.act_fn")(SOME), F.silu(SOME)):
            yield "the activation is not SiLU"
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        yield "its weights have several dtypes"
    rotary = getattr(model.get_submodule("model.rotary_emb"), "rope_type", None)
    if rotary not in STATIC_ROTARY:
        yield f"its rotary embedding ({rotary}) depends on the length of the text"


def _is_of(module: Module, kind: type) -> bool:
    """Whether this part is one of those that transformers builds this kind of model of, its forward as it came."""
    home = type(module).__module__
    return (home == kind.__module__ or home.startswith(FOREIGN)) and type(module).forward.__module__.startswith(
        (home, *FOREIGN)
    )


def _epsilons(model: Module) -> set[float]:
    """The epsilons of a model's norms."""
    found = [getattr(module, "variance_epsilon", None) for module in model.modules()]
    return {epsilon for epsilon in found if epsilon is not None}


def weights_of(model: Module, rounded: torch.dtype, computed: torch.dtype, make: MakeLinear) -> Weights:
    """The weights of a model that is not strange, rounded to one dtype, for a pass that is computed in another."""
    layers = [*model.get_submodule("model.layers").children()]
    windows = MODELS[type(model).__name__](cast(PreTrainedModel, model).config)
    embedding = model.get_parameter("model.embed_tokens.weight").detach().to(rounded, copy=True)
    rotary = cast(Rotary, deepcopy(model.get_submodule("model.rotary_emb")))
    first = torch.zeros(1, 1, dtype=torch.long, device=embedding.device)
    size = rotary(embedding.new_empty(0, dtype=computed), first)[0].shape[-1]
    heads, kv_heads = (len(layers[0].get_parameter(f"self_attn.{name}_proj.weight")) // size for name in "qk")

    def joined(*parts: tuple[Tensor, Tensor | None]) -> Linear:
        weights, biases = zip(*parts, strict=True)
        present = [bias for bias in biases if bias is not None]
        return make(torch.cat(weights).to(rounded), torch.cat(present).to(rounded) if present else None)

    def by_member(rows: Tensor) -> Tensor:  # the order of query heads that `Weights` wants
        return rows.reshape(kv_heads, heads // kv_heads, size, -1).transpose(0, 1).reshape(rows.shape)

    def norm(name: str, within: Module) -> Tensor:
        return within.get_parameter(f"{name}.weight").detach().to(rounded).to(computed)

    def layer(module: Module, window: int | None) -> Layer:
        q, k, v, out = (weight_and_bias(module.get_submodule(f"self_attn.{name}_proj")) for name in "qkvo")
        gate, up, down = (weight_and_bias(module.get_submodule(f"mlp.{name}_proj")) for name in ("gate", "up", "down"))
        q = by_member(q[0]), None if q[1] is None else by_member(q[1])
        out = by_member(out[0].T).T, out[1]
        return Layer(
            before_attention=norm("input_layernorm", module).repeat(2),
            qkv=joined(q, k, v),
            qk_norm=qk_norm(module),
            out=joined(out),
            before_mlp=norm("post_attention_layernorm", module).repeat(2),
            gate_up=joined(gate, up),
            down=joined(down),
            rotary=bool(getattr(module.get_submodule("self_attn"), "use_rope", True)),
            window=window,
        )

    def qk_norm(module: Module) -> Tensor | None:
        if "q_norm" not in dict(module.get_submodule("self_attn").named_children()):
            return None
        q, k = (norm(f"self_attn.{name}_norm", module) for name in "qk")
        return torch.cat((q.expand(heads, -1), k.expand(kv_heads, -1)))

    return Weights(
        embedding=embedding,
        layers=tuple([layer(module, window) for module, window in zip(layers, windows, strict=True)]),
        before_head=norm("model.norm", model).repeat(2),
        head=joined(weight_and_bias(model.get_submodule("lm_head"))),
        rotary=rotary,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        epsilon=_epsilons(model).pop(),
        of=name_of(model),
    )
