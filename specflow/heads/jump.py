"""Jump: one linear map that foretells what the target will hold last, from what some of its layers held.

A model's layers are skipped: h' ≈ C h + E e(x) + b jumps from one token's state to the next one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor
from torch.nn import Embedding, Linear, Module

from specflow.caches import Past
from specflow.guards.checks import MOST, a, whole
from specflow.heads.head import Vocabulary, check_parts


@final
class Jump(Module):
    """A linear predictor: the state after a token is carry(the state before it) + token(its embedding).

    A state stands for what the target holds last, after its final norm, and the target's own head reads it:
    s₁ = C M h + E e(x₁) + b after the text, where h is what the target's layers held side by side; sₖ₊₁ = C sₖ +
    E e(xₖ₊₁) + b after k drafts. It takes two small products for a token, and is fitted without a gradient
    (`specflow.distill.fit_jump`).
    """

    def __init__(
        self,
        hidden: int,
        vocabulary: Vocabulary,
        reads: tuple[int, ...],
        embed_tokens: Embedding,
        lm_head: Module,
    ) -> None:
        check_parts(vocabulary, reads, embed_tokens=embed_tokens, lm_head=lm_head)
        whole(1, "give how many numbers the target holds", MOST)("hidden", hidden)
        hidden = int(hidden)
        a(Embedding, "give a table of tokens")("embed_tokens", embed_tokens)
        super().__init__()
        self.vocabulary, self.reads, self.width = vocabulary, reads, len(reads) * hidden
        self.looks_back, self.ahead = False, None
        self.embed_tokens, self.lm_head = embed_tokens, lm_head
        self.mix = Linear(self.width, hidden, bias=False)
        self.carry = Linear(hidden, hidden, bias=False)
        self.token = Linear(embed_tokens.weight.shape[1], hidden)

    def begin(self) -> None:
        """Nothing is kept."""

    def enter(self, rows: Tensor) -> Tensor:
        """Each of the target's layers side by side, [k, width], mixed into states [k, H]."""
        mixed: Tensor = self.mix(rows.to(self.mix.weight))
        return mixed

    def advance(self, states: Tensor, ids: Tensor, positions: Tensor, past: Past, hidden: Tensor | None) -> Tensor:
        """The states [k, H] after `ids` [k]: see `Head.advance`."""
        after: Tensor = self.carry(states) + self.token(self.embed_tokens(ids).to(states.dtype))
        return after

    def say(self, states: Tensor, depths: Sequence[int]) -> Tensor:
        """Logits [k, D] after `states` [k, H]."""
        logits: Tensor = self.lm_head(states)
        return logits
