"""Random heads in the layouts they are published in, and slow references of what they say, written from the papers.

A reference reads the whole text again after each draft of a path: no cache and no tree, and nothing of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache, partial
from math import sqrt
from pathlib import Path
from typing import Final, TypeAlias, cast, final

import torch
from attrs import field, frozen
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Embedding, Linear, Module
from transformers import PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from specflow import Tokens
from specflow.heads import MTP, Eagle, Eagle3, Head, HeadPredictor, Jump, Medusa, Shape, Vocabulary
from specflow.predictors import limits_of
from specflow.protocols import Limits

Weights: TypeAlias = dict[str, Tensor]

Shapes: TypeAlias = dict[str, tuple[int, ...]]

Says: TypeAlias = Callable[[Tokens, Tokens], Tensor]
"""(a text, the drafts of a path) → the logits [V] of what a head says after them, -∞ for what it never drafts."""

NOTHING: Final[Mapping[str, object]] = {}
THETA: Final = 1000.0
EPSILON: Final = 1e-5
HEADS, KV_HEADS, SIZE, INNER = 4, 2, 6, 20


def _copied(model: Module) -> Module:
    return deepcopy(model)


@final
@frozen(eq=False)
class FreshFeatures:
    """What the layers of a transformers model hold, read afresh each time: the reference of all that is faster.

    A copy of it is read: on one that tells its hidden states transformers leaves hooks.
    """

    model: Module = field(converter=_copied)
    layers: tuple[int, ...]

    @property
    def limits(self) -> Limits:
        """Those of the model."""
        return limits_of(self.model)

    def features(self, tokens: Tokens, last: int, /) -> Tensor:
        """[last, layers · H]."""
        with torch.no_grad():
            states = self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.cat([states[layer][0, -last:] for layer in self.layers], dim=-1)


@final
@frozen(eq=False)
class Published:
    """A checkpoint in a folder, its tensors, and what its head says."""

    folder: Path
    weights: Weights
    says: Says


def random_weights(seed: int, shapes: Shapes) -> Weights:
    """Tensors of these shapes, in which norms and biases do something, too."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
        weights[name] = 1 + 0.3 * noise if "norm" in name else 0.4 * noise
    return weights


def layer_shapes(prefix: str, hidden: int, read: int, *, biases: bool = False) -> Shapes:
    """What a layer of the llama family holds, without the norms before its attention."""
    shapes: Shapes = {
        f"{prefix}.self_attn.q_proj.weight": (HEADS * SIZE, read),
        f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * SIZE, read),
        f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * SIZE, read),
        f"{prefix}.self_attn.o_proj.weight": (hidden, HEADS * SIZE),
        f"{prefix}.mlp.gate_proj.weight": (INNER, hidden),
        f"{prefix}.mlp.up_proj.weight": (INNER, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, INNER),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }
    if biases:
        widths = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        shapes |= {f"{prefix}.self_attn.{name}_proj.bias": (heads * SIZE,) for name, heads in widths.items()}
    return shapes


def layer_config(hidden: int) -> dict[str, object]:
    """What a config says of such a layer."""
    return {
        "hidden_size": hidden,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": SIZE,
        "num_hidden_layers": 1,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "hidden_act": "silu",
    }


