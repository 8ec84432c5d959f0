"""Medusa: heads that each guess another token ahead, all from what the target held at one place.

Source: Cai et al. 2401.10774, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, ModuleList, Sequential
from typing_extensions import override

from specflow.caches import Past
from specflow.guards.checks import MOST, whole
from specflow.heads.head import Vocabulary, check_parts


@final
class ResBlock(Module):
    """x + silu(linear(x))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = Linear(size, size)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Of x [k, H]."""
        return x + F.silu(self.linear(x))


@final
class Medusa(Module):
    """Medusa's heads: the i-th says what stands i places after the next token, whatever is drafted between.

    They read what the target held last, after its final norm. So all drafts have the state of the text, and a tree of
    them is a part of the cartesian product of the heads' guesses.
    """

    def __init__(
        self, hidden: int, vocabulary: Vocabulary, reads: tuple[int, ...], heads: int, blocks: int, says: int
    ) -> None:
        check_parts(vocabulary, reads)
        for name, size in (("hidden", hidden), ("heads", heads), ("says", says)):
            whole(1, "give 1 or more", MOST)(name, size)
        whole(0, "give 0 or more", MOST)("blocks", blocks)
        hidden, heads, blocks, says = map(int, (hidden, heads, blocks, says))
        super().__init__()
        self.vocabulary, self.reads, self.width = vocabulary, reads, hidden
        self.looks_back, self.ahead = False, heads
        self.heads = ModuleList(
            [
                Sequential(*[ResBlock(hidden) for _ in range(blocks)], Linear(hidden, says, bias=False))
                for _ in range(heads)
            ]
        )

    def begin(self) -> None:
        """Nothing is kept."""

    def enter(self, rows: Tensor) -> Tensor:
        """What the target held is the state."""
        return rows.to(next(self.heads.parameters()))

    def advance(self, states: Tensor, ids: Tensor, positions: Tensor, past: Past, hidden: Tensor | None) -> Tensor:
        """The states before the ids: what is drafted changes none."""
        return states

    def say(self, states: Tensor, depths: Sequence[int]) -> Tensor:
        """Logits [k, D]: drafts that are as deep are guessed by the same head, from the same state."""
        logits = {depth: self.heads[depth](states[:1])[0] for depth in dict.fromkeys(depths)}
        return torch.stack([logits[depth] for depth in depths])
