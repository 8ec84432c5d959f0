"""The hyperparameters of a GGUF file, beside the config that transformers makes of them.

transformers reads the keys that it knows for an architecture, and leaves the others out in silence: a config's defaults
stand for them, which may be another model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isclose
from typing import Final, TypeAlias

from torch.nn import Module

Fields: TypeAlias = Mapping[str, object]
"""What a file says, by the names of keys behind that of the architecture."""

Held: TypeAlias = Mapping[str, object]
"""What a config has, as its `to_dict` tells it."""

WITHOUT_EFFECT: Final = frozenset(
    {
        # Transformers fails, or leaves numbers out, where the weights have other shapes, or other layers are there.
        "attention.key_length",
        "attention.key_length_swa",
        "attention.value_length",
        "attention.value_length_swa",
        "block_count",
        "embedding_length",
        "embedding_length_out",
        "embedding_length_per_layer_input",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "feed_forward_length",
        "full_attention_interval",
        "shortconv.l_cache",
        "ssm.conv_kernel",
        "ssm.group_count",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
        "use_parallel_residual",  # llama.cpp and transformers both go by the norms that are there
        "vocab_size",
        # These change no number.
        "context_length",
        "nextn_predict_layers",
        "pooling_type",
        "tensor_data_layout",
        "rope.dimension_sections",  # of images: all sections of a text are at one position
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        # These are looked at by themselves.
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.type",
    }
)
"""The keys whose values need no place in a config."""

BASE: Final = 10000.0
"""The base of the rotary frequencies where a file names none."""

LAYERS_OF_27B: Final = frozenset({46, 62})
"""How many layers the Gemmas have that scale attention by the width of a head in the text's own width: llama.cpp knows
them by that, since a file does not say it."""


def missing(held: Held, fields: Fields) -> dict[str, object]:
    """What a config shall have besides: what the file says and transformers leaves out, where nothing else depends on
    it."""
    found: dict[str, object] = {}
    rope, base = _rope(held), fields.get("rope.freq_base")
    if "rope_theta" in rope and rope.get("rope_type", "default") == "default" and base is not None:
        found["rope_parameters"] = {**rope, "rope_theta": base}
    window = fields.get("attention.sliding_window")
    if window and "layer_types" not in held and held.get("sliding_window", 0) is None:
        found["sliding_window"] = window
    if "query_pre_attn_scalar" in held:
        wide = held.get("num_hidden_layers") in LAYERS_OF_27B
        found["query_pre_attn_scalar"] = _shared_width(held) if wide else _width(held)
    return found


def differing(model: Module, held: Held, fields: Fields, *, is_stretched: bool) -> str | None:
    """A key whose value is not the config's, or which is not known; None where there is no such key.

    Of frequencies that are stretched in ways of their own no base and no width is looked at.
    """
    if not is_stretched and (name := _other_rotation(model, held, fields)):
        return name
    is_scaled = not is_stretched and "rope.scaling.type" not in fields  # else it says that nothing is
    for name, told in fields.items():
        if name in WITHOUT_EFFECT or (name.startswith("rope.scaling.") and not is_scaled):
            continue
        if name not in HELD:
            return name
        place = HELD[name](held)
        if place is not None and not _is_same(told, place) and not _sees_all(name, told, place, fields):
            return name
    return None


def _rope(held: Held) -> Mapping[str, object]:
    """The parameters of the rotation, for all layers or for each kind of layer; none where nothing is rotated."""
    rope = held.get("rope_parameters")
    return rope if isinstance(rope, dict) else {}


def _other_rotation(model: Module, held: Held, fields: Fields) -> str | None:
    """The key of the rotation that is another one in the model."""
    rope = _rope(held)
    if "rope_theta" not in rope:  # each kind of layer has its own, or nothing is rotated
        bases = {"full_attention": "rope.freq_base", "sliding_attention": "rope.freq_base_swa"}
        for kind, name in bases.items():
            part = rope.get(kind)
            if isinstance(part, dict) and not _is_same(fields.get(name, BASE), part.get("rope_theta", BASE)):
                return name
        return None
    if not _is_same(fields.get("rope.freq_base", BASE), rope["rope_theta"]):
        return "rope.freq_base"
    widths = {2 * each.numel() for name, each in model.named_buffers() if name.endswith(".inv_freq")}
    told = fields.get("rope.dimension_count", fields.get("attention.key_length", _width(held)))
    return "rope.dimension_count" if widths - {told} else None


def _width(held: Held) -> int:
    """How wide a head is."""
    width = held.get("head_dim")
    return width if isinstance(width, int) else _shared_width(held)


def _shared_width(held: Held) -> int:
    """How wide it is where the heads share the text's own width; 0 where there are none."""
    wide, heads = _HIDDEN(held), _HEADS(held)
    return wide // heads if isinstance(wide, int) and isinstance(heads, int) and heads else 0