def write(folder: Path, config: Mapping[str, object], weights: Weights, *, pickled: str | None = None) -> Path:
    """A checkpoint as it is published, in safetensors or `pickled` under that name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled is not None:
        torch.save(weights, folder / pickled)
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


# What the papers say.


def rms(x: Tensor, weight: Tensor, epsilon: float = EPSILON) -> Tensor:
    """RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def at_positions(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, … of x [T, heads, size]: each pair of numbers (i, i + size / 2) turned as one complex."""
    half = x.shape[-1] // 2
    speeds = 1 / THETA ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
    angles = torch.arange(len(x))[:, None].float() * speeds  # as everybody has them: in fp32
    turns = torch.complex(angles.cos().double(), angles.sin().double())
    turned = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turns[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def attended(weights: Weights, prefix: str, read: Tensor) -> Tensor:
    """Causal attention of `read` [T, R], head by head and place by place."""

    def projected(name: str) -> Tensor:
        out = read @ weights[f"{prefix}.{name}_proj.weight"].T
        bias = weights.get(f"{prefix}.{name}_proj.bias")
        return (out if bias is None else out + bias).reshape(len(read), -1, SIZE)

    q, k, v = at_positions(projected("q")), at_positions(projected("k")), projected("v")
    rows = []
    for place in range(len(read)):
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = k[: place + 1, shared] @ q[place, head] / sqrt(SIZE)
            heads.append(scores.softmax(0) @ v[: place + 1, shared])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ weights[f"{prefix}.o_proj.weight"].T


def layer(weights: Weights, prefix: str, read: Tensor, residual: Tensor) -> Tensor:
    """A layer of the llama family whose attention reads something else than the residual."""
    stream = residual + attended(weights, f"{prefix}.self_attn", read)
    x = rms(stream, weights[f"{prefix}.post_attention_layernorm.weight"])
    gate, up = (x @ weights[f"{prefix}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return stream + (gate * gate.sigmoid() * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T


def after_path(states: Tensor, tokens: Tokens, path: Tokens, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The last state [H] after a text, of whose tokens but the last the target made `states`, and after a path.

    `read(states [T, H], ids [T])` gives the states of all T places. Its last one is the state that the next draft
    goes on from.
    """
    ids = list(tokens[1:])
    last = read(states, torch.tensor(ids))[-1]
    for draft in path:
        states, ids = torch.cat((states, last[None])), [*ids, draft]
        last = read(states, torch.tensor(ids))[-1]
    return last


def spread(logits: Tensor, vocab_size: int, ids: Tensor) -> Tensor:
    """Logits of some tokens over all of them."""
    out = torch.full((vocab_size,), -torch.inf, dtype=logits.dtype)
    for draft, token in enumerate(ids.tolist()):
        out[token] = logits[draft]
    return out


# The layouts.


def frequent(size: int, vocab_size: int, seed: int = 5) -> tuple[Tensor, Weights]:
    """Which tokens are drafted, [size], and the maps d2t and t2d that say so."""
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:size].sort().values
    marks = torch.zeros(vocab_size, dtype=torch.bool)
    marks[ids] = True
    return ids, {"d2t": ids - torch.arange(size), "t2d": marks}


def sizes_of(model: PreTrainedModel) -> tuple[int, int]:
    """How many numbers a state has, and how many tokens there are."""
    size, hidden = model.get_parameter("model.embed_tokens.weight").shape
    return hidden, size


def eagle(folder: Path, model: PreTrainedModel, *, bias: bool = True, pickled: bool = True) -> Published:
    """EAGLE-1 and -2, the original repository's layout: pytorch_model.bin, and a first layer without a norm."""
    hidden, vocab_size = sizes_of(model)
    shapes: Shapes = {"embed_tokens.weight": (vocab_size, hidden), "fc.weight": (hidden, 2 * hidden)}
    shapes |= layer_shapes("layers.0", hidden, hidden) | ({"fc.bias": (hidden,)} if bias else {})
    weights = random_weights(1, shapes)
    config = layer_config(hidden) | {"vocab_size": vocab_size, "model_type": "llama"}
    write(folder, config, weights, pickled="pytorch_model.bin" if pickled else None)

    def read(states: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat((weights["embed_tokens.weight"][ids], states), dim=-1) @ weights["fc.weight"].T
        x = x + weights["fc.bias"] if bias else x
        return layer(weights, "layers.0", x, x)

    def says(tokens: Tokens, path: Tokens) -> Tensor:
        held = FreshFeatures(model, (model.config.num_hidden_layers,)).features(tokens[:-1], len(tokens) - 1)
        last = after_path(held, tokens, path, read)
        return last @ model.get_parameter("lm_head.weight").T

    return Published(folder, weights, says)


def eagle3(
    folder: Path,
    model: PreTrainedModel,
    *,
    drafts: int | None = 24,
    first: str = "midlayer",
    speculators: bool = False,
    reads: tuple[int, ...] | None = None,
    said: Mapping[str, object] = NOTHING,
    embeds: bool = True,
    biases: bool = False,
) -> Published:
    """EAGLE-3 in the layout of the original repository, or of `speculators`; the config may have `said` more."""
    (hidden, vocab_size), layers = sizes_of(model), model.config.num_hidden_layers
    size = drafts or vocab_size
    read_layers = reads or (2, layers // 2, layers - 3)
    width = len(read_layers) * hidden
    shapes = {
        "fc.weight": (hidden, width),
        "norm.weight": (hidden,),
        "lm_head.weight": (size, hidden),
        f"{first}.input_layernorm.weight": (hidden,),
        f"{first}.hidden_norm.weight": (hidden,),
    } | layer_shapes(first, hidden, 2 * hidden, biases=biases)
    if embeds:
        shapes["embed_tokens.weight"] = (vocab_size, hidden)
    if said.get("norm_before_fc"):
        shapes["input_norm.weight"] = (width,)
    if said.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(len(read_layers))}
    weights = random_weights(2, shapes)
    ids, maps = frequent(size, vocab_size) if drafts else (torch.arange(vocab_size), {})
    sizes = layer_config(hidden) | {"vocab_size": vocab_size}
    config: dict[str, object]
    if speculators:
        config = {"speculators_model_type": "eagle3", "transformer_layer_config": sizes | {"model_type": "llama"}}
        config |= {"eagle_aux_hidden_state_layer_ids": list(reads) if reads else None}
    else:
        config = sizes | (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in reads]}} if reads else {}
        )
    write(folder, config | {"draft_vocab_size": size} | dict(said), weights | maps)
    table = weights["embed_tokens.weight"] if embeds else model.get_parameter("model.embed_tokens.weight")

    def read(states: Tensor, tokens: Tensor) -> Tensor:
        embedded = rms(table[tokens], weights[f"{first}.input_layernorm.weight"])
        normed = rms(states, weights[f"{first}.hidden_norm.weight"])
        residual = normed if said.get("norm_before_residual") else states
        out = layer(weights, first, torch.cat((embedded, normed), dim=-1), residual)
        return rms(out, weights["norm.weight"]) if said.get("norm_output") else out

    def says(tokens: Tokens, path: Tokens) -> Tensor:
        held = FreshFeatures(model, read_layers).features(tokens[:-1], len(tokens) - 1)
        if said.get("norm_before_fc"):
            held = rms(held, weights["input_norm.weight"])
        if said.get("fc_norm"):
            parts = held.chunk(len(read_layers), dim=-1)
            held = torch.cat([rms(part, weights[f"fc_norm.{i}.weight"]) for i, part in enumerate(parts)], dim=-1)
        last = after_path(held @ weights["fc.weight"].T, tokens, path, read)
        normed = last if said.get("norm_output") else rms(last, weights["norm.weight"])
        return spread(normed @ weights["lm_head.weight"].T, vocab_size, ids)

    return Published(folder, weights, says)


