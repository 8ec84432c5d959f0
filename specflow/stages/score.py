"""Score: one target pass over all drafts. It is the only place that reads the target."""

from __future__ import annotations

from typing import final

from attrs import field, frozen

from specflow.asked import fits, laws_when_asked, rows_of
from specflow.errors import DecodeError
from specflow.guards.checks import calls, does, is_id, shown, valid
from specflow.laws import Laws
from specflow.processors import Processor
from specflow.stages.order import a_draft
from specflow.state import Drafted, Predictor, Scored, rows_along


@final
@frozen
class Score:
    """Reads what the target says after the text and after each draft, in one pass.

    Laws are made of its logits by `processor`, along a stretch of drafts at once where the processor is total, and one
    by one as a rule goes on where it is not. `DecodeError` for a draft outside the vocabulary, for logits that are no
    rows [n + 1, V], and for a law that is not one, where a rule asks for it.

    >>> from specflow import GreedyProcessor, start
    >>> from specflow.state import TEXT, Proposal
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start((0,), 9).unwrap(), (Proposal(4), Proposal(2)))
    >>> scored = Score(TableModel(5, seed=1), GreedyProcessor())(drafted)
    >>> scored.logits.shape, scored.law(TEXT), scored.law(0)
    (torch.Size([3, 5]), PointMass(token=4), PointMass(token=2))
    """

    target: Predictor = field(
        validator=valid(calls("a predictor", "give a function of (text, drafts), such as a CachedPredictor"))
    )
    processor: Processor = field(
        validator=valid(
            does("a processor", "give a Processor; interop.ProcessorList makes one of transformers' list", "laws")
        )
    )

    def __call__(self, drafted: Drafted, /) -> Scored:
        a_draft("drafted", drafted)
        for proposal in drafted.proposals:
            if not is_id(proposal.token):
                received = shown(proposal)
                raise DecodeError("drafted", "a draft is not a proposal of a token id", received, "propose plain ints")
        logits = rows_of(self.target, drafted.state.tokens, drafted.proposals)
        vocab_size = logits.shape[1]
        for proposal in drafted.proposals:
            fits(proposal, vocab_size)

        def make(way: tuple[int, ...]) -> Laws:
            # Of the logits alone: with a hold on what is returned this would be a cycle, which keeps them alive.
            return laws_when_asked(self.processor, drafted.text(way[-1]), rows_along(logits, way))

        return Scored(drafted, logits, make)
