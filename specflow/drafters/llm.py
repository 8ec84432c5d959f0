"""A language model as drafter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from attrs import field, frozen
from torch import Tensor

from specflow.asked import law_after, rows_of
from specflow.drafters.siblings import drawn_tree
from specflow.errors import unwrap
from specflow.guards.checks import MOST, a, calls, does, each, or_none, valid, whole
from specflow.guards.ids import ids_of, text_of
from specflow.processors import Processor
from specflow.protocols import Limits
from specflow.randomness import Sampling, drawn, q_of
from specflow.state import Predictor, Proposal, Tokens
from specflow.vocabulary import fitted, shared_vocabulary


@final
@frozen
class LLMDrafter:
    """Drafts by sampling from a model's own processed law, and that law is the q that verification uses.

    Drawn with `SharedNoise` drafts are for `Match`: no rule knows their q, and each compares them with its own sample.

    `context` is how many tokens the model can read and `vocab_size` how many it knows: once the text is longer, or
    holds a token that the model does not know, it just stops proposing. Without `vocab_size` it knows all, and a long
    text need not be looked through. `DecodeError` for logits that are not a row, and for what is not a law.

    With `widths` it drafts a tree, level by level, each in one pass: `widths[0]` different tokens after the text,
    `widths[1]` after each of them, and so on; deeper, one after each. Siblings are drawn one after the other
    without replacement; those of a greedy choice are what the processor would choose next.

    Its processor is asked about the text it reads and what it drafted itself; where that says that nothing can follow
    (`DeadEndError`, as `Constrained` does at the end of an answer) it just stops proposing. After another drafter
    (`then`) the text holds the other's drafts, which a strict automaton may refuse: let it do so by that error.

    >>> from itertools import islice
    >>> from specflow import Dice, GreedyProcessor
    >>> from specflow.testing import TableModel
    >>> drafter = LLMDrafter(TableModel(5, seed=1), GreedyProcessor(), Dice())
    >>> [(proposal.token, proposal.q) for proposal in islice(drafter((0,)), 2)]
    [(4, PointMass(token=4)), (2, PointMass(token=2))]
    """

    predictor: Predictor = field(validator=valid(calls("a predictor", "give a CachedPredictor of the drafting model")))
    processor: Processor = field(
        validator=valid(does("a processor", "give a Processor, such as GreedyProcessor()", "laws"))
    )
    rng: Sampling = field(validator=valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw")))
    context: int | None = field(default=None, validator=valid(or_none(whole(1, "give the tokens it can read"))))
    vocab_size: int | None = field(default=None, validator=valid(or_none(whole(1, "give the tokens it knows"))))
    source: str = field(default="llm", validator=valid(a(str, "give a name")))
    widths: tuple[int, ...] = field(default=(), validator=valid(each(whole(1, "draft one token at least", MOST))))

    @classmethod
    def fitting(
        cls, predictor: Predictor, known: Limits, target: Limits, processor: Processor, rng: Sampling
    ) -> LLMDrafter:
        """A drafter for a target over whose vocabulary its own, whose limits are `known`, may be padded otherwise.

        `DecodeError` where the two cannot be one vocabulary.
        """
        vocab_size = unwrap(shared_vocabulary(target, known))
        fit = predictor if vocab_size is None else fitted(predictor, vocab_size)
        return cls(fit, processor, rng, known.context, None if known.vocab_size == vocab_size else known.vocab_size)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        tokens = text_of(tokens)
        if self.vocab_size is not None and max(ids_of("tokens", tokens)) >= self.vocab_size:
            return
        if self.widths:
            yield from self._tree(tokens)
            return
        while self.context is None or len(tokens) <= self.context:
            logits = rows_of(self.predictor, tokens, (), "drafter")
            q = law_after(self.processor, tokens, logits[0])
            if q is None:
                return
            token = drawn(self.rng, q, len(tokens))
            yield Proposal(token, q_of(self.rng, q, len(tokens)), source=self.source, logits=logits[0])
            tokens += (token,)

    def _tree(self, text: Tokens) -> Iterator[Proposal]:
        def rows(drafted: Sequence[Proposal], last: int) -> Tensor:
            return rows_of(self.predictor, text, drafted, "drafter")[-last:]

        levels = None if self.context is None else max(0, self.context - len(text) + 1)
        return drawn_tree(text, rows, self.processor, self.rng, self.widths, self.source, levels)
