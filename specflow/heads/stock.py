"""The multi-token prediction that stock models carry in their own checkpoints, where transformers leaves it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, cast, final

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig

from specflow.errors import DecodeError
from specflow.guards.checks import shown
from specflow.heads.checkpoint import Checkpoint
from specflow.heads.head import Head, Vocabulary
from specflow.heads.mtp import MTP
from specflow.heads.target import Target, filled
from specflow.predictors.reader import config_of

OF_MODULE: Final = {
    "enorm": "enorm",
    "hnorm": "hnorm",
    "eh_proj": "eh_proj",
    "shared_head.norm": "norm",
}
"""DeepSeek-V3's names of what is beside the layer, and ours."""

OF_QWEN: Final = {
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "fc": "eh_proj",
    "norm": "norm",
}


@final
@frozen(eq=False)
class Family:
    """Where a family keeps its module: what is beside the layer under `beside`, by `names`, and the layer itself.

    In both, {n} stands for the number of the model's layers. Copies of the model's own weights are not read.
    """

    beside: str
    layer: str
    names: Mapping[str, str]
    recycles_normed: bool
    copies: tuple[str, ...] = ()

    def carries(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint has such a module."""
        fc = next(theirs for theirs, ours in self.names.items() if ours == "eh_proj")
        pattern = re.escape(self.beside).replace(re.escape("{n}"), r"\d+") + re.escape(f"{fc}.weight")
        return any(re.fullmatch(pattern, name) for name in checkpoint.names)

    def ours(self, name: str, layers: int) -> str | None:
        """What a tensor of the checkpoint is called in our module; None for one that is not of the first module."""
        beside, layer = (prefix.format(n=layers) for prefix in (self.beside, self.layer))
        for theirs, ours in self.names.items():
            if name.startswith(f"{beside}{theirs}."):
                return ours + name.removeprefix(beside + theirs)
        within = name.removeprefix(layer)
        return None if within == name or within.startswith(self.copies) else f"layer.{within}"


_OF_DEEPSEEK: Final = Family(
    "model.layers.{n}.", "model.layers.{n}.", OF_MODULE, recycles_normed=False, copies=("shared_head.", "embed_tokens.")
)

FAMILIES: Final[Mapping[str, Family]] = {
    "qwen3_next": Family("mtp.", "mtp.layers.0.", OF_QWEN, recycles_normed=True),
    "deepseek_v3": _OF_DEEPSEEK,
    "glm4_moe": _OF_DEEPSEEK,
}
"""By transformers' name of the model's type."""


def stock(checkpoint: Checkpoint, target: Target) -> Head:
    """The first module of multi-token prediction in the checkpoint of the target itself."""
    config = config_of(target.model)
    kind: object = getattr(config, "model_type", None)
    family = FAMILIES.get(str(kind))
    if family is None or not family.carries(checkpoint):
        remedy = f"give a target of {', '.join(FAMILIES)}, whose checkpoint this is"
        raise DecodeError("head", "the checkpoint's multi-token prediction is not the target's", shown(kind), remedy)
    ours = {name: family.ours(name, target.layers) for name in checkpoint.names}
    held = checkpoint.tensors(lambda name: ours[name] is not None)
    tensors = _fused({cast(str, ours[name]): tensor for name, tensor in held.items()})
    like, inner = target.like, target.model.get_submodule("model")
    number = _last_full(cast(PreTrainedConfig, config))
    make_layer, make_norm = type(inner.get_submodule(f"layers.{number}")), type(inner.get_submodule("norm"))
    epsilon: float = getattr(config, "rms_norm_eps", 1e-6)
    with torch.device("meta"):
        layer = cast(Callable[..., Module], make_layer)(config, number)
        head = MTP(
            target.hidden,
            Vocabulary(target.vocab_size, target.embeddings.num_embeddings),
            (target.layers,),
            target.embeddings,
            target.says,
            layer,
            lambda: cast(Callable[..., Module], make_norm)(target.hidden, eps=epsilon),
            inner.get_submodule("rotary_emb"),
            family.recycles_normed,
        )
    layer.get_submodule("self_attn").__dict__["layer_idx"] = 0  # where its keys are in a cache of its own
    filled(head, tensors, ("embed_tokens.", "lm_head.", "rotary_emb."), like)
    return head


def _last_full(config: PreTrainedConfig) -> int:
    """The last of the model's layers that attends to the whole text: the module's is of its kind."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return max(i for i, kind in enumerate(kinds) if kind == "full_attention")


def _fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts as transformers holds them: all of a layer's in one tensor, the gate's rows before those of up."""
    apart = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    found = {name: match for name in tensors if (match := apart.fullmatch(name))}
    together = {name: tensor for name, tensor in tensors.items() if name not in found}
    for home in dict.fromkeys(match[1] for match in found.values()):
        count = 1 + max(int(match[2]) for match in found.values() if match[1] == home)

        def part(expert: int, kind: str, home: str = home) -> Tensor:
            name = f"{home}.{expert}.{kind}_proj.weight"
            if name not in tensors:
                raise DecodeError("head", f"the tensor {name} is missing", f"{len(found)} of experts", "give all")
            return tensors[name]

        together[f"{home}.gate_up_proj"] = torch.stack(
            [torch.cat((part(i, "gate"), part(i, "up"))) for i in range(count)]
        )
        together[f"{home}.down_proj"] = torch.stack([part(i, "down") for i in range(count)])
    return together
