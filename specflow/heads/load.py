"""Heads as they are published: which layout a checkpoint has, and the head that it holds.

A checkpoint is refused where a tensor is missing, has another shape, or is none of the head's, and the tensor is named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module

from specflow.errors import DecodeError
from specflow.guards.checks import a, shown
from specflow.heads.checkpoint import Checkpoint, Config
from specflow.heads.eagle import Eagle, Eagle3, Norms
from specflow.heads.head import Head, Vocabulary
from specflow.heads.jump import Jump
from specflow.heads.layer import Shape
from specflow.heads.medusa import Medusa
from specflow.heads.stock import FAMILIES, stock
from specflow.heads.target import Target, filled

ROPE: Final = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")
"""What configs say of rotary positions."""

KIND: Final = "specflow_head"
"""What the config of a head of our own says its kind under."""

LAYERS: Final = "eagle_aux_hidden_state_layer_ids"
"""What configs of EAGLE-3 name the layers that it reads under."""

Layout: TypeAlias = Callable[[Checkpoint, Target], Head]
"""Makes the head that a checkpoint of this layout holds."""


def load_head(name: str | PathLike[str], model: Module) -> Head:
    """The head in the folder `name`, or of that name on the hub, for the target `model`, in its dtype and where it is.

    Layouts (docs/heads.md): the original EAGLE repository's, that of `speculators`, Medusa's, the multi-token
    prediction that Qwen3-Next, DeepSeek-V3 and GLM-4.5 carry in their own checkpoints, and our own. What a checkpoint
    leaves to the target, its embeddings or its output layer, is the target's own and no copy.

    `DecodeError` for what cannot be found or read, for another layout, a tensor that is missing, not expected or of
    another shape, a vocabulary that is not the target's, and layers that the target does not have.
    """
    a(Module, "give the target, a transformers model")("model", model)
    checkpoint = Checkpoint.at(name)
    for is_it, layout in LAYOUTS:
        if is_it(checkpoint):
            return layout(checkpoint, Target(model))
    received, remedy = ", ".join(checkpoint.names[:3]), "give a head of a layout in docs/heads.md"
    raise DecodeError("head", "the checkpoint is of no layout that is known", shown(received), remedy)


def _eagle(checkpoint: Checkpoint, target: Target) -> Head:
    """EAGLE-1 and -2: `fc`, `layers.0.*`, and the target's own output layer."""
    config, tensors = checkpoint.config, _without_rotary(checkpoint.tensors())
    shape = _shape(config, tensors, "layers.0")
    target.check_size(shape.hidden)
    table, borrowed = _embedding(tensors, target, shape.hidden)
    vocabulary = Vocabulary(target.vocab_size, table.num_embeddings)
    depth = config.size("num_hidden_layers", 1)
    with torch.device("meta"):
        head = Eagle(shape, vocabulary, (target.layers,), table, target.says, depth, "fc.bias" in tensors)
    filled(head, tensors, (*borrowed, "lm_head."), target.like)
    return head


def _eagle3(checkpoint: Checkpoint, target: Target) -> Head:
    """EAGLE-3 of the original repository: the first layer is called `midlayer`."""
    config = checkpoint.config
    part = config.part("eagle_config")
    outputs = None if part is None else part.ids(LAYERS)  # as SGLang and SpecForge: layer i gives hidden state i + 1
    said = config.ids(LAYERS) if outputs is None else tuple([layer + 1 for layer in outputs])
    return _of_eagle3(checkpoint, config, said, target)


def _speculators(checkpoint: Checkpoint, target: Target) -> Head:
    """speculators: the sizes of the layer in `transformer_layer_config`, and what is said of norms beside it."""
    config = checkpoint.config
    kind, sizes = config.said.get("speculators_model_type"), config.part("transformer_layer_config")
    if kind != "eagle3":
        raise DecodeError("head", "no head of speculators' of this kind is known", shown(kind), "give an eagle3 head")
    if sizes is None:
        happened, remedy = "config.json does not tell the head's sizes", "see transformer_layer_config"
        raise DecodeError("head", happened, shown(sorted(config.said)), remedy)
    return _of_eagle3(checkpoint, sizes, config.ids(LAYERS), target)


