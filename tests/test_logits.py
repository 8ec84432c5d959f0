"""Guesses from the last row: each keys a retrieval, and all of them are one tree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import final

import pytest

from specflow import (
    TEXT,
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    NGramDrafter,
    NGramStorage,
    PointMass,
    PromptLookup,
    Proposal,
    SuffixDrafter,
    Tokens,
    ngram_step,
    run,
    start,
)
from specflow.drafters import Corpus, CorpusTree, LogitTree, Recycled, propose_nothing
from specflow.drafters.logits import GOES_ON
from specflow.stages import Recycle
from specflow.state import CertainDrafter, parents_of
from tests.toys import oracle, tiny_llama


def taught(*rows: tuple[Tokens, list[tuple[int, float]]]) -> Recycled:
    table = Recycled(100)
    table.learn([context for context, _ in rows], [row for _, row in rows])
    return table


def paths(drafts: list[Proposal[PointMass]]) -> list[Tokens]:
    found: list[Tokens] = []
    for draft, parent in zip(drafts, parents_of(drafts), strict=True):
        found.append((*(found[parent] if parent != TEXT else ()), draft.token))
    return found


def test_guesses_are_the_other_tokens_of_the_row_before() -> None:
    table = taught(((4, 5), [(6, 0.6), (7, 0.2), (8, 0.1), (9, 0.05)]))
    drafts = list(LogitTree(table, propose_nothing, guesses=(0.2, 0.1))((4, 5, 6)))
    assert [(draft.token, draft.parent, draft.chance, draft.source) for draft in drafts] == [
        (7, TEXT, 0.2, "logits"),
        (8, TEXT, 0.1, "logits"),
    ]
    # 6 was drawn, and another one is the likeliest: that one is guessed, too.
    drafts = list(LogitTree(table, propose_nothing, guesses=(0.2, 0.1))((4, 5, 8)))
    assert [draft.token for draft in drafts] == [6, 7]
    assert list(LogitTree(table, propose_nothing)((5,))) == []  # there is no row before


def test_the_row_before_is_that_of_the_longest_context() -> None:
    table = taught(((4, 5), [(7, 0.6)]), ((9, 5), [(8, 0.6)]))
    assert [draft.token for draft in LogitTree(table, propose_nothing)((4, 5, 6))] == [7]


@final
class Asked:
    """Knows followers of every text that has a last token."""

    def after(self, tokens: Tokens, /) -> list[tuple[int, float]]:
        """The next number."""
        return [(tokens[-1] + 1, 0.5)]


def test_nobody_is_asked_what_follows_nothing() -> None:
    assert [draft.token for draft in LogitTree(Asked(), propose_nothing)((5, 9))] == [6]
    assert list(LogitTree(Asked(), propose_nothing)((5,))) == []


def test_each_guess_keys_a_retrieval() -> None:
    table = taught(((5,), [(6, 0.6), (7, 0.2), (8, 0.1)]))
    text = (7, 1, 2, 8, 3, 4, 6, 9, 5, 6)
    drafts = list(LogitTree(table, PromptLookup(num_output_tokens=2), guesses=(0.4, 0.3))(text))
    assert set(paths(drafts)) == {(9,), (9, 5), (7,), (7, 1), (7, 1, 2), (8,), (8, 3), (8, 3, 4)}
    chances = dict(zip(paths(drafts), [draft.chance for draft in drafts], strict=True))
    assert chances[9, 5] == GOES_ON**2
    assert chances[7, 1, 2] == pytest.approx(0.4 * GOES_ON**2)
    assert {draft.source for draft in drafts} == {"logits", "lookup"}


def test_a_guess_that_is_retrieved_too_is_drafted_once() -> None:
    table = taught(((5,), [(6, 0.6), (9, 0.2)]))
    text = (6, 9, 3, 4, 5, 6)
    drafts = list(LogitTree(table, PromptLookup(num_output_tokens=3), guesses=(0.4,))(text))
    assert paths(drafts) == [(9,), (9, 3), (9, 3, 4), (9, 3, 4, 5)]  # after the text, and one more after the guess


RETRIEVERS: dict[str, CertainDrafter] = {
    "lookup": PromptLookup(3),
    "suffix": SuffixDrafter(),
    "tree": CorpusTree(Corpus.of([Random(5).choices(range(6), k=90)], 6)),
    "nothing": propose_nothing,
}


@pytest.mark.parametrize("name", RETRIEVERS)
@pytest.mark.parametrize("seed", range(10))
def test_it_is_a_tree_of_all_that_is_retrieved(name: str, seed: int) -> None:
    random = Random(seed)
    text = tuple(random.choices(range(6), k=20))
    row = [(token, 0.5 / 2**rank) for rank, token in enumerate(random.sample(range(6), 4))]
    retrieve = RETRIEVERS[name]
    drafts = list(LogitTree(taught((text[:-1], row)), retrieve, guesses=(0.2, 0.1, 0.05))(text))
    guesses = [token for token, _ in row if token != text[-1]][:3]
    expected = set(paths([*retrieve(text)]))
    for guess in guesses:
        expected |= {(guess,), *((guess, *path) for path in paths([*retrieve((*text, guess))]))}
    assert set(paths(drafts)) == expected
    assert len(drafts) == len(expected)
    chances = [draft.chance or 0.0 for draft in drafts]
    for draft in drafts:
        assert draft.parent == TEXT or (draft.chance or 0.0) <= chances[draft.parent]


def test_no_more_is_retrieved_than_is_drafted() -> None:
    asked: list[Tokens] = []

    def counting(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        asked.append(tokens)
        return iter(())

    drafter = LogitTree(taught(((1,), [(3, 0.5), (4, 0.2), (5, 0.1)])), counting, guesses=(0.3, 0.2))
    list(islice(drafter((1, 2)), 2))
    assert asked == [(1, 2), (1, 2, 3)]


@pytest.mark.parametrize(
    "retrieve", [lambda tokens: None, lambda tokens: iter([3]), lambda tokens: iter([Proposal(-1)])]
)
def test_a_retriever_that_drafts_nonsense_is_refused(retrieve: CertainDrafter) -> None:
    with pytest.raises(DecodeError):
        list(LogitTree(Recycled(4), retrieve)((1, 2)))


def test_the_text_is_the_targets_and_storages_may_be_asked() -> None:
    prompt, target = (3, 4, 5, 6), tiny_llama(21, vocab_size=24, layers=1)
    greedy, table, storage = oracle(prompt, target, 24), Recycled(24), NGramStorage(3, 24)
    storage.initialize([*prompt, *greedy])
    for retrieve, most in ((NGramDrafter(storage), 8), (PromptLookup(3), 23)):
        predictor = CachedPredictor(target)
        step = ngram_step(
            LogitTree(table, retrieve), predictor, GreedyProcessor(), Dice(), Recycle(table), Fixed(8), (predictor,)
        )
        state = run(step, start(prompt, 24).unwrap()).state
        assert list(state.output) == greedy
        assert state.tally.steps <= most