def medusa(folder: Path, model: PreTrainedModel, *, heads: int = 3, blocks: int = 1, prefix: str = "") -> Published:
    """Medusa: medusa_lm_head.pt, of which head i has blocks {i}.{j} and a last linear layer without a bias."""
    hidden, vocab_size = sizes_of(model)
    shapes: Shapes = {}
    for i in range(heads):
        for j in range(blocks):
            shapes |= {f"{prefix}{i}.{j}.linear.weight": (hidden, hidden), f"{prefix}{i}.{j}.linear.bias": (hidden,)}
        shapes[f"{prefix}{i}.{blocks}.weight"] = (vocab_size, hidden)
    weights = random_weights(3, shapes)
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "elsewhere"}  # as published
    write(folder, config, weights, pickled=None if prefix else "medusa_lm_head.pt")

    def says(tokens: Tokens, path: Tokens) -> Tensor:
        x = FreshFeatures(model, (model.config.num_hidden_layers,)).features(tokens[:-1], 1)[0]
        i = len(path)
        for j in range(blocks):
            out = weights[f"{prefix}{i}.{j}.linear.weight"] @ x + weights[f"{prefix}{i}.{j}.linear.bias"]
            x = x + out * out.sigmoid()
        return weights[f"{prefix}{i}.{blocks}.weight"] @ x

    return Published(folder, weights, says)


def jump(folder: Path, model: PreTrainedModel, layers: tuple[int, ...] = (1, 4)) -> Published:
    """Our own layout of a linear predictor."""
    hidden, vocab_size = sizes_of(model)
    shapes: Shapes = {"mix.weight": (hidden, len(layers) * hidden), "carry.weight": (hidden, hidden)}
    shapes |= {"token.weight": (hidden, hidden), "token.bias": (hidden,)}
    weights = random_weights(4, shapes)
    write(folder, {"specflow_head": "jump", "layers": list(layers), "vocab_size": vocab_size}, weights)

    def says(tokens: Tokens, path: Tokens) -> Tensor:
        state = weights["mix.weight"] @ FreshFeatures(model, layers).features(tokens[:-1], 1)[0]
        for token in (tokens[-1], *path):
            embedded = model.get_parameter("model.embed_tokens.weight")[token]
            state = weights["carry.weight"] @ state + weights["token.weight"] @ embedded + weights["token.bias"]
        return model.get_parameter("lm_head.weight") @ state

    return Published(folder, weights, says)


@final
@frozen(eq=False)
class Names:
    """How a stock family names its multi-token prediction: {n} is the number of the model's layers."""

    layer: str
    enorm: str
    hnorm: str
    fc: str
    norm: str
    around_one: bool
    """Whether its norms multiply by 1 + weight."""
    recycles_normed: bool


QWEN: Final = Names(
    "mtp.layers.0.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm",
    around_one=True, recycles_normed=True,
)  # fmt: skip

_OF = "model.layers.{n}."
DEEPSEEK: Final = Names(
    _OF, f"{_OF}enorm", f"{_OF}hnorm", f"{_OF}eh_proj", f"{_OF}shared_head.norm",
    around_one=False, recycles_normed=False,
)  # fmt: skip


