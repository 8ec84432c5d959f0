"""Prompt lookup drafts what transformers' own generator drafts, token for token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from specflow import DecodeError, PromptLookup, Tokens


def theirs(tokens: Tokens, n: int, k: int) -> list[int]:
    generator = PromptLookupCandidateGenerator(num_output_tokens=k, max_matching_ngram_size=n, max_length=10_000)
    candidates, _ = generator.get_candidates(torch.tensor([tokens]))
    return candidates[0, len(tokens) :].tolist()


texts = st.integers(1, 5).flatmap(lambda vocabulary: st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=40))


@settings(max_examples=1000, deadline=None)
@given(texts, st.integers(1, 6), st.integers(1, 12))
def test_drafts_are_those_of_transformers(text: list[int], n: int, k: int) -> None:
    tokens = tuple(text)
    assert [proposal.token for proposal in PromptLookup(n, k)(tokens)] == theirs(tokens, n, k)


def test_defaults_are_those_of_transformers() -> None:
    ours, other = PromptLookup(), PromptLookupCandidateGenerator()
    for name in ("max_matching_ngram_size", "num_output_tokens"):
        assert getattr(ours, name) == getattr(other, name)


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(DecodeError, match="max_matching_ngram_size is below 1"):
        PromptLookup(max_matching_ngram_size=0)
    with pytest.raises(DecodeError, match="num_output_tokens is below 1"):
        PromptLookup(num_output_tokens=0)
