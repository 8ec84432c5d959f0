"""A language model with another tokenizer as drafter, through the tokens that both vocabularies share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from attrs import field, frozen
from torch import Tensor

from specflow.asked import rows_of
from specflow.drafters.llm import LLMDrafter
from specflow.guards.checks import MOST, a, calls, does, each, or_none, valid, whole
from specflow.guards.ids import text_of
from specflow.paths import along_paths
from specflow.processors import Processor
from specflow.randomness import Sampling
from specflow.state import Predictor, Proposal, Tokens
from specflow.vocabulary import SharedTokens

_is_predictor = calls("a predictor", "give a CachedPredictor of the drafting model")
_are_shared = a(SharedTokens, "give SharedTokens(Spelling.of(tokenizer), Spelling.of(other_tokenizer))")


def translated(predictor: Predictor, shared: SharedTokens) -> Predictor:
    """A drafting model's predictor over the target's vocabulary: it is asked in the target's ids, and so it answers.

    The text is read as `shared.read` has it, and logits are those of `shared.rows`: a pure function of tokens, as every
    predictor is. The model and its tokenizer stay as they are.

    >>> import torch
    >>> from specflow.vocabulary import Spelling
    >>> def letters(*tokens: bytes) -> Spelling:
    ...     return Spelling(tokens, lambda text: [tokens.index(c.encode()) for c in text])
    >>> shared = SharedTokens(letters(b"a", b"b", b"c"), letters(b"c", b"x", b"a"))
    >>> again = along_paths(lambda tokens: torch.eye(3)[tokens[-1]])  # it bets on the last token
    >>> translated(again, shared)((0, 2), ()).argmax().item()
    2
    """
    _is_predictor("predictor", predictor)
    _are_shared("shared", shared)

    def row(tokens: Tokens) -> Tensor:
        ids = shared.read(tokens)
        # What the drafter knows before it has read a token.
        nothing = torch.zeros(1, len(shared.drafter.tokens), dtype=torch.float32, device="cpu")
        return shared.rows(rows_of(predictor, ids, (), "drafter") if ids else nothing)[0]

    one_by_one = along_paths(row)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        ids = shared.read(tokens)
        if not ids or not all(draft.token in shared.pairs for draft in drafts):
            return one_by_one(tokens, drafts)
        theirs = tuple([Proposal(shared.pairs[draft.token], parent=draft.parent) for draft in drafts])
        return shared.rows(rows_of(predictor, ids, theirs, "drafter"))

    return predict


@final
@frozen
class IntersectionDrafter:
    """Drafts by sampling from a model with another tokenizer: its law, restricted to the tokens that are shared.

    q(x) = q'(x') / Σ q'(y') over the shared tokens y, x' and y' the drafter's ids for them, and then whatever the
    processor makes of it. Drafts carry this q, in the target's ids: sampled text keeps the target's law exactly.

    `predictor` is the drafting model's own, over its own ids, and `context` is how many of them it can read. The draft
    ends where they do. The processor is asked in the target's ids; all else is as in `LLMDrafter`, `widths` too.
    Source: Timor et al. 2502.05202, algorithm 4 (token-level intersection).

    >>> from specflow import Dice, MultinomialProcessor
    >>> from specflow.testing import TableModel
    >>> from specflow.vocabulary import Spelling
    >>> def letters(*tokens: bytes) -> Spelling:
    ...     return Spelling(tokens, lambda text: [tokens.index(c.encode()) for c in text])
    >>> shared = SharedTokens(letters(b"a", b"b", b"c"), letters(b"c", b"x", b"a"))
    >>> drafter = IntersectionDrafter(TableModel(3), shared, MultinomialProcessor(1.0), Dice(), context=4)
    >>> len([draft.token for draft in drafter((0, 2)) if draft.token in (0, 2)])
    3
    """

    predictor: Predictor = field(validator=valid(_is_predictor))
    shared: SharedTokens = field(validator=valid(_are_shared))
    processor: Processor = field(
        validator=valid(does("a processor", "give a Processor, such as GreedyProcessor()", "laws"))
    )
    rng: Sampling = field(validator=valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw")))
    context: int | None = field(default=None, validator=valid(or_none(whole(1, "give the tokens it can read"))))
    source: str = field(default="llm", validator=valid(a(str, "give a name")))
    widths: tuple[int, ...] = field(default=(), validator=valid(each(whole(1, "draft one token at least", MOST))))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        tokens = text_of(tokens)
        read = len(self.shared.read(tokens))
        if read == 0 or (self.context is not None and read > self.context):
            return
        # Each draft is one token to the drafter, too.
        context = None if self.context is None else len(tokens) + self.context - read
        predictor = translated(self.predictor, self.shared)
        drafter = LLMDrafter(predictor, self.processor, self.rng, context, None, self.source, self.widths)
        yield from drafter(tokens)