def stock(folder: Path, model: PreTrainedModel, other: PreTrainedModel, names: Names) -> Published:
    """The checkpoint of a model with its multi-token prediction, whose layer is the last one of the `other` model.

    Both are saved by transformers, so that experts are as they are published.
    """
    model.save_pretrained(folder)
    other.save_pretrained(folder / "other")
    n, (hidden, _) = model.config.num_hidden_layers, sizes_of(model)
    held, others = (load_file(place / "model.safetensors") for place in (folder, folder / "other"))
    last = f"model.layers.{n - 1}."
    for name, tensor in others.items():
        if name.startswith(last):
            held[names.layer.format(n=n) + name.removeprefix(last)] = tensor
    around = 0.0 if names.around_one else 1.0
    own = random_weights(5, {"fc": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,), "norm": (hidden,)})
    own = {name: (tensor - 1 + around if "norm" in name else tensor).float() for name, tensor in own.items()}
    for name, tensor in own.items():
        held[getattr(names, name).format(n=n) + ".weight"] = tensor
    if not names.around_one:  # copies of the model's own, as DeepSeek-V3 publishes them
        held[f"model.layers.{n}.embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
        held[f"model.layers.{n}.shared_head.head.weight"] = held["lm_head.weight"].clone()
    save_file(held, folder / "model.safetensors")
    within = other.get_submodule("model")

    def normed(x: Tensor, name: str) -> Tensor:
        return rms(x, own[name] + 1.0 - around, getattr(model.config, "rms_norm_eps"))  # noqa: B009 - transformers' configs say so

    def read(states: Tensor, ids: Tensor) -> Tensor:
        embedded = model.get_parameter("model.embed_tokens.weight")[ids]
        x = torch.cat((normed(embedded, "enorm"), normed(states, "hnorm")), dim=-1) @ own["fc"].T
        positions = torch.arange(len(ids))[None]
        mask = torch.full((len(ids), len(ids)), torch.finfo(x.dtype).min).triu(1)[None, None]
        angles = within.get_submodule("rotary_emb")(x[None], positions)
        module = within.get_submodule(f"layers.{n - 1}")
        with torch.no_grad():
            out: Tensor = module(
                x[None], position_embeddings=angles, attention_mask=mask, position_ids=positions, cache=None
            )
        return normed(out[0], "norm") if names.recycles_normed else out[0]

    def says(tokens: Tokens, path: Tokens) -> Tensor:
        states = FreshFeatures(model, (n,)).features(tokens[:-1], len(tokens) - 1)
        last = after_path(states, tokens, path, read)
        last = last if names.recycles_normed else normed(last, "norm")
        return last @ model.get_parameter("lm_head.weight").T

    return Published(folder, held, says)


# Heads over models of a few tokens.


def shape(hidden: int) -> Shape:
    return Shape(hidden, 6, 2, 1, 2)


@cache
def table_head(kind: str, size: int, width: int, seed: int) -> Head:
    """A random head over a table model, in fp64; with three tokens or more it does not draft the second."""
    with torch.random.fork_rng():  # the certificate wants its own randomness untouched
        torch.manual_seed(seed)
        made = _table_head(kind, size, width)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(0, 1)
    return cast(Head, made.double().eval().requires_grad_(False))


def _table_head(kind: str, size: int, width: int) -> Module:
    some = Vocabulary(size, size, torch.tensor([0, *range(2, size)]) if size > 2 else None)
    everything, says = Vocabulary(size, size), size - (size > 2)
    table, lm_head = Embedding(size, width), Linear(width, size, bias=False)
    made: Module
    if kind == "eagle":
        made = Eagle(shape(width), everything, (0,), table, lm_head)
    elif kind == "eagle3":
        made = Eagle3(shape(width), some, (0,), width, table, Linear(width, says, bias=False), depth=2)
    elif kind == "medusa":
        made = Medusa(width, everything, (0,), 2, 1, size)
    elif kind == "jump":
        made = Jump(width, everything, (0,), table, lm_head)
    else:
        config = LlamaConfig(hidden_size=width, intermediate_size=6, num_attention_heads=2, num_key_value_heads=1)
        layer, norm = LlamaDecoderLayer(config, 0), partial(LlamaRMSNorm, width)
        made = MTP(width, everything, (0,), table, lm_head, layer, norm, LlamaRotaryEmbedding(config), True)
    return made


def linear_head(model: PreTrainedModel) -> HeadPredictor:
    """A random linear head over a model."""
    torch.manual_seed(0)
    (hidden, size), own, says = sizes_of(model), model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(own, Embedding)
    assert says is not None
    made = Jump(hidden, Vocabulary(size, size), (1,), own, says)
    for name in ("mix", "carry", "token"):
        made.get_submodule(name).to(model.dtype)
    return HeadPredictor(made.eval(), FreshFeatures(model, (1,)))