def _is_same(told: object, held: object) -> bool:
    """Whether a file and a config say the same: a file's numbers are in fp32, and may be one for each layer."""
    if isinstance(told, int | float) and isinstance(held, int | float):
        return isclose(told, held, rel_tol=1e-5)
    if isinstance(told, list) and isinstance(held, int):
        return {*told} - {0} == {held}
    return told == held


def _sees_all(name: str, told: object, held: object, fields: Fields) -> bool:
    """Whether neither of two windows hides anything of a text that the model was made for."""
    if name != "attention.sliding_window":
        return False
    context = fields.get("context_length")
    return all(isinstance(size, int) and isinstance(context, int) and not 0 < size < context for size in (told, held))


_Read: TypeAlias = Callable[[Held], object]


def _named(*names: str, absent: object = None) -> _Read:
    """The first of these that a config has. `absent` is what a file may say where it has none; None is anything."""

    def read(held: Held) -> object:
        return next((value for name in names if (value := held.get(name)) is not None), absent)

    return read


_HEADS: Final = _named("num_attention_heads", "n_head")

_HIDDEN: Final = _named("hidden_size", "n_embd")

_EPSILON: Final = _named("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", absent=0.0)


def _scale(held: Held) -> object:
    scalar = held.get("query_pre_attn_scalar")
    return (scalar if isinstance(scalar, int | float) else _width(held) or 1) ** -0.5


def _gating(held: Held) -> object:
    """How experts are chosen, in llama.cpp's numbers."""
    return {"softmax": 1, "sigmoid": 2}.get(str(held.get("scoring_func", "softmax")))


def _pattern(held: Held) -> object:
    """Which layers have a window."""
    kinds = held.get("layer_types")
    return [kind == "sliding_attention" for kind in kinds] if isinstance(kinds, list) else []


HELD: Final[Mapping[str, _Read]] = {
    "attention.causal": lambda held: True,
    "attention.clamp_kqv": lambda held: 0.0,
    "attention.head_count": _HEADS,  # what has no attention has no heads
    "attention.head_count_kv": _named("num_key_value_heads"),
    "attention.layer_norm_epsilon": _EPSILON,
    "attention.layer_norm_rms_epsilon": _EPSILON,
    "attention.scale": _scale,
    "attention.shared_kv_layers": _named("num_kv_shared_layers", absent=0),
    "attention.sliding_window": _named("sliding_window", absent=0),
    "attention.sliding_window_pattern": _pattern,
    "attn_logit_softcapping": _named("attn_logit_softcapping", absent=0.0),
    "embedding_scale": lambda held: 1.0,
    "expert_count": _named("num_experts", "num_local_experts", absent=0),
    "expert_gating_func": _gating,
    "expert_group_count": lambda held: 1,
    "expert_group_used_count": lambda held: 1,
    "expert_shared_count": _named("n_shared_experts", absent=0),
    "expert_used_count": _named("num_experts_per_tok", absent=0),
    "expert_weights_norm": _named("norm_topk_prob", absent=False),
    "expert_weights_scale": _named("routed_scaling_factor", absent=1.0),
    "final_logit_softcapping": _named("final_logit_softcapping", absent=0.0),
    "leading_dense_block_count": _named("first_k_dense_replace", absent=0),
    "logit_scale": lambda held: 1.0,
    "residual_scale": lambda held: 1.0,
    "rope.scale_linear": lambda held: 1.0,
    "rope.scaling.attn_factor": lambda held: 1.0,
    "rope.scaling.factor": lambda held: 1.0,
    "ssm.dt_b_c_rms": lambda held: False,
}
"""What a config has in the place of a key; None where any value will do."""
