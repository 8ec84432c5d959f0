"""A layer of the llama family over a cache of its own, written for k tokens of one text, which may be a tree.

Source: Touvron et al. 2302.13971; grouped queries: Ainslie et al. 2305.13245; rotary positions: Su et al. 2104.09864.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
import torch.nn.functional as F
from attrs import Factory, field, frozen
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from typing_extensions import override

from specflow.caches import KVCache, Past
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, flag, number, shown, valid, whole
from specflow.predictors.reader import STATIC_ROTARY

_size = valid(whole(1, "give a size", MOST))
_small = number("epsilon is not between 0 and 1", "give 1e-6", lambda epsilon: 0 < epsilon < 1)
_flag = valid(flag)


@final
@frozen
class Shape:
    """The sizes of a head's layers: states of `hidden` numbers, and heads of attention of `size`.

    `rope` is what a config of transformers' says of rotary positions. `biases`: queries, keys and values have them.
    `normed_heads`: queries and keys are normed (Qwen3). `DecodeError` for what are no sizes, for heads that do not
    share key heads evenly, and for a rotary embedding that depends on the length of the text.
    """

    hidden: int = field(validator=_size)
    inner: int = field(validator=_size)
    heads: int = field(validator=_size)
    kv_heads: int = field(validator=_size)
    size: int = field(validator=_size)
    epsilon: float = field(default=1e-6, validator=valid(_small))
    rope: Mapping[str, object] = field(factory=dict, validator=valid(a(Mapping, "give what a config says")))
    biases: bool = field(default=False, validator=_flag)
    normed_heads: bool = field(default=False, validator=_flag)

    def __attrs_post_init__(self) -> None:
        if self.heads % self.kv_heads or self.size % 2:
            received = f"{self.heads} heads over {self.kv_heads}, each of {self.size}"
            remedy = "give heads of an even size that share key heads evenly"
            raise DecodeError("heads", "the heads of the layer do not fit together", received, remedy)

    def rotary(self) -> LlamaRotaryEmbedding:
        """The embedding of positions."""
        said = dict(self.rope)
        heads, size = self.heads, self.size
        try:
            with torch.device("cpu"):  # wherever the head's weights are made
                config = LlamaConfig.from_dict(
                    {"hidden_size": heads * size, "num_attention_heads": heads, "head_dim": size, **said}
                )
                made = LlamaRotaryEmbedding(config)
        except Exception as error:  # a checkpoint may say anything
            happened, remedy = "the head's rotary embedding cannot be made", "see the cause"
            raise DecodeError("rope", happened, shown(said), remedy) from error
        if made.rope_type not in STATIC_ROTARY:
            happened, remedy = "the head's rotary embedding depends on the length of the text", "give another head"
            raise DecodeError("rope", happened, shown(made.rope_type), remedy)
        return made


@final
class Norm(Module):
    """x / √(mean(x²) + ε) · weight over the last dimension, through fp32 at least."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(size, dtype=torch.get_default_dtype()))  # as torch's own layers are made
        self.epsilon = epsilon

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Of x [..., n]."""
        fine = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (fine * torch.rsqrt(fine.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


@final
@frozen(eq=False)
class Pass:
    """k tokens that follow the first `start` of a cache: the `angles` of their positions, and what they do not see."""

    angles: tuple[Tensor, Tensor]
    start: int
    mask: Tensor | None


@final
class Attention(Module):
    """softmax(q · kᵀ / √size) · v with rotary positions, of what has `read` numbers for a token."""

    def __init__(self, shape: Shape, read: int) -> None:
        super().__init__()
        self.size = shape.size
        self.q_proj = Linear(read, shape.heads * shape.size, bias=shape.biases)
        self.k_proj = Linear(read, shape.kv_heads * shape.size, bias=shape.biases)
        self.v_proj = Linear(read, shape.kv_heads * shape.size, bias=shape.biases)
        self.o_proj = Linear(shape.heads * shape.size, shape.hidden, bias=False)
        self.q_norm = Norm(shape.size, shape.epsilon) if shape.normed_heads else None
        self.k_norm = Norm(shape.size, shape.epsilon) if shape.normed_heads else None

    @override
    def forward(self, x: Tensor, held: Tensor, here: Pass) -> Tensor:
        """Of x [k, read]; its keys and values are written to `held` [2, kv_heads, capacity, size]."""
        k, end = len(x), here.start + len(x)
        q, key, value = (
            proj(x).view(k, -1, self.size).transpose(0, 1) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, key = self.q_norm(q), self.k_norm(key)
        held[0, :, here.start : end], held[1, :, here.start : end] = turned(key, here.angles), value
        keys, values = held[None, :, :, :end].unbind(1)
        queries = turned(q, here.angles)[None]
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=here.mask, enable_gqa=True)
        out: Tensor = self.o_proj(seen[0].transpose(0, 1).reshape(k, -1))
        return out


@final
class MLP(Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.inner, bias=False)
        self.up_proj = Linear(shape.hidden, shape.inner, bias=False)
        self.down_proj = Linear(shape.inner, shape.hidden, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Of x [k, H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


@final
class Layer(Module):
    """Attention and MLP, each added to the residual. What attention reads is given: heads read more than that.

    `before` names the norms of what attention reads, which the head applies.
    """

    def __init__(self, shape: Shape, read: int, before: Sequence[str]) -> None:
        super().__init__()
        self.before = tuple(before)
        for name in before:
            self.add_module(name, Norm(shape.hidden, shape.epsilon))
        self.self_attn = Attention(shape, read)
        self.mlp = MLP(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.epsilon)

    def normed(self, *parts: Tensor) -> list[Tensor]:
        """The parts of what attention reads, each after its norm, where it has one."""
        if not self.before:
            return [*parts]
        return [self.get_submodule(name)(part) for name, part in zip(self.before, parts, strict=True)]

    @override
    def forward(self, x: Tensor, residual: Tensor, held: Tensor, here: Pass) -> Tensor:
        """The residual [k, H] after this layer, whose attention reads x [k, read]."""
        stream = residual + self.self_attn(x, held, here)
        out: Tensor = stream + self.mlp(self.post_attention_layernorm(stream))
        return out


def turned(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [heads, k, size] turned by their positions: x · cos + (-x₂, x₁) · sin."""
    cos, sin = angles
    lower, upper = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-upper, lower), dim=-1) * sin


