"""Tiny random models of the decoder-only architectures of transformers, and what is known of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final, final

import pytest
import torch
from attrs import frozen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.toys import VOCABULARY

WINDOW: Final = 8
"""Sliding windows are this short, so that every text goes well past them."""

DOUBLE, SINGLE = torch.float64, torch.float32

ANY, ONE, TWO, NONE = "any pieces", "one token at a time", "two tokens or more", "the whole text afresh"


@final
@frozen
class Architecture:
    """A tiny config, the precision that the model computes in throughout, and how it turns out to be fed.

    `why` gives the reason where that is not in any pieces; `spread` is the deviation of its random weights.
    """

    kind: str
    config: Mapping[str, object]
    dtype: torch.dtype = DOUBLE
    feeding: str = ANY
    why: str = ""
    spread: float = 0.3

    def build(self, *, seed: int = 0, noise: float = 0.0) -> PreTrainedModel:
        """The model of weights drawn by `seed`; with `noise`, a drafter that is right some of the time."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.kind, **self.config))
        generator = torch.Generator().manual_seed(seed)
        apart = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                if parameter.dim() > 1:
                    parameter.normal_(0, self.spread, generator=generator)
                    parameter.add_(noise * self.spread * torch.randn(parameter.shape, generator=apart))
        model.to(self.dtype)
        model.eval()
        return model


def _config(**kwargs: object) -> dict[str, object]:
    common: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return common | kwargs


def _old(**kwargs: object) -> dict[str, object]:
    """The names that the earliest models use."""
    common: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return common | kwargs


def _experts(**kwargs: object) -> dict[str, object]:
    """Mixtures of experts, under all the names that their numbers have."""
    numbers: dict[str, object] = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    }
    return _config(**(numbers | kwargs))


