"""Which models are of the llama family, and where they keep their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear as TorchLinear
from torch.nn import Module
from transformers import PreTrainedModel

from specflow.accelerate.any_model import weight_and_bias
from specflow.accelerate.linear import Linear, MakeLinear
from specflow.accelerate.llama import Layer, Rotary, Weights

MODELS: Final = frozenset(
    f"{name}ForCausalLM" for name in ("Cwm", "Llama", "Ministral", "Mistral", "Qwen2", "Qwen3", "SeedOss", "SmolLM3")
)
"""transformers' own classes whose forward pass is known to be this one. SmolLM2 is a Llama."""

PROJECTIONS: Final = frozenset(
    {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
)

NORMS: Final = frozenset({"input_layernorm", "post_attention_layernorm"})

QK_NORMS: Final = frozenset({"self_attn.q_norm", "self_attn.k_norm"})

SOME: Final = torch.linspace(-4, 4, 9)

STATIC_ROTARY: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings that turn a position alike however long the text is."""


class _RMSNorm(Protocol):
    variance_epsilon: float


def strangeness(model: Module) -> str | None:
    """Why `model` cannot be read as one of the family; None if it can."""
    return next(_strange(model), None)


def _strange(model: Module) -> Iterator[str]:
    kind = type(model)
    if kind.__name__ not in MODELS or not kind.__module__.startswith("transformers.models."):
        yield f"{kind.__name__} is not known to be of the llama family"
        return
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


def weights_of(model: Module, rounded: torch.dtype, computed: torch.dtype, make: MakeLinear) -> Weights:
    """The weights of a model that is not strange, rounded to one dtype, for a pass that is computed in another."""
    layers = [*model.get_submodule("model.layers").children()]
    embedding = model.get_parameter("model.embed_tokens.weight").detach().to(rounded)
    rotary = cast(Rotary, model.get_submodule("model.rotary_emb"))
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
        weight = within.get_parameter(f"{name}.weight").detach().to(rounded).to(computed)
        return torch.cat((weight, weight))

    def layer(module: Module, window: int | None) -> Layer:
        q, k, v, out = (weight_and_bias(module.get_submodule(f"self_attn.{name}_proj")) for name in "qkvo")
        gate, up, down = (weight_and_bias(module.get_submodule(f"mlp.{name}_proj")) for name in ("gate", "up", "down"))
        q = by_member(q[0]), None if q[1] is None else by_member(q[1])
        out = by_member(out[0].T).T, out[1]
        return Layer(
            before_attention=norm("input_layernorm", module),
            qkv=joined(q, k, v),
            qk_norm=qk_norm(module),
            out=joined(out),
            before_mlp=norm("post_attention_layernorm", module),
            gate_up=joined(gate, up),
            down=joined(down),
            rotary=bool(getattr(module.get_submodule("self_attn"), "use_rope", True)),
            window=window,
        )

    def qk_norm(module: Module) -> Tensor | None:
        if "q_norm" not in dict(module.get_submodule("self_attn").named_children()):
            return None
        q, k = (
            module.get_parameter(f"self_attn.{name}_norm.weight").detach().to(rounded).to(computed) for name in "qk"
        )
        return torch.cat((q.expand(heads, -1), k.expand(kv_heads, -1)))

    return Weights(
        embedding=embedding,
        layers=tuple([layer(module, window) for module, window in zip(layers, _windows(model), strict=True)]),
        before_head=norm("norm", model.get_submodule("model")),
        head=joined(weight_and_bias(model.get_submodule("lm_head"))),
        rotary=rotary,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        epsilon=cast(_RMSNorm, layers[0].get_submodule("input_layernorm")).variance_epsilon,
    )


def _windows(model: Module) -> list[int | None]:
    """How many tokens each layer's queries see."""
    config = cast(PreTrainedModel, model).config
    window: int | None = getattr(config, "sliding_window", None)
    count = len([*model.get_submodule("model.layers").children()])
    kinds: list[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return [window if kind == "sliding_attention" else None for kind in kinds]
