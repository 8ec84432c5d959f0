"""Prompt lookup: the plain baseline that people know, as transformers has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import final

from attrs import field, frozen

from specflow.distribution import PointMass
from specflow.guards.checks import a, drafts, valid
from specflow.guards.ids import ids_of
from specflow.prefix import tokens_of
from specflow.state import Proposal, Tokens


@final
@frozen
class PromptLookup:
    """Drafts what followed the first occurrence of the text's last n tokens, for the largest n that has one.

    n goes from `max_matching_ngram_size` down to 1, and up to `num_output_tokens` tokens are copied, as far as the text
    goes. Both are at least 1, else `DecodeError`, and so for a text that holds no ids. Names and defaults are those of
    transformers' `PromptLookupCandidateGenerator`, and so are the drafts, token for token; each call scans the text.
    Threads may share it.
    Source: Saxena, Prompt Lookup Decoding, 2023.

    >>> [proposal.token for proposal in PromptLookup(num_output_tokens=3)((1, 2, 7, 1, 2, 8, 1, 2))]
    [7, 1, 2]
    """

    max_matching_ngram_size: int = field(default=2, validator=valid(drafts))
    num_output_tokens: int = field(default=10, validator=valid(drafts))
    source: str = field(default="lookup", validator=valid(a(str, "name the drafter")))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        tokens = tokens_of(tokens)
        longest = min(self.max_matching_ngram_size, len(tokens))
        ids_of("tokens", tokens[len(tokens) - longest :])
        for n in range(longest, 0, -1):
            end = _first_end(tokens, n)
            if end is not None:
                for token in ids_of("tokens", tokens[end : end + self.num_output_tokens]):
                    yield Proposal(token, PointMass(token), source=self.source)
                return


def _first_end(tokens: Tokens, n: int) -> int | None:
    """Where the first occurrence of the last n tokens ends, if it ends before the text does."""
    ending, end = tokens[-n:], n - 1
    with suppress(ValueError):  # the last token does not occur again
        while True:
            end = tokens.index(ending[-1], end, len(tokens) - 1) + 1
            if tokens[end - n : end] == ending:
                return end
    return None