_LATENT: Final[dict[str, object]] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_SLIDING: Final[dict[str, object]] = {
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MAMBA: Final[dict[str, object]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 2,
}
_MAMBA2: Final[dict[str, object]] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_DELTA: Final[dict[str, object]] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

_STATE_LOST = "longer pieces ignore the recurrent state that they start from"
_STEP_CLAMPED = "a token alone is not clamped to the smallest time step, as it is in company"

ARCHITECTURES: Final = (
    # Attention to all that came before.
    Architecture("apertus", _config()),
    Architecture("arcee", _config(head_dim=8)),
    Architecture("biogpt", _config()),
    Architecture("bitnet", _config()),
    Architecture(
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        SINGLE,
    ),
    Architecture("codegen", _old(rotary_dim=4)),
    Architecture("cohere", _config()),
    Architecture("ctrl", _old(dff=48)),
    Architecture("diffllama", _config()),
    Architecture("doge", _config()),
    Architecture("ernie4_5", _config(head_dim=8)),
    Architecture("exaone", _config(num_layers=2)),
    Architecture("falcon", _config()),
    Architecture("flint", _config(), SINGLE),
    Architecture("gemma", _config(head_dim=8)),
    Architecture("glm", _config(head_dim=8)),
    Architecture("glm4", _config(head_dim=8)),
    Architecture("gpt2", _old()),
    Architecture("gpt_bigcode", _old()),
    Architecture("gpt_neox", _config()),
    Architecture("gpt_neox_japanese", _config(intermediate_multiple_size=2)),
    Architecture("gptj", _old(rotary_dim=4)),
    Architecture("granite", _config()),
    Architecture("helium", _config(head_dim=8)),
    Architecture("hrm_text", _config()),
    Architecture("hunyuan_v1_dense", _config(head_dim=8)),
    Architecture("internlm3", _config()),
    Architecture("iquestcoder", _config()),
    Architecture("jais2", _config()),
    Architecture("llama", _config()),
    Architecture("minicpm3", _config(**_LATENT)),
    Architecture("ministral3", _config()),
    Architecture(
        "mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, SINGLE
    ),
    Architecture("nanochat", _config()),
    Architecture("nemotron", _config()),
    Architecture("olmo", _config()),
    Architecture("olmo2", _config()),
    Architecture("openai-gpt", _old(), feeding=NONE, why="it has no cache"),
    Architecture(
        "opt",
        _config(ffn_dim=48, word_embed_proj_dim=32),
    ),
    Architecture("persimmon", _config(num_key_value_heads=4)),
    Architecture("phi", _config()),
    Architecture("phi3", _config()),
    Architecture("qwen2", _config()),
    Architecture("qwen3", _config(head_dim=8)),
    Architecture("seed_oss", _config(head_dim=8)),
    Architecture("smollm3", _config()),
    Architecture("stablelm", _config()),
    Architecture(
        "xglm",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 256,
        },
        SINGLE,
    ),
    Architecture("youtu", _config(**_LATENT)),
    # Sliding windows, chunks, layers that share.
    Architecture("cohere2", _config(**_SLIDING)),
    Architecture("cwm", _config(**_SLIDING)),
    Architecture(
        "dory",
        _config(
            num_hidden_layers=3,
            n_input_layers=1,
            n_recurrent_layers=1,
            n_output_layers=1,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    Architecture("exaone4", _config(**_SLIDING)),
    Architecture("gemma2", _config(**_SLIDING, query_pre_attn_scalar=8), SINGLE),
    Architecture("gemma3_text", _config(**_SLIDING, query_pre_attn_scalar=8)),
    Architecture(
        "gemma3n_text",
        _config(
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            intermediate_size=[48] * 4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    Architecture(
        "gemma4_text",
        _config(**_SLIDING, global_head_dim=8, hidden_size_per_layer_input=0, vocab_size_per_layer_input=VOCABULARY),
    ),
    Architecture(
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "window_size": WINDOW,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        SINGLE,
    ),
    Architecture(
        "llama4_text",
        _config(
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        ),
        SINGLE,  # its rotations are fp32, and on some processors depend on how many positions are rotated at once
    ),
    Architecture("ministral", _config(sliding_window=WINDOW, head_dim=8)),
    Architecture("mistral", _config(sliding_window=WINDOW)),
    Architecture("modernbert-decoder", _config(layer_types=_SLIDING["layer_types"], local_attention=WINDOW)),
    Architecture("olmo3", _config(sliding_window=WINDOW)),
    Architecture("starcoder2", _config(sliding_window=WINDOW)),
    Architecture("vaultgemma", _config(**_SLIDING, query_pre_attn_scalar=8), SINGLE),
    # Mixtures of experts. Most of their kernels refuse fp64.
    Architecture("afmoe", _experts(sliding_window=WINDOW), SINGLE),
    Architecture("axk1", _experts(**(_LATENT | {"head_dim": 4})), SINGLE),
    Architecture(
        "dbrx",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    Architecture("deepseek_v2", _experts(**(_LATENT | {"head_dim": 4})), SINGLE),
    Architecture("deepseek_v3", _experts(**(_LATENT | {"head_dim": 4})), SINGLE),
    Architecture(
        "deepseek_v32",
        _experts(**(_LATENT | {"head_dim": 4}), index_topk=8, index_n_heads=8, index_head_dim=8),
        SINGLE,
    ),
    Architecture("dots1", _experts(), SINGLE),
    Architecture("ernie4_5_moe", _experts(moe_num_experts=4, moe_k=2), SINGLE),
    Architecture("exaone_moe", _experts(sliding_window=WINDOW), SINGLE),
    Architecture("flex_olmo", _experts(), SINGLE),
    Architecture("glm4_moe", _experts(), SINGLE),
    Architecture("glm4_moe_lite", _experts(**_LATENT), SINGLE),
    Architecture("gpt_oss", _experts(**_SLIDING), SINGLE),
    Architecture("granitemoe", _experts(), SINGLE),
    Architecture("granitemoeshared", _experts(shared_intermediate_size=16), SINGLE),
    Architecture("hunyuan_v1_moe", _experts(moe_topk=2), SINGLE),
    Architecture("hy_v3", _experts(), SINGLE),
    Architecture("jetmoe", _experts(kv_channels=8)),
    Architecture("laguna", _experts(), SINGLE),
    Architecture(
        "longcat_flash",
        _config(
            **_LATENT,
            head_dim=4,
            num_layers=2,
            ffn_hidden_size=48,
            expert_ffn_hidden_size=16,
            n_routed_experts=4,
            moe_topk=2,
            zero_expert_num=2,
        ),
        SINGLE,
    ),
    Architecture("mellum", _experts(sliding_window=WINDOW), SINGLE),
    Architecture("mimo_v2_flash", _experts(sliding_window=WINDOW), SINGLE),
    Architecture("minimax_m2", _experts(), SINGLE),
    Architecture("mixtral", _experts(), SINGLE),
    Architecture("olmoe", _experts(), SINGLE),
    Architecture("phimoe", _experts(sliding_window=WINDOW), SINGLE),
    Architecture("qwen2_moe", _experts(shared_expert_intermediate_size=16), SINGLE),
    Architecture("qwen3_moe", _experts(), SINGLE),
    Architecture("solar_open", _experts(), SINGLE),
    # Recurrences, convolutions, and hybrids of these with attention. Most keep their states in fp32.
    Architecture("bailing_hybrid", _experts(**_LATENT, num_hidden_layers=4, layer_group_size=2), SINGLE),
    Architecture("bamba", _config(**_MAMBA2, attn_layer_indices=[1]), SINGLE),
    Architecture("falcon_h1", _config(**_MAMBA2, mamba_d_ssm=64, head_dim=8), SINGLE),
    Architecture("falcon_mamba", _MAMBA, SINGLE, ONE, _STATE_LOST),
    Architecture(
        "granitemoehybrid",
        _config(
            **_MAMBA2,
            layer_types=["mamba", "attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
        ),
        SINGLE,
    ),
    Architecture(
        "jamba",
        _config(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            mamba_d_state=8,
            mamba_dt_rank=8,
        ),
        SINGLE,
        ONE,
        _STATE_LOST,
        spread=0.2,
    ),
    Architecture("lfm2", _config(layer_types=["conv", "full_attention"], block_multiple_of=8, block_ff_dim=48)),
    Architecture("lfm2_moe", _experts(layer_types=["conv", "full_attention"], num_dense_layers=1), SINGLE),
    Architecture("mamba", _MAMBA, SINGLE, ONE, _STATE_LOST),
    Architecture("mamba2", {**_MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8}, SINGLE),
    Architecture(
        "minimax",
        _experts(layer_types=["full_attention", "linear_attention"], block_size=8),
        SINGLE,
    ),
    Architecture(
        "nemotron_h",
        _experts(
            layers_block_type=["mamba", "attention", "moe"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=1,
            ssm_state_size=8,
            chunk_size=8,
            moe_shared_expert_intermediate_size=16,
        ),
        SINGLE,
        TWO,
        _STEP_CLAMPED,
    ),
    Architecture("olmo_hybrid", _config(**(_DELTA | {"linear_num_key_heads": 4})), SINGLE),
    Architecture("qwen3_5_text", _config(**_DELTA, head_dim=8), SINGLE, spread=0.2),
    Architecture("qwen3_next", _experts(**_DELTA, shared_expert_intermediate_size=16), SINGLE),
    Architecture(
        "recurrent_gemma",
        _config(
            num_hidden_layers=3,
            lru_width=32,
            attention_window_size=WINDOW,
            block_types=["recurrent", "recurrent", "attention"],
            num_key_value_heads=1,
        ),
        DOUBLE,
        NONE,
        "it keeps its recurrent state in its modules, not in its cache",
    ),
    Architecture(
        "rwkv",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "num_hidden_layers": 2,
            "context_length": 256,
            "intermediate_size": 48,
        },
        SINGLE,
    ),
    Architecture("zaya", _config(num_experts=4, num_experts_per_tok=1), SINGLE),
    Architecture(
        "zamba",
        _config(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid"] * 2,
            mamba_d_state=8,
            n_mamba_heads=2,
            mamba_dt_rank=8,
            attention_head_dim=16,
            num_key_value_heads=4,
        ),
        SINGLE,
        ONE,
        _STATE_LOST,
        spread=0.1,
    ),
    Architecture(
        "zamba2",
        _config(
            num_hidden_layers=4,
            mamba_d_state=8,
            n_mamba_heads=4,
            mamba_ngroups=1,
            chunk_size=8,
            hybrid_layer_ids=[1, 3],
            layers_block_type=["mamba", "hybrid"] * 2,
            adapter_rank=4,
            num_key_value_heads=4,
        ),
        SINGLE,
        TWO,
        _STEP_CLAMPED,
        spread=0.25,
    ),
)

NAMED: Final[Mapping[str, Architecture]] = {architecture.kind: architecture for architecture in ARCHITECTURES}


@cache
def built(kind: str) -> PreTrainedModel:
    """The model of an architecture, for tests that leave it as it is."""
    return NAMED[kind].build()


EACH: Final = tuple(
    pytest.param(architecture, id=architecture.kind, marks=pytest.mark.xdist_group(architecture.kind))
    for architecture in ARCHITECTURES
)
"""For tests over all of them. Those of one run in one process, which imports, builds and tries its model once."""
