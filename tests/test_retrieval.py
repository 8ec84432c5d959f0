"""Drafts from a corpus: the suffix array against a search through all texts, and its file against damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from specflow import (
    TEXT,
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    LookupTree,
    Tokens,
    run,
    speculative_step,
    start,
)
from specflow.drafters import Corpus, CorpusTree
from specflow.drafters import retrieval as module
from specflow.drafters.followers import trust
from specflow.drafters.retrieval import DEPTH, END, FORMAT
from tests.toys import oracle, tiny_llama

texts = st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=5).filter(any)
endings = st.lists(st.integers(0, 3), max_size=8).map(tuple)


def followed(texts_of: Sequence[Sequence[int]], text: Tokens, longest: int) -> tuple[int, list[list[int]]]:
    """The longest ending of a text that occurs and goes on, and all that follows it wherever it occurs: looked for."""
    for length in range(min(longest, len(text)), 0, -1):
        found = [
            list(each[end:])
            for each in texts_of
            for end in range(length, len(each))
            if tuple(each[end - length : end]) == text[-length:]
        ]
        if found:
            return length, found
    return 0, []


@given(texts, endings, st.integers(1, 6))
def test_the_longest_ending_is_found_wherever_it_occurs(texts_of: list[list[int]], text: Tokens, longest: int) -> None:
    corpus = Corpus.of(texts_of, 4)
    length, places = corpus.find(text, longest)
    rests = [corpus.tokens[place : place + corpus.tokens[place:].tolist().index(END)].tolist() for place in places]
    expected_length, expected = followed(texts_of, text, longest)
    assert length == expected_length
    assert sorted(rests) == sorted(expected)
    assert rests == sorted(rests, key=lambda rest: [*rest[:8], END])  # in the order of what follows
    said = dict(corpus.after(text))
    all_length, every = followed(texts_of, text, DEPTH)
    counted = Counter(rest[0] for rest in every)
    assert said == {token: pytest.approx(trust(all_length) * n / len(every)) for token, n in counted.items()}


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_is_of_the_most_frequent_continuations(seed: int) -> None:
    random = Random(seed)
    texts_of = [random.choices(range(3), k=40) for _ in range(4)]
    text = tuple(random.choices(range(3), k=6))
    length, rests = followed(texts_of, text, 16)
    drafts = list(islice(CorpusTree(Corpus.of(texts_of, 3))(text), 20))
    paths: list[Tokens] = []
    for draft in drafts:
        path = (*(paths[draft.parent] if draft.parent != TEXT else ()), draft.token)
        here = sum(tuple(rest[: len(path)]) == path for rest in rests)
        before = sum(tuple(rest[: len(path) - 1]) == path[:-1] for rest in rests)
        above = 1.0 if draft.parent == TEXT else drafts[draft.parent].chance
        assert above is not None
        assert draft.chance == pytest.approx(above * here / before * trust(length + len(path) - 1))
        paths.append(path)
    chances = [draft.chance for draft in drafts]
    assert chances == sorted(chances, reverse=True)  # type: ignore[type-var] # all have one
    assert len(set(paths)) == len(paths)
    every = {tuple(rest[:depth]) for rest in rests for depth in range(1, len(rest) + 1)}
    assert set(paths) <= every
    assert len(paths) == min(20, len(every))


def test_of_many_places_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLACES", 8)
    corpus = Corpus.of([[0, 1] * 30, [0, 2] * 10], 3)
    found = corpus.find((2, 0), longest=1)
    assert (found.length, len(found.places)) == (1, 8)
    assert corpus.after((1, 0)) == [(1, trust(2))]
    drafts = islice(CorpusTree(corpus, longest=1)((2, 0)), 4)
    assert {draft.token: draft.chance for draft in drafts if draft.parent == TEXT} == {
        1: 0.75 * trust(1),
        2: 0.25 * trust(1),
    }


def test_of_many_followers_the_most_frequent_are_told_apart() -> None:
    corpus = Corpus.of([[0, token] for token in range(1, 12) for _ in range(token)], 12)
    best = range(11, 11 - module.FOLLOWERS, -1)
    said = corpus.after((0,))
    assert [token for token, _ in said] == [*best]
    assert [chance for _, chance in said] == pytest.approx([trust(1) * token / 66 for token in best])
    assert [draft.token for draft in CorpusTree(corpus)((0,))] == [*best]


def test_a_text_that_ends_counts_as_one_that_goes_on_otherwise() -> None:
    first, second = CorpusTree(Corpus.of([[1, 2], [1, 2, 3]], 4))((1,))
    assert (first.token, first.chance) == (2, trust(1))
    assert second.token == 3
    assert second.chance == pytest.approx(trust(1) * trust(2) / 2)


def test_an_ending_that_is_long_is_found_up_to_a_depth() -> None:
    text = tuple(range(50))
    corpus = Corpus.of([text], 60)
    assert corpus.find(text[:49], longest=99).length == DEPTH
    assert corpus.find(text).length == 0  # it occurs, and does not go on
    assert [draft.token for draft in CorpusTree(corpus)(text[:10])] == list(range(10, 50))
    assert [*CorpusTree(corpus, shortest=2)((55, 9))] == []
    assert len([*CorpusTree(corpus, longest=1)((55, 9))]) == 40


@pytest.mark.parametrize(
    "given_texts",
    [
        None,
        3,
        "ab",
        [],
        [[]],
        [3],
        ["ab"],
        [[0.5]],
        [[9]],
        [[5]],
        [[-1]],
        [[True]],
        torch.zeros(2, 2, dtype=torch.long),
    ],
)
def test_what_are_no_texts_is_refused(given_texts: object) -> None:
    with pytest.raises(DecodeError):
        Corpus.of(given_texts, 5)  # type: ignore[arg-type]


GOOD = Corpus.of([[1, 2, 3]], 5)


@pytest.mark.parametrize(
    "array", [None, 3, [1, END], numpy.zeros(0, int), numpy.zeros((2, 2), int), numpy.array([0.5])]
)
def test_what_are_no_arrays_is_refused(array: object) -> None:
    with pytest.raises(DecodeError):
        Corpus(5, array, GOOD.suffixes)  # type: ignore[arg-type]
    with pytest.raises(DecodeError):
        Corpus(5, GOOD.tokens, array)  # type: ignore[arg-type]


def test_a_match_that_is_longer_than_the_longest_is_refused() -> None:
    with pytest.raises(DecodeError, match="shortest"):
        CorpusTree(GOOD, longest=2, shortest=3)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    for tokens, suffixes in (
        ([1, 2], [0]),
        ([9, END], [0]),
        ([5, END], [0]),
        ([-2, END], [0]),
        ([1, END], [2]),
        ([1, END], [-1]),
    ):
        with pytest.raises(DecodeError, match="outside"):
            Corpus(5, numpy.array(tokens), numpy.array(suffixes))


# Its file.


def written(tmp_path: Path) -> tuple[Corpus, Path]:
    corpus, path = Corpus.of([Random(1).choices(range(5), k=30), [1, 2]], 5), tmp_path / "corpus"
    corpus.save(path)
    return corpus, path


def test_a_corpus_is_kept_in_a_file_that_is_mapped(tmp_path: Path) -> None:
    corpus, path = written(tmp_path)
    again = Corpus.load(path, 5)
    assert (again.tokens.tolist(), again.suffixes.tolist()) == (corpus.tokens.tolist(), corpus.suffixes.tolist())
    assert again.after((1, 2)) == corpus.after((1, 2))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) in maps.read_text()  # not a copy of it
    corpus.save(path)  # another file in its place: the mapped one stays
    assert again.after((1, 2)) == corpus.after((1, 2))


def test_a_damaged_corpus_is_refused(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(bytes([*content[:at], content[at] ^ 1, *content[at + 1 :]]))
        with pytest.raises(DecodeError):
            Corpus.load(path, 5)
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(DecodeError):
            Corpus.load(path, 5)


def test_a_corpus_of_another_vocabulary_or_none_is_refused(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    with pytest.raises(DecodeError, match="of a vocabulary of 5 tokens, and not 6"):
        Corpus.load(path, 6)
    save_file({"tokens": GOOD.tokens}, tmp_path / "other", {"format": "other"})
    with pytest.raises(DecodeError, match="holds no corpus"):
        Corpus.load(tmp_path / "other", 5)
    save_file({"tokens": GOOD.tokens}, tmp_path / "half", {"format": FORMAT, "vocab_size": "5", "sha256": "0"})
    with pytest.raises(DecodeError, match="damaged"):
        Corpus.load(tmp_path / "half", 5)
    with pytest.raises(DecodeError, match="does not exist"):
        Corpus.load(tmp_path / "none", 5)


# Decoding.


def test_the_text_is_the_targets_and_a_corpus_of_it_makes_it_short() -> None:
    prompt, target = (3, 4, 5, 6), tiny_llama(21, vocab_size=24, layers=1)
    greedy = oracle(prompt, target, 24)
    for texts_of, most in (([[*prompt, *greedy]], 8), ([greedy[::-1], [7, 8, 9]], 24)):
        corpus = Corpus.of(texts_of, 24)
        for drafter in (CorpusTree(corpus), LookupTree(corpus)):
            predictor = CachedPredictor(target)
            step = speculative_step(drafter, predictor, GreedyProcessor(), Dice(), Fixed(8), (predictor,))
            state = run(step, start(prompt, 24).unwrap()).state
            assert list(state.output) == greedy
            assert state.tally.steps <= most


def test_a_small_number_of_numpy_does_not_wrap_around() -> None:
    corpus, text = Corpus.of([tuple(range(9)) * 40], vocab_size=9), tuple(range(9)) * 30
    assert corpus.find(text, numpy.uint8(3)).length == corpus.find(text, 3).length == 3  # type: ignore[arg-type]