@final
@frozen(eq=False)
class Caching:
    """The caches and positions of a head's layers. It holds nothing that is learnt, and so it is no module."""

    shape: Shape
    layers: int
    _rotary: LlamaRotaryEmbedding = field(
        init=False, repr=False, default=Factory(lambda self: self.shape.rotary(), takes_self=True)
    )

    def begin(self, like: Tensor) -> KVCache:
        """A cache that covers nothing, where `like` is and of its dtype."""
        return KVCache(like.new_empty(self.layers, 2, self.shape.kv_heads, 0, self.shape.size))

    def reading(self, past: Past, positions: Tensor, hidden: Tensor | None, like: Tensor) -> tuple[Tensor, Pass]:
        """The buffer of a past's cache, with room for tokens at `positions` [k], and the pass that reads them.

        The past covers them from now on.
        """
        cache, start = past.cache, past.length
        assert isinstance(cache, KVCache)
        cache.length = start
        cache.reserve(start + len(positions))
        if self._rotary.inv_freq.device != like.device:  # it is made on the CPU; it stays where the head is
            self._rotary.to(like.device)
        cos, sin = self._rotary(like, positions[None])
        mask = None if hidden is None else like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        cache.length = start + len(positions)
        past.extend(cache, cache.length)
        return cache.buffer, Pass((cos[0], sin[0]), start, mask)
