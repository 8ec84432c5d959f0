"""A language model as drafter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from attrs import frozen

from specflow.asked import laws_of, rows_of
from specflow.processors import Processor
from specflow.random import Sampling, drawn
from specflow.state import Predictor, Proposal, Tokens


@final
@frozen
class LLMDrafter:
    """Drafts by sampling from a model's own processed law, and that law is the q that verification uses.

    `context` is how many tokens the model can read and `vocab_size` how many it knows: once the text is longer, or
    holds a token that the model does not know, it just stops proposing. Without `vocab_size` it knows all, and a long
    text need not be looked through.
    """

    predictor: Predictor
    processor: Processor
    rng: Sampling
    context: int | None = None
    vocab_size: int | None = None
    source: str = "llm"

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        if self.vocab_size is not None and max(tokens) >= self.vocab_size:
            return
        while self.context is None or len(tokens) <= self.context:
            logits = rows_of(self.predictor, tokens, 1, "drafter")
            q = laws_of(self.processor, tokens, logits)[1][0]
            token = drawn(self.rng, q, len(tokens))
            yield Proposal(token, q, self.source, logits[0])
            tokens += (token,)
