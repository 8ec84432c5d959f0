"""Multi-token prediction: the module that a model was trained with to guess a token further ahead.

transformers leaves it out when it loads such a model. It is a decoder layer of the model's own kind, which reads
[embedding; state] mixed into one.
Source: DeepSeek-AI 2412.19437, section 2.2; the other families after their own checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module
from transformers import DynamicCache

from specflow.caches import Past
from specflow.guards.checks import MOST, a, calls, flag, whole
from specflow.heads.head import Vocabulary, check_parts


@final
class MTP(Module):
    """A state is the layer of eh_proj([enorm(embedding); hnorm(the state before it)]), and the target's head reads it.

    It reads what the target held last, after its final norm. `layer`, `rotary` and the norms, made by `norm()`, are of
    transformers' own classes for this model. Where it `recycles_normed`, a draft goes on from the state after the last
    norm (Qwen3-Next), else from that before it (DeepSeek-V3, GLM-4.5).
    """

    def __init__(
        self,
        hidden: int,
        vocabulary: Vocabulary,
        reads: tuple[int, ...],
        embed_tokens: Embedding,
        lm_head: Module,
        layer: Module,
        norm: Callable[[], Module],
        rotary: Module,
        recycles_normed: bool,
    ) -> None:
        check_parts(vocabulary, reads, embed_tokens=embed_tokens, lm_head=lm_head, layer=layer, rotary=rotary)
        whole(1, "give how many numbers the target holds", MOST)("hidden", hidden)
        hidden = int(hidden)
        calls("what makes norms", "give a function of nothing")("norm", norm)
        flag("recycles_normed", recycles_normed)
        norms = [norm(), norm(), norm()]
        for made in norms:
            a(Module, "return a module from it")("norm", made)
        super().__init__()
        self.vocabulary, self.reads, self.width = vocabulary, reads, hidden
        self.looks_back, self.ahead, self.recycles_normed = True, None, recycles_normed
        self.embed_tokens, self.lm_head, self.rotary_emb = embed_tokens, lm_head, rotary
        self.enorm, self.hnorm, self.norm = norms
        self.eh_proj = Linear(2 * hidden, hidden, bias=False)
        self.layer = layer

    def begin(self) -> DynamicCache:
        """The cache of a text of which nothing was read."""
        return DynamicCache()

    def enter(self, rows: Tensor) -> Tensor:
        """What the target held is a state already."""
        return rows.to(self.eh_proj.weight)

    def advance(self, states: Tensor, ids: Tensor, positions: Tensor, past: Past, hidden: Tensor | None) -> Tensor:
        """The states [k, H] after `ids` [k]: see `Head.advance`."""
        parts = self.enorm(self.embed_tokens(ids).to(states.dtype)), self.hnorm(states)
        stream = self.eh_proj(torch.cat(parts, dim=-1))[None]
        mask = None
        if hidden is not None:
            mask = stream.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(stream.dtype).min)[None, None]
        after: Tensor = self.layer(
            stream,
            position_embeddings=self.rotary_emb(stream, positions[None]),
            attention_mask=mask,
            position_ids=positions[None],
            cache=past.cache,
        )[0]
        past.extend(past.cache, past.length + len(ids))
        return self._normed(after) if self.recycles_normed else after

    def say(self, states: Tensor, depths: Sequence[int]) -> Tensor:
        """Logits [k, D] after `states` [k, H]."""
        logits: Tensor = self.lm_head(states if self.recycles_normed else self._normed(states))
        return logits

    def _normed(self, states: Tensor) -> Tensor:
        normed: Tensor = self.norm(states)
        return normed
