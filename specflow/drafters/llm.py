"""A language model as drafter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from attrs import field, frozen

from specflow.asked import laws_of, rows_of
from specflow.checks import a, calls, does, or_none, valid, whole
from specflow.ids import ids_of, text_of
from specflow.processors import Processor
from specflow.random import Sampling, drawn
from specflow.state import Predictor, Proposal, Tokens


@final
@frozen
class LLMDrafter:
    """Drafts by sampling from a model's own processed law, and that law is the q that verification uses.

    `context` is how many tokens the model can read and `vocab_size` how many it knows: once the text is longer, or
    holds a token that the model does not know, it just stops proposing. Without `vocab_size` it knows all, and a long
    text need not be looked through. `DecodeError` for logits that are no row, and for a law that is none.

    Its processor is asked about the text it reads and what it drafted itself. Behind another drafter (`then`) that
    text holds the other's drafts, which a strict automaton may refuse: there give a processor that has a law behind any
    text.
    """

    predictor: Predictor = field(validator=valid(calls("a predictor", "give a CachedPredictor of the drafting model")))
    processor: Processor = field(
        validator=valid(does("a processor", "give a Processor, such as GreedyProcessor()", "laws"))
    )
    rng: Sampling = field(validator=valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw")))
    context: int | None = field(default=None, validator=valid(or_none(whole(1, "give the tokens it can read"))))
    vocab_size: int | None = field(default=None, validator=valid(or_none(whole(1, "give the tokens it knows"))))
    source: str = field(default="llm", validator=valid(a(str, "give a name")))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        tokens = text_of(tokens)
        if self.vocab_size is not None and max(ids_of("tokens", tokens)) >= self.vocab_size:
            return
        while self.context is None or len(tokens) <= self.context:
            logits = rows_of(self.predictor, tokens, 1, "drafter")
            q = laws_of(self.processor, tokens, logits)[1][0]
            token = drawn(self.rng, q, len(tokens))
            yield Proposal(token, q, self.source, logits[0])
            tokens += (token,)
