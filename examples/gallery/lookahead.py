"""Lookahead decoding: a line of guesses is improved by each pass of the target (Fu et al. 2402.02057).

The guesses hang in the tree as a branch of their own. The target's rows after them are the next guesses (a Jacobi
iteration), and the n-grams that they leave behind are drafted where the text comes to their first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import final

from attrs import field, frozen

from specflow import TEXT, Fixed, PointMass, Proposal, Step, Tokens, ngram_step
from specflow.state import Committed
from specflow.testing import CASES, World, certify


@final
@frozen(eq=False)
class Lookahead:
    """A drafter, and the stage `learn` that reads its guesses' rows. What it knows changes drafts, and no text."""

    width: int = 3
    line: list[int] = field(factory=lambda: [0, 0, 0])
    pool: dict[int, list[Tokens]] = field(factory=dict)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        for gram in reversed(self.pool.get(tokens[-1], [])[-2:]):
            for i, token in enumerate(gram):
                yield Proposal(token, parent=TEXT, source="pool") if not i else Proposal(token, source="pool")
        for i, token in enumerate(self.line[: self.width]):
            yield Proposal(token, parent=TEXT, source="line") if not i else Proposal(token, source="line")

    def learn(self, committed: Committed, /) -> Committed:
        """The likeliest token after each guess is the next guess; guess and followers go into the pool."""
        verified = committed.adjusted.verified
        drafts = verified.drafted.proposals
        best = verified.scored.logits.argmax(-1).tolist()
        guesses = [i for i, draft in enumerate(drafts) if draft.source == "line"]
        for i, j in pairwise(guesses):
            self.pool.setdefault(drafts[i].token, []).append((best[i + 1], best[j + 1]))
        if guesses:
            self.line[:] = [best[0], *[best[i + 1] for i in guesses]][: self.width]
        return committed


def decoder(world: World) -> Step:
    """`ngram_step` is speculative decoding with a stage that learns."""
    ahead = Lookahead()
    return ngram_step(ahead, world.target, world.processor, world.rng, ahead.learn, Fixed(4))


def check() -> None:
    """Exact, sampled and greedy: guesses of any kind are."""
    certify(decoder, cases=CASES[:8])
