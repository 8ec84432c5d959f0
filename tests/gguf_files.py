"""Tiny GGUF files, written as llama.cpp's own converter writes them: a llama with a vocabulary of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import numpy
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TokenType, get_tensor_name_map
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedModel

from tests.toys import tiny_llama

BYTES: Final = sorted(ByteLevel.alphabet())
TOKENS: Final = [*BYTES, "he", "ll", "hell", "Ġw", "<|end|>", "<|user|>", "<|model|>"]
MERGES: Final = ["h e", "l l", "he ll", "Ġ w"]
END: Final = TOKENS.index("<|end|>")
TEMPLATE: Final = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% endif %}"
)
NAMES: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama(seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """The model in a file of the same seed."""
    return tiny_llama(seed, vocab_size=len(TOKENS), layers=layers, dtype=torch.float32)


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A llama's weights by the names that they have in a file."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": 4, "attn_k": 2}
    found = {}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in whole:
            found[f"{whole[module]}.weight"] = weight
            continue
        _, _, block, part = module.split(".", 3)
        short = NAMES[part]
        if short in heads:  # the halves of a head that turn together lie side by side in a file
            halves = weight.reshape(heads[short], 2, -1, weight.shape[-1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)  # noqa: PLW2901
        found[f"blk.{block}.{short}.weight"] = weight
    return found


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    arch: str = "llama",
    more: Mapping[str, Tensor] | None = None,
    without: Sequence[str] = (),
    numbers: Mapping[str, int | bool] | None = None,
    **fields: str,
) -> Path:
    """A llama at `path`, with `more` tensors and `without` some, `numbers`, and `fields` of texts, of `name_of_field`.

    Numbers belong to the architecture.
    """
    writer = GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    _add_vocabulary(writer)
    _add_numbers(writer, arch, numbers)
    for name, text in fields.items():
        writer.add_string(name.replace("_", "."), text)
    tensors = {**tensors_of(model), **(more or {})}
    return _written(writer, path, {name: weight for name, weight in tensors.items() if name not in without})


def _add_vocabulary(writer: GGUFWriter, pre: str = "gpt-2") -> None:
    """The bytes, some longer tokens, and those of the chat template."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [TokenType.CONTROL if token.startswith("<|") else TokenType.NORMAL for token in TOKENS]
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(END)
    writer.add_bos_token_id(END)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _add_numbers(writer: GGUFWriter, arch: str, numbers: Mapping[str, float] | None) -> None:
    for name, number in (numbers or {}).items():
        if isinstance(number, bool):
            writer.add_bool(f"{arch}.{name}", number)
        elif isinstance(number, int):
            writer.add_uint32(f"{arch}.{name}", number)
        else:
            writer.add_float32(f"{arch}.{name}", number)


def _written(writer: GGUFWriter, path: Path, tensors: Mapping[str, Tensor]) -> Path:
    for name, weight in tensors.items():
        writer.add_tensor(name, numpy.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_named(
    path: Path, model: PreTrainedModel, arch: MODEL_ARCH, numbers: Mapping[str, float] | None = None
) -> Path:
    """A model whose weights lie in a file as they are, each under the name that llama.cpp has for it.

    What the file says beside its sizes is in `numbers`.
    """
    names, prefix = get_tensor_name_map(arch, model.config.num_hidden_layers), MODEL_ARCH_NAMES[arch]
    sizes, writer = cast(dict[str, int], model.config.to_dict()), GGUFWriter(path, prefix)
    writer.add_context_length(128)
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    _add_numbers(writer, prefix, numbers)
    _add_vocabulary(writer)
    tied = {"lm_head.weight"} if sizes["tie_word_embeddings"] else set()
    weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    return _written(writer, path, {str(names.get_name(n, (".weight", ".bias"))): w for n, w in weights.items()})


def write_hybrid(path: Path, heads: int = 0) -> Path:
    """A Qwen 3.5 of random weights: a recurrent layer and one of attention, and `heads` blocks that draft."""
    random, wide, inner = torch.Generator().manual_seed(0), 32, 48
    sizes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), wide), "output_norm.weight": (wide,)}
    every: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (wide,),
        "post_attention_norm.weight": (wide,),
        "ffn_gate.weight": (inner, wide),
        "ffn_up.weight": (inner, wide),
        "ffn_down.weight": (wide, inner),
    }
    recurrent = every | {
        "attn_qkv.weight": (64, wide),
        "attn_gate.weight": (32, wide),
        "ssm_alpha.weight": (4, wide),
        "ssm_beta.weight": (4, wide),
        "ssm_conv1d.weight": (64, 4),
        "ssm_norm.weight": (8,),
        "ssm_out.weight": (wide, 32),
        "ssm_a": (4,),
        "ssm_dt.bias": (4,),
    }
    attention = every | {
        "attn_q.weight": (64, wide),  # with a gate for each head
        "attn_k.weight": (16, wide),
        "attn_v.weight": (16, wide),
        "attn_output.weight": (wide, 32),
        "attn_q_norm.weight": (8,),
        "attn_k_norm.weight": (8,),
    }
    drafting = attention | {
        "nextn.eh_proj.weight": (wide, 2 * wide),
        "nextn.enorm.weight": (wide,),
        "nextn.hnorm.weight": (wide,),
        "nextn.shared_head_norm.weight": (wide,),
    }
    for i, block in enumerate([recurrent, attention, *[drafting] * heads]):
        sizes |= {f"blk.{i}.{name}": size for name, size in block.items()}
    drawn = {name: torch.randn(size, generator=random) * 0.3 for name, size in sizes.items()}
    writer = GGUFWriter(path, "qwen35")
    writer.add_context_length(128)
    writer.add_embedding_length(wide)
    writer.add_block_count(2 + heads)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(4)
    writer.add_rope_dimension_sections([1, 1, 0, 0])
    numbers = {"conv_kernel": 4, "state_size": 8, "group_count": 2, "time_step_rank": 4, "inner_size": 32}
    for name, number in numbers.items():
        writer.add_uint32(f"qwen35.ssm.{name}", number)
    writer.add_uint32("qwen35.full_attention_interval", 2)
    if heads:
        writer.add_uint32("qwen35.nextn_predict_layers", heads)
    _add_vocabulary(writer, "qwen35")
    decay = {name: -weight.exp() if name.endswith("ssm_a") else weight for name, weight in drawn.items()}
    return _written(writer, path, decay)


