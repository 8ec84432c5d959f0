"""Score: one target pass over all drafts. It is the only place that reads the target."""

from __future__ import annotations

from typing import final

from attrs import field, frozen
from torch import Tensor

from specflow.asked import fits, laws_of, looked_at
from specflow.errors import DecodeError
from specflow.guards.checks import a, calls, does, is_id, shown, valid
from specflow.laws import Laws
from specflow.processors import Processor
from specflow.state import Drafted, Predictor, Proposal, Scored

_ORDER = "put the stages in order: Draft, Score, Judge, Adjust, commit, advance"
a_draft = a(Drafted, _ORDER)
a_score = a(Scored, _ORDER)
is_target = valid(calls("a predictor", "give a function of (text, drafts), such as a CachedPredictor"))
is_processor = valid(
    does("a processor", "give a Processor; interop.ProcessorList makes one of transformers' list", "laws")
)


@final
@frozen
class Score:
    """Reads what the target says after the text and after each draft, in one pass.

    Laws are made of its logits by `processor`, along a stretch of drafts at once where the processor is total, and one
    by one as a rule goes on where it is not. `DecodeError` for a draft outside the vocabulary, for logits that are no
    rows [n + 1, V], and for a law that is none, where a rule asks for it.
    """

    target: Predictor = field(validator=is_target)
    processor: Processor = field(validator=is_processor)

    def __call__(self, drafted: Drafted, /) -> Scored:
        a_draft("drafted", drafted)
        text, proposals = drafted.state.tokens, drafted.proposals
        if not all(map(_is_draft, proposals)):
            raise DecodeError("drafted", "a draft is no proposal of a token id", shown(proposals), "propose plain ints")
        logits = looked_at(self.target(text, proposals), len(proposals) + 1, self.target, len(text) + len(proposals))
        vocab_size = logits.shape[1]
        for proposal in proposals:
            if proposal.token >= vocab_size:
                fits(proposal.token, proposal.source, vocab_size)

        def make(way: tuple[int, ...]) -> Laws:
            # Of the logits alone: with a hold on what is returned this would be a cycle, which keeps them alive.
            return laws_of(self.processor, drafted.text(way[-1]), _rows(logits, way))

        return Scored(drafted, logits, make)


def _rows(logits: Tensor, way: tuple[int, ...]) -> Tensor:
    """`Scored.rows`, before there is one."""
    first, last = way[0] + 1, way[-1] + 1
    return logits[first : last + 1] if last - first == len(way) - 1 else logits[[i + 1 for i in way]]


def _is_draft(value: object) -> bool:
    return isinstance(value, Proposal) and is_id(value.token)
