"""Recycle: whatever the target said in a step is kept, of rejected drafts too."""

from __future__ import annotations

from typing import final

import torch
from attrs import field, frozen
from torch import Tensor

from specflow.drafters.recycling import Recycled
from specflow.guards.checks import a, valid
from specflow.stages.ngram import top_logits
from specflow.stages.order import a_commitment
from specflow.stages.rows import Rows
from specflow.state import TEXT, Committed, Tokens


@final
@frozen(eq=False)
class Recycle:
    """Teaches `table` every row of logits that this step read: after the text, and after each draft.

    A row is the target's whether its draft stands or not. Those of drafts that stand are learned last, so that they
    win over others of the same context. The step itself is handed on unchanged. Stepping one state twice teaches its
    rows twice, which changes nothing that the first time did not.

    >>> from specflow import Dice, GreedyProcessor, ngram_step, run, start
    >>> from specflow.drafters import Recycled, propose_nothing
    >>> from specflow.testing import TableModel
    >>> table = Recycled(5, k=1)
    >>> step = ngram_step(propose_nothing, TableModel(5, seed=1), GreedyProcessor(), Dice(), Recycle(table))
    >>> run(step, start((0,), 2).unwrap()).state.output, [token for token, chance in table.after((0,))]
    ((4, 2), [4])
    """

    table: Recycled = field(validator=valid(a(Recycled, "give Recycled(vocab_size)")))

    @property
    def rows(self) -> Rows:
        """Those after rejected drafts, too."""
        return Rows(self.table.k)

    def __call__(self, committed: Committed, /) -> Committed:
        a_commitment("committed", committed)
        verified = committed.adjusted.verified
        drafted, tail = verified.drafted, self.table.n
        contexts: dict[int, Tokens] = {TEXT: drafted.state.tokens[-tail:]}
        for i, (proposal, parent) in enumerate(zip(drafted.proposals, drafted.parents, strict=True)):
            contexts[i] = (*contexts[parent], proposal.token)[-tail:]
        rows = likeliest(verified.scored.logits, self.table.k)
        stands = {TEXT, *verified.path}
        order = sorted(contexts, key=lambda i: (i in stands, i))
        self.table.learn([contexts[i] for i in order], [rows[i + 1] for i in order])
        return committed


def likeliest(logits: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """The `top` tokens with the largest of `logits` [k, V] in each row, and their probabilities under softmax.

    Of a row that is not finite, and of tokens with a logit of -∞, there are none.

    >>> likeliest(torch.tensor([[1.0, 1.0, -torch.inf], [torch.nan, 0.0, 0.0]]), 2)
    [[(0, 0.5), (1, 0.5)], []]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values, tokens = top_logits(logits, top)
    chances = (values - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return [
        [(token, chance) for token, chance in zip(*row, strict=True) if 0 < chance <= 1.001]
        for row in zip(tokens.tolist(), chances.tolist(), strict=True)
    ]