def write_recurrent(path: Path, seed: int = 0) -> Path:
    """A Mamba of random weights, whose state cannot go back."""
    random, wide, state, rank, kernel = torch.Generator().manual_seed(seed), 64, 4, 2, 4
    sizes = {
        "attn_norm.weight": (32,),
        "ssm_in.weight": (2 * wide, 32),
        "ssm_conv1d.weight": (wide, kernel),
        "ssm_conv1d.bias": (wide,),
        "ssm_x.weight": (rank + 2 * state, wide),
        "ssm_dt.weight": (wide, rank),
        "ssm_dt.bias": (wide,),
        "ssm_a": (wide, state),
        "ssm_d": (wide,),
        "ssm_out.weight": (32, wide),
    }
    drawn = {
        f"blk.{i}.{name}": torch.randn(size, generator=random) * 0.3 for i in range(2) for name, size in sizes.items()
    }
    layers = {name: -weight.exp() if name.endswith("ssm_a") else weight for name, weight in drawn.items()}
    numbers = {"conv_kernel": kernel, "inner_size": wide, "state_size": state, "time_step_rank": rank}
    model = llama(seed)
    return write_gguf(
        path,
        model,
        arch="mamba",
        more=layers,
        without=[name for name in tensors_of(model) if name.startswith("blk.") and name not in layers],
        numbers={f"ssm.{name}": number for name, number in numbers.items()},
    )


def write_windowed(path: Path, window: int, seed: int = 0) -> Path:
    """A Gemma 2 of random weights, every other layer of which sees `window` tokens."""
    norms = [f"blk.{i}.{name}.weight" for i in range(2) for name in ("post_attention_norm", "post_ffw_norm")]
    more, numbers = dict.fromkeys(norms, torch.ones(32)), {"attention.sliding_window": window}
    return write_gguf(path, llama(seed), arch="gemma2", more=more, without=["output.weight"], numbers=numbers)


def write_encoder_decoder(path: Path) -> Path:
    """A T5 of zeros."""
    sizes = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    seen = {"attn_q": (16, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_o": (32, 16), "attn_rel_b": (8, 4)}
    crossed = {"cross_attn_norm": (32,), **{f"cross_{name}": size for name, size in seen.items()}}
    parts = {"enc": {**sizes, **seen}, "dec": {**sizes, **seen, **crossed}}
    layers = {
        f"{part}.blk.{i}.{name}.weight": torch.zeros(size)
        for part, named in parts.items()
        for name, size in named.items()
        for i in range(2)
    }
    norms = {f"{part}.output_norm.weight": torch.ones(32) for part in parts}
    model, numbers = llama(), {"attention.relative_buckets_count": 8}
    without = [name for name in tensors_of(model) if name.startswith("blk.") or name == "output_norm.weight"]
    return write_gguf(path, model, arch="t5", more=layers | norms, without=without, numbers=numbers)
