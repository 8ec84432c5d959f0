"""What a target said is kept and drafted from: the table against one that keeps everything, trees against all paths."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from math import prod
from pathlib import Path
from random import Random
from threading import Thread

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specflow import (
    TEXT,
    CachedPredictor,
    DecodeError,
    DecodeState,
    Dice,
    Fixed,
    GreedyProcessor,
    LookupTree,
    MultinomialProcessor,
    Proposal,
    SharedNoise,
    Step,
    Tokens,
    chain,
    ngram_step,
    run,
    start,
)
from specflow.drafters import Bigrams, Recycled, RecyclingTree
from specflow.stages import Adjust, Draft, Match, Recycle, Reject, Verify, ending
from specflow.stages.recycle import likeliest
from specflow.state import Committed
from specflow.testing import TableModel
from tests.toys import oracle, tiny_llama

Pairs = list[tuple[int, float]]

HALF, QUARTER = 0.5, 0.25
"""Chances that a file keeps as they are."""

rows = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([HALF, QUARTER, 0.125])), max_size=4)
contexts = st.lists(st.sampled_from([0, 1, 2, 5, 9]), max_size=5).map(tuple)
lessons = st.lists(st.lists(st.tuples(contexts, rows), max_size=3), max_size=8)


def recalled(taught: Sequence[tuple[Tokens, Pairs]], text: Tokens, table: Recycled) -> Pairs:
    """What the last lesson of the longest context says, looked for in all that were ever given."""
    for length in range(min(table.n, len(text)), 0, -1):
        for context, row in reversed(taught):
            if max(text[-length:]) >= table.vocab_size:
                continue
            kept = [pair for pair in row if pair[0] < table.vocab_size][: table.k]
            if kept and context[-length:] == text[-length:] and len(context) >= length:
                return kept
    return []


def learned(table: Recycled, seed: int = 0, count: int = 40) -> Recycled:
    random = Random(seed)
    for _ in range(count):
        followers = [(token, 0.5 / 2**rank) for rank, token in enumerate(random.sample(range(6), 3))]
        table.learn([tuple(random.choices(range(6), k=random.randrange(1, 5)))], [followers])
    return table


def contents(table: Recycled) -> dict[Tokens, Pairs]:
    """All that a table knows of contexts of up to three of six tokens."""
    texts = [text for length in (1, 2, 3) for text in product(range(6), repeat=length)]
    return {text: list(table.after(text)) for text in texts}


# The table.


@given(lessons, contexts, st.integers(1, 3), st.integers(1, 3))
def test_a_table_says_what_was_learned_last_of_the_longest_context(
    given_lessons: list[list[tuple[Tokens, Pairs]]], text: Tokens, n: int, k: int
) -> None:
    table = Recycled(5, k, n)
    for lesson in given_lessons:
        table.learn([context for context, _ in lesson], [row for _, row in lesson])
    taught = [each for lesson in given_lessons for each in lesson]
    assert list(table.after(text)) == recalled(taught, text, table)


def test_the_context_that_was_learned_longest_ago_is_forgotten() -> None:
    table = Recycled(10, n=1, max_contexts=2)
    for token in (1, 2, 1, 3):  # 1 again, before the third comes
        table.learn([(token,)], [[(token + 1, HALF)]])
    assert [list(table.after((token,))) for token in (1, 2, 3)] == [[(2, HALF)], [], [(4, HALF)]]
    assert len(table) == 2


def test_a_table_may_begin_with_another_one() -> None:
    bigrams = Bigrams.of(TableModel(4), (0,), 4, 2)
    table = Recycled(4, before=bigrams)
    assert table.after((3, 1)) == bigrams.after((1,))
    table.learn([(3, 1)], [[(0, HALF)]])
    assert (table.after((3, 1)), table.after((2, 1))) == ([(0, HALF)], [(0, HALF)])
    assert table.after((2, 2)) == bigrams.after((2,))
    assert table.after(()) == ()


def test_nothing_is_kept_of_a_pass_but_what_the_model_said() -> None:
    """What lies between the rows of one pass and the next holds the room of them all: 7 GB for SmolLM2-135M."""
    held: list[int] = []

    def target(tokens: Tokens, nodes: Sequence[Proposal]) -> Tensor:
        held.append(sum(type(kept) is Tensor for kept in gc.get_objects()))
        return torch.zeros(len(nodes) + 1, 1_000)

    table = Bigrams.of(target, (0,), 1_000)
    assert len(held) == 8
    assert set(held[2:]) == {held[2]}
    assert table.tokens.shape == table.chances.shape == (1_000, 8)


class Eager:
    """Knows followers of every text that has a last token."""

    def after(self, tokens: Tokens, /) -> Pairs:
        """The next number."""
        return [(tokens[-1] + 1, HALF)]


def test_nobody_is_asked_what_follows_nothing() -> None:
    table = Recycled(4, before=Eager())
    assert (table.after(()), table.after((1,))) == ((), [(2, HALF)])


@pytest.mark.parametrize("text", [None, "ab", 3, (0.5,), (True,), (None,)])
def test_what_is_no_text_is_refused(text: object) -> None:
    for provider in (Recycled(4), Bigrams.of(TableModel(4), (0,), 4, 2)):
        with pytest.raises(DecodeError):
            provider.after(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_contexts", "followers"),
    [
        (None, []),
        ([(1,)], None),
        ([(1,)], []),
        (["a"], [[(1, HALF)]]),
        ([(0.5,)], [[(1, HALF)]]),
        ([(1,)], [3]),
        ([(1,)], [[3]]),
        ([(1,)], [[(1, HALF, 2)]]),
        ([(1,)], [[(-1, HALF)]]),
        ([(1,)], [[(1.0, HALF)]]),
        ([(1,)], [[(1, 1.5)]]),
        ([(1,)], [[(1, float("nan"))]]),
        ([(1,)], [[(1, True)]]),
        ([(1,)], [[(1, None)]]),
        ([(1,), (2,)], [[(1, HALF)], [(1, -HALF)]]),
    ],
)
def test_what_is_no_lesson_is_refused_and_teaches_nothing(given_contexts: object, followers: object) -> None:
    table = learned(Recycled(6))
    before = contents(table)
    with pytest.raises(DecodeError):
        table.learn(given_contexts, followers)  # type: ignore[arg-type]
    assert contents(table) == before


def test_threads_learn_and_draft_at_once() -> None:
    """Each row holds a number twice; a row of two halves would show."""
    table, wrong = Recycled(1000, n=1, max_contexts=50), list[Pairs]()

    def teach(seed: int) -> None:
        random = Random(seed)
        for _ in range(2000):
            number = random.randrange(1000)
            table.learn([(number % 80,), (0,)], [[(number, HALF), (number, HALF)], [(80, HALF), (80, HALF)]])

    def ask() -> None:
        for number in range(20_000):
            row = list(table.after((number % 80,)))
            if number % 80 == 0 and not row:
                wrong.append(row)  # learned again and again, it is always known
            if row and (len(row) != 2 or row[0] != row[1] or row[0][0] % 80 != number % 80):
                wrong.append(row)

    table.learn([(0,)], [[(80, HALF), (80, HALF)]])
    threads = [Thread(target=teach, args=(seed,)) for seed in (1, 2)] + [Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, len(table)) == ([], 50)


# Its file.


def test_a_table_is_kept_in_a_file(tmp_path: Path) -> None:
    table, again = learned(Recycled(6, k=3, n=3)), learned(Recycled(6, k=3, n=3), seed=9)
    table.save(tmp_path / "a")
    again.load(tmp_path / "a")
    assert contents(again) == contents(table)
    table.learn([(1, 2, 3)], [[(4, HALF)]])
    assert contents(again) != contents(table)
    empty = Recycled(6)
    empty.save(tmp_path / "empty")
    again.load(tmp_path / "empty")
    assert len(again) == 0


def test_a_table_of_another_shape_keeps_what_it_has_room_for(tmp_path: Path) -> None:
    learned(Recycled(6, k=3, n=3)).save(tmp_path / "a")
    narrow, last = Recycled(6, k=2, n=2), Recycled(6, max_contexts=4)
    narrow.load(tmp_path / "a")
    assert contents(narrow) == contents(learned(Recycled(6, k=2, n=2)))
    last.load(tmp_path / "a")
    assert len(last) == 4


def test_a_damaged_file_is_refused_and_the_table_stays(tmp_path: Path) -> None:
    table, path = learned(Recycled(6, k=2, n=2), count=6), tmp_path / "a"
    table.save(path)
    content, before = path.read_bytes(), contents(table)
    for at in range(len(content)):
        path.write_bytes(bytes([*content[:at], content[at] ^ 1, *content[at + 1 :]]))
        with pytest.raises(DecodeError):
            table.load(path)
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(DecodeError):
            table.load(path)
    assert contents(table) == before


def test_a_file_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    learned(Recycled(6)).save(tmp_path / "a")
    with pytest.raises(DecodeError, match="of a vocabulary of 6 tokens, and not 7"):
        Recycled(7).load(tmp_path / "a")
    Bigrams.of(TableModel(4), (0,), 4, 2).save(tmp_path / "b")
    with pytest.raises(DecodeError, match="holds no recycled rows"):
        Recycled(4).load(tmp_path / "b")


# What a step teaches.


def likely(logits: Tensor, k: int) -> Pairs:
    """The slow way."""
    probs = logits.double().softmax(-1)
    return [(int(token), float(probs[token])) for token in probs.argsort(descending=True)[:k] if probs[token] > 0]


def test_the_likeliest_tokens_of_each_row() -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1))
    logits[3, 7:] = -torch.inf
    for top in (1, 3, 8):
        for row, expected in zip(likeliest(logits, top), [likely(each, top) for each in logits], strict=True):
            assert [token for token, _ in row] == [token for token, _ in expected]
            assert [chance for _, chance in row] == pytest.approx([chance for _, chance in expected], rel=1e-4)
    for broken in (torch.nan, torch.inf):
        logits[1, 5] = broken
        assert likeliest(logits, 3)[1] == []
    assert likeliest(logits.bfloat16(), 3) == likeliest(logits.bfloat16().float(), 3)


def fan(tokens: Tokens) -> Sequence[Proposal]:
    """Two tokens, and two more after each: whatever is right, something is rejected."""
    return tuple(Proposal(token, parent=parent) for parent in (TEXT, 0, 1) for token in (0, 1))


def test_a_step_teaches_every_row_it_read() -> None:
    target, table = TableModel(4, seed=3), Recycled(4, k=3, n=2)
    step = ngram_step(lambda tokens: iter(fan(tokens)), target, GreedyProcessor(), Dice(), Recycle(table), Fixed(6))
    text = (2, 3)
    after = step(start(text, 9).unwrap())
    assert isinstance(after, DecodeState)
    paths: list[Tokens] = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    for path in paths:
        logits = target(text, tuple(Proposal(token) for token in path))[-1]
        said = list(table.after((*text, *path)))
        assert [token for token, _ in said] == [token for token, _ in likely(logits, 3)]
        assert [chance for _, chance in said] == pytest.approx([chance for _, chance in likely(logits, 3)], rel=1e-5)
    assert len(table) == 4 + 6  # 3; 0 and 1; 2 is before none; 23, 30, 31, 00, 01, 10, 11 - some of them are one


def test_drafts_that_stand_are_learned_last() -> None:
    """After 0 the text goes on with 1, and in a rejected branch with 2: the text's own row is kept."""
    rows_of = {(0,): [0.0, 9.0, 0.0], (0, 1): [9.0, 0.0, 0.0], (0, 1, 0): [0.0, 0.0, 9.0], (0, 2): [0.0, 0.0, 5.0]}

    def target(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        texts: list[Tokens] = [tokens]
        for i, draft in enumerate(drafts):
            parent = i - 1 if draft.parent == -2 else draft.parent
            texts.append((*texts[parent + 1], draft.token))
        return torch.tensor([rows_of.get(text, [1.0, 1.0, 1.0]) for text in texts])

    for drafts in ((1, 2), (2, 1)):
        table = Recycled(3, n=1)
        tree = [Proposal(token, parent=TEXT) for token in drafts] + [Proposal(0, parent=0), Proposal(0, parent=1)]

        def draft_tree(tokens: Tokens, tree: Sequence[Proposal] = tuple(tree)) -> Iterator[Proposal]:
            return iter(tree)

        step = ngram_step(draft_tree, target, GreedyProcessor(), Dice(), Recycle(table), Fixed(4))
        step(start((0,), 9).unwrap())
        token, chance = table.after((0,))[0]
        assert (token, round(chance, 3)) == (2, 1.0)


def test_the_texts_own_row_is_learned_after_those_of_rejected_drafts() -> None:
    """The rejected draft 2 has a 0 behind it, as the text has at its end."""
    rows_of = {(0,): [0.0, 9.0, 0.0], (0, 2, 0): [0.0, 0.0, 9.0]}

    def target(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        said = tuple([draft.token for draft in drafts])
        texts = [tokens + said[:i] for i in range(len(said) + 1)]
        return torch.tensor([rows_of.get(text, [1.0, 1.0, 1.0]) for text in texts])

    table = Recycled(3, n=1)
    step = ngram_step(lambda tokens: iter(chain((2, 0))), target, GreedyProcessor(), Dice(), Recycle(table), Fixed(2))
    after = step(start((0,), 9).unwrap())
    assert isinstance(after, DecodeState)
    assert after.output == (1,)
    assert table.after((0,))[0][0] == 1


def test_a_step_that_does_not_stand_teaches_nothing() -> None:
    target, table = TableModel(4, seed=3), Recycled(4)

    def refuse(committed: Committed) -> None:
        raise KeyError

    rng = Dice()
    draft, verify = Draft(lambda tokens: iter(fan(tokens))), Verify(target, GreedyProcessor(), Reject(rng))
    adjust = Adjust(rng)
    end = ending(lambda state: False, refuse, Recycle(table))
    with pytest.raises(KeyError):
        start((2, 3), 9).unwrap().then(draft).then(verify).then(adjust).then(end)
    assert len(table) == 0


def test_a_state_may_be_stepped_twice() -> None:
    target, table = TableModel(4, seed=3), Recycled(4)
    step = ngram_step(RecyclingTree(table), target, GreedyProcessor(), Dice(), Recycle(table), Fixed(6))
    state, both = start((2, 3), 12).unwrap(), 0
    for _ in range(12):
        first, second = step(state), step(state)
        one, other = (each.tokens if isinstance(each, DecodeState) else each.state.tokens for each in (first, second))
        assert one == other[: len(one)]  # it knows more the second time, and says no more than the text
        both += len(other) > len(one)
        if not isinstance(first, DecodeState):
            break
        state = first
    assert both


# The tree.


@pytest.mark.parametrize("seed", range(20))
def test_a_static_tree_is_the_likeliest_of_all_paths(seed: int) -> None:
    table, random = learned(Recycled(6, n=2), seed), Random(seed)
    shares = tuple(sorted((random.random() / 3 for _ in range(3)), reverse=True))
    text = (5, random.randrange(6))
    drafts = list(islice(RecyclingTree(table, shares)(text), 12))

    def followed(path: tuple[int, ...]) -> Tokens | None:
        tokens: Tokens = ()
        for rank in path:
            known = table.after((*text, *tokens))
            if rank >= len(known):
                return None
            tokens = (*tokens, known[rank][0])
        return tokens

    paths = {path: followed(path) for depth in range(1, 7) for path in product(range(3), repeat=depth)}
    chances = sorted((prod(shares[r] for r in path) for path, known in paths.items() if known), reverse=True)
    assert [draft.chance for draft in drafts] == pytest.approx(chances[:12])
    texts: list[Tokens] = []
    for draft in drafts:
        texts.append(((*texts[draft.parent],) if draft.parent != TEXT else ()) + (draft.token,))
    assert set(texts) <= {known for known in paths.values() if known}
    assert len(set(texts)) == len(texts) or len(set(paths.values())) < len(paths)


def test_a_tree_ends_where_nothing_is_known() -> None:
    table = Recycled(9)
    assert list(RecyclingTree(table)((1,))) == []
    table.learn([(1,)], [[(2, HALF)]])
    assert [(draft.token, draft.parent, draft.source) for draft in RecyclingTree(table)((1,))] == [
        (2, TEXT, "recycled")
    ]


@pytest.mark.parametrize(
    "shares", [(), (0.2, 0.3), (0.0,), (-0.1,), (0.9, 0.9), (float("nan"),), None, (True,), ("a",)]
)
def test_what_is_no_shape_is_refused(shares: object) -> None:
    with pytest.raises(DecodeError):
        RecyclingTree(Recycled(4), shares)  # type: ignore[arg-type]


class Saying:
    """Knows followers that are none."""

    def __init__(self, said: object) -> None:
        self.said = said

    def after(self, tokens: Tokens, /) -> Sequence[tuple[int, float]]:
        return self.said  # type: ignore[return-value]


@pytest.mark.parametrize(
    "said", [None, 3, "ab", [3], [(1,)], [(-1, HALF)], [(1, 2.0)], [(1, float("nan"))], [(1.5, HALF)]]
)
def test_what_a_provider_says_is_looked_at(said: object) -> None:
    for drafter in (RecyclingTree(Saying(said)), LookupTree(Saying(said))):
        with pytest.raises(DecodeError, match="Saying does not say what follows"):
            next(drafter((1, 2)))


# Decoding.

PROMPT, NEW = (3, 4, 5, 6, 3, 4, 5, 6, 3, 4), 24
TARGET = tiny_llama(21, vocab_size=24, layers=1)

DRAFTERS: dict[str, Callable[[Recycled], object]] = {"static": RecyclingTree, "weighed": LookupTree}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_text_is_the_targets_whatever_was_learned(name: str, n: int) -> None:
    table = Recycled(24, n=n)
    greedy = oracle(PROMPT, TARGET, NEW)
    steps = []
    for _ in range(2):
        target = CachedPredictor(TARGET)
        drafter = DRAFTERS[name](table)
        step = ngram_step(drafter, target, GreedyProcessor(), Dice(), Recycle(table), Fixed(8), (target,))  # type: ignore[arg-type]
        state = run(step, start(PROMPT, NEW).unwrap()).state
        assert list(state.output) == greedy
        steps.append(state.tally.steps)
    assert steps[1] < steps[0] < NEW  # what was read before is known


def test_a_seed_has_one_text_whatever_was_learned() -> None:
    processor, noise, table = MultinomialProcessor(1.0), SharedNoise(5), Recycled(24)
    target = CachedPredictor(TARGET)

    def step(drafts: int) -> Step:
        draft, verify = Draft(RecyclingTree(table), Fixed(drafts)), Verify(target, processor, Match(noise))
        adjust, end = Adjust(noise), ending(lambda state: False, lambda committed: None, Recycle(table))
        return lambda state: state.then(draft).then(verify).then(adjust).then(end)

    texts = {run(step(drafts), start(PROMPT, NEW).unwrap()).state.tokens for drafts in (1, 4, 9)}
    assert len(texts) == 1


def test_a_table_is_part_of_no_state() -> None:
    table = Recycled(4)
    assert evolve(RecyclingTree(table), source="b") != RecyclingTree(table)
    assert RecyclingTree(table) == RecyclingTree(table)
    assert "_known" not in repr(table)
