"""EAGLE: layers that go on from what the target held, token by token, and say what may follow.

Source: Li et al. 2401.15077 (EAGLE), 2406.16858 (EAGLE-2, whose heads are EAGLE's), 2503.01840 (EAGLE-3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import Embedding, Linear, Module, ModuleList

from specflow.caches import KVCache, Past
from specflow.guards.checks import MOST, a, flag, valid, whole
from specflow.heads.head import Vocabulary, check_parts
from specflow.heads.layer import Caching, Layer, Norm, Shape

_flag = valid(flag)


@final
class Eagle(Module):
    """EAGLE's head: the state after a token is what its layers make of fc([embedding; the state before it]).

    A state stands for what the target holds last, after its final norm, and the target's own head reads it. The first
    of the layers has no norm before its attention.
    """

    def __init__(
        self,
        shape: Shape,
        vocabulary: Vocabulary,
        reads: tuple[int, ...],
        embed_tokens: Embedding,
        lm_head: Module,
        depth: int = 1,
        bias: bool = True,
    ) -> None:
        check_parts(vocabulary, reads, embed_tokens=embed_tokens, lm_head=lm_head)
        _check_layers(shape, depth, bias)
        super().__init__()
        self.vocabulary, self.reads, self.width = vocabulary, reads, shape.hidden
        self.looks_back, self.ahead = True, None
        self.embed_tokens, self.lm_head = embed_tokens, lm_head
        self.fc = Linear(2 * shape.hidden, shape.hidden, bias=bias)
        self.layers = ModuleList([Layer(shape, shape.hidden, ["input_layernorm"] * (i > 0)) for i in range(depth)])
        self.caching = Caching(shape, depth)

    def begin(self) -> KVCache:
        """The cache of a text of which nothing was read."""
        return self.caching.begin(self.fc.weight)

    def enter(self, rows: Tensor) -> Tensor:
        """What the target held is a state already."""
        return rows.to(self.fc.weight)

    def advance(self, states: Tensor, ids: Tensor, positions: Tensor, past: Past, hidden: Tensor | None) -> Tensor:
        """The states [k, H] after `ids` [k]: see `Head.advance`."""
        stream: Tensor = self.fc(torch.cat((self.embed_tokens(ids).to(states.dtype), states), dim=-1))
        held, here = self.caching.reading(past, positions, hidden, stream)
        for i, layer in enumerate(_own(self.layers)):
            stream = layer(layer.normed(stream)[0], stream, held[i], here)
        return stream

    def say(self, states: Tensor, depths: Sequence[int]) -> Tensor:
        """Logits [k, D] after `states` [k, H]."""
        logits: Tensor = self.lm_head(states)
        return logits


@final
@frozen
class Norms:
    """Where an EAGLE-3 head norms what others leave as it is.

    `before_residual`: what the first layer adds to is the normed state. `before_fc`: what the target held is normed as
    a whole before it is mixed; `each`: that of each of its layers by itself. `output`: a state is the normed one.
    """

    before_residual: bool = field(default=False, validator=_flag)
    before_fc: bool = field(default=False, validator=_flag)
    each: bool = field(default=False, validator=_flag)
    output: bool = field(default=False, validator=_flag)


@final
class Eagle3(Module):
    """EAGLE-3: states are mixed from several of the target's layers, and the first layer reads [embedding; state].

    Its own head says tokens of a vocabulary of its own, which may be a part of the target's.
    """

    def __init__(
        self,
        shape: Shape,
        vocabulary: Vocabulary,
        reads: tuple[int, ...],
        width: int,
        embed_tokens: Embedding,
        lm_head: Module,
        depth: int = 1,
        norms: Norms = Norms(),
        bias: bool = False,
    ) -> None:
        check_parts(vocabulary, reads, embed_tokens=embed_tokens, lm_head=lm_head)
        _check_layers(shape, depth, bias)
        whole(1, "give how many numbers it reads at a token", MOST)("width", width)
        depth, width = int(depth), int(width)
        a(Norms, "give Norms()")("norms", norms)
        super().__init__()
        self.vocabulary, self.reads, self.width = vocabulary, reads, width
        self.looks_back, self.ahead, self.norms = True, None, norms
        self.embed_tokens, self.lm_head = embed_tokens, lm_head
        each = width // len(reads)
        self.fc = Linear(width, shape.hidden, bias=bias)
        self.input_norm = Norm(width, shape.epsilon) if norms.before_fc else None
        self.fc_norm = ModuleList([Norm(each, shape.epsilon) for _ in reads]) if norms.each else None
        first = Layer(shape, 2 * shape.hidden, ("input_layernorm", "hidden_norm"))
        further = [Layer(shape, shape.hidden, ("input_layernorm",)) for _ in range(depth - 1)]
        self.layers = ModuleList([first, *further])
        self.norm = Norm(shape.hidden, shape.epsilon)
        self.caching = Caching(shape, depth)

    def begin(self) -> KVCache:
        """The cache of a text of which nothing was read."""
        return self.caching.begin(self.fc.weight)

    def enter(self, rows: Tensor) -> Tensor:
        """Each of the target's layers side by side, [k, width], mixed into states [k, H]."""
        rows = rows.to(self.fc.weight)
        if self.input_norm is not None:
            rows = self.input_norm(rows)
        if self.fc_norm is not None:
            parts = rows.chunk(len(self.fc_norm), dim=-1)
            rows = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        mixed: Tensor = self.fc(rows)
        return mixed

    def advance(self, states: Tensor, ids: Tensor, positions: Tensor, past: Past, hidden: Tensor | None) -> Tensor:
        """The states [k, H] after `ids` [k]: see `Head.advance`."""
        held, here = self.caching.reading(past, positions, hidden, states)
        first, *further = _own(self.layers)
        parts = first.normed(self.embed_tokens(ids).to(states.dtype), states)
        stream: Tensor = parts[1] if self.norms.before_residual else states
        stream = first(torch.cat(parts, dim=-1), stream, held[0], here)
        for i, layer in enumerate(further, 1):
            stream = layer(layer.normed(stream)[0], stream, held[i], here)
        return self.norm(stream) if self.norms.output else stream

    def say(self, states: Tensor, depths: Sequence[int]) -> Tensor:
        """Logits [k, D] after `states` [k, H]."""
        logits: Tensor = self.lm_head(states if self.norms.output else self.norm(states))
        return logits


def _check_layers(shape: object, depth: object, bias: object) -> None:
    a(Shape, "give Shape(hidden, inner, heads, kv_heads, size)")("shape", shape)
    whole(1, "give one layer at least", MOST)("depth", depth)
    flag("bias", bias)


def _own(layers: ModuleList) -> list[Layer]:
    """The layers, which are of our own kind."""
    return [layer for layer in layers if isinstance(layer, Layer)]
