"""`longest` compares the lengths of drafts, so it takes certain drafters only; see `drafters/combine.py`."""

from __future__ import annotations

from typing import assert_type

from specflow import Drafter, LLMDrafter, PromptLookup, SuffixDrafter, at_most, first_of, longest, then
from specflow.drafters import propose_nothing
from specflow.state import CertainDrafter


def wrong(llm: LLMDrafter, suffix: SuffixDrafter) -> None:
    longest(suffix, llm)  # type: ignore[arg-type]
    longest(suffix, then(suffix, llm))  # type: ignore[arg-type]
    longest(suffix, at_most(3, llm))  # type: ignore[arg-type]
    certain: CertainDrafter = first_of(suffix, llm)  # type: ignore[arg-type]
    longest(certain)


def right(llm: LLMDrafter, suffix: SuffixDrafter) -> None:
    assert_type(longest(suffix, PromptLookup(), propose_nothing), CertainDrafter)
    assert_type(first_of(suffix, PromptLookup()), CertainDrafter)
    longest(then(at_most(3, suffix), PromptLookup()), first_of(suffix, propose_nothing))
    mixed: Drafter = first_of(suffix, then(at_most(3, suffix), llm))
    first_of(mixed, llm)