def _of_eagle3(checkpoint: Checkpoint, sizes: Config, said: tuple[int, ...] | None, target: Target) -> Head:
    config, layers = checkpoint.config, target.layers
    tensors = {
        re.sub(r"^midlayer\.", "layers.0.", name): tensor
        for name, tensor in _without_rotary(checkpoint.tensors()).items()
        if not name.startswith("verifier_")
    }
    reads = target.reads((2, layers // 2, layers - 3) if said is None else said)
    target.check_size(config.size("target_hidden_size", target.hidden))
    shape = _shape(sizes, tensors, "layers.0")
    table, borrowed = _embedding(tensors, target, shape.hidden)
    size = config.size("draft_vocab_size", sizes.size("vocab_size"))
    vocabulary = Vocabulary(target.vocab_size, table.num_embeddings, _drafted(tensors, target, size))
    lm_head: Module = Linear(shape.hidden, size, bias=False, device="meta")
    if "lm_head.weight" not in tensors and vocabulary.ids is None:
        target.check_size(shape.hidden)
        lm_head, borrowed = target.says, (*borrowed, "lm_head.")
    norms = Norms(*[config.flag(name) for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")])
    depth, width = sizes.size("num_hidden_layers", 1), len(reads) * target.hidden
    with torch.device("meta"):
        head = Eagle3(shape, vocabulary, reads, width, table, lm_head, depth, norms, "fc.bias" in tensors)
    filled(head, tensors, borrowed, target.like)
    return head


def _medusa(checkpoint: Checkpoint, target: Target) -> Head:
    """Medusa: `{i}.{j}.linear` for the blocks of head i, and `{i}.{blocks}.weight` after them."""
    names = {name: re.sub(r"^medusa_heads?\.", "", name) for name in checkpoint.names}
    tensors = {f"heads.{names[name]}": tensor for name, tensor in checkpoint.tensors().items()}
    places = [match for name in names.values() if (match := re.match(r"(\d+)\.(\d+)\.", name))]
    heads, blocks = (max([int(place[i]) for place in places], default=0) + (i == 1) for i in (1, 2))
    blocks -= 0 if any(name.endswith(f".{blocks}.weight") for name in names.values()) else 1
    last = tensors.get(f"heads.0.{blocks}.weight")
    says = target.vocab_size if last is None or last.dim() != 2 else len(last)
    target.check_vocabulary(says)
    vocabulary = Vocabulary(target.vocab_size, target.vocab_size)
    with torch.device("meta"):
        head = Medusa(target.hidden, vocabulary, (target.layers,), heads, blocks, says)
    filled(head, tensors, (), target.like)
    return head


def _jump(checkpoint: Checkpoint, target: Target) -> Head:
    """Our own: the layers that it reads and the vocabulary in its config, and `mix`, `carry` and `token`."""
    said = checkpoint.config.ids("layers")
    if said is None:
        happened, remedy = "config.json does not tell the layers that the head reads", 'see "layers"'
        raise DecodeError("head", happened, shown(sorted(checkpoint.config.said)), remedy)
    target.check_vocabulary(checkpoint.config.size("vocab_size"))
    table = target.embeddings
    vocabulary = Vocabulary(target.vocab_size, table.num_embeddings)
    with torch.device("meta"):
        head = Jump(target.hidden, vocabulary, target.reads(said), table, target.says)
    filled(head, checkpoint.tensors(), ("embed_tokens.", "lm_head."), target.like)
    return head


def _shape(config: Config, tensors: Mapping[str, Tensor], layer: str) -> Shape:
    """The sizes that a config names; whether there are biases and norms of heads is seen in the tensors of `layer`."""
    act = config.said.get("hidden_act", "silu")
    if act != "silu":
        raise DecodeError("head", "the head's layers have another activation", shown(act), "give a head with silu")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    return Shape(
        hidden,
        config.size("intermediate_size"),
        heads,
        config.size("num_key_value_heads", heads),
        config.size("head_dim", max(1, hidden // heads)),
        config.number("rms_norm_eps", 1e-6),
        {name: config.said[name] for name in ROPE if config.said.get(name) is not None},
        f"{layer}.self_attn.q_proj.bias" in tensors,
        f"{layer}.self_attn.q_norm.weight" in tensors,
    )


def _embedding(tensors: Mapping[str, Tensor], target: Target, hidden: int) -> tuple[Embedding, tuple[str, ...]]:
    """The head's table of tokens, and its name where it is borrowed from the target."""
    own = tensors.get("embed_tokens.weight")
    if own is not None:
        target.check_vocabulary(len(own))
        return Embedding(len(own), hidden, device="meta"), ()
    table = target.embeddings
    if table.embedding_dim != hidden:
        happened = "the tensor embed_tokens.weight is missing, and the target's embeddings have another size"
        raise DecodeError("head", happened, f"{table.embedding_dim} numbers for {hidden}", "give a whole head")
    return table, ("embed_tokens.",)


def _drafted(tensors: dict[str, Tensor], target: Target, size: int) -> Tensor | None:
    """Which of the target's tokens are drafted, by d2t, which t2d has to confirm; None: the first, as they are."""
    offsets, marks = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if offsets is None:
        target.check_vocabulary(size)
        return None
    if offsets.dim() != 1 or offsets.is_floating_point() or len(offsets) != size:
        received = f"{list(offsets.shape)} of {offsets.dtype} for [{size}]"
        raise DecodeError("head", "the tensor d2t has another shape", received, "see draft_vocab_size in config.json")
    ids = torch.arange(size, device=offsets.device) + offsets.long()
    if int(ids.min()) < 0 or int(ids.max()) >= target.vocab_size:
        received = f"ids from {int(ids.min())} to {int(ids.max())} in a vocabulary of {target.vocab_size}"
        remedy = "give the target that the head was made for"
        raise DecodeError("head", "the tensor d2t names tokens that the target does not have", received, remedy)
    if marks is not None and not torch.equal(marks.bool().nonzero().flatten(), ids.sort().values):
        received = f"{size} and {int(marks.bool().sum())}"
        raise DecodeError("head", "the tensors d2t and t2d name different tokens", received, "give a whole head")
    return ids.to(target.like.device)


def _without_rotary(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the frequencies that old checkpoints carry: they follow from the config."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _has(*names: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: set(names) <= set(checkpoint.names)


LAYOUTS: Final[tuple[tuple[Callable[[Checkpoint], bool], Layout], ...]] = (
    (lambda checkpoint: checkpoint.config.said.get(KIND) == "jump", _jump),
    (lambda checkpoint: "speculators_model_type" in checkpoint.config.said, _speculators),
    (lambda checkpoint: any(family.carries(checkpoint) for family in FAMILIES.values()), stock),
    (_has("midlayer.self_attn.q_proj.weight"), _eagle3),
    (_has("layers.0.hidden_norm.weight"), _eagle3),
    (_has("fc.weight", "layers.0.self_attn.q_proj.weight"), _eagle),
    (lambda checkpoint: any(re.match(r"(medusa_heads?\.)?0\.0\.", name) for name in checkpoint.names), _medusa),
)
"""How a layout is told, and what makes its head; the first that fits."""
