"""The suffix drafter against brute force, over texts that are edited, grow, roll back and take turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from random import Random
from typing import TypeAlias

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from specflow import DecodeError, LookupTree, PointMass, PromptLookup, Proposal, SuffixDrafter, Tokens
from specflow.drafters import Bigrams, as_chain
from specflow.drafters.suffix import FORGIVEN, NO_MATCH, Match


def matches(tokens: Tokens) -> list[Match]:
    """All places where the longest ending of the text that occurred before did so, the latest first."""
    n = len(tokens)
    for length in range(n - 1, 0, -1):
        found = [
            Match(length, e) for e in range(n - 1, length - 1, -1) if tokens[e - length : e] == tokens[n - length :]
        ]
        if found:
            return found
    return [NO_MATCH]


def followed(tokens: Tokens) -> tuple[int, int, int]:
    """The place that is copied, how many tokens it foretold in a row, and what it was worth before; found step by step.

    Nothing is copied from place 0.
    """
    place, run, before = 0, 0, 0
    common = [0] * len(tokens)  # common[e]: how many tokens before place e are as those before this one
    for n, token in enumerate(tokens, 1):
        worth = run + before // FORGIVEN
        if place and tokens[place] == token:
            place, run = place + 1, run + 1
        elif place and run == 0 and tokens[place - 1] == token:
            run = 1
        elif place and place + 2 < n and tokens[place + 1] == token:
            place, run, before = place + 2, 1, worth
        else:
            place, run, before = (place + 1 if place and worth else 0), 0, worth
        for e in range(n - 1, 0, -1):
            common[e] = common[e - 1] + 1 if tokens[e - 1] == token else 0
        longest = max(common[1:n], default=0)
        if not place or longest > run + before // FORGIVEN:
            place, run, before = (max(e for e in range(1, n) if common[e] == longest) if longest else 0), longest, 0
    return place, run, before


def continuation(tokens: Tokens, end: int, k: int) -> list[int]:
    """k tokens copied from `end` on, the copies included."""
    text = list(tokens)
    for i in range(end, end + k):
        text.append(text[i])
    return text[len(tokens) :]


def drafted(drafter: SuffixDrafter, tokens: Tokens) -> list[int]:
    return [proposal.token for proposal in drafter(tokens)]


def expected(tokens: Tokens, most: int, factor: int, offset: int, shortest: int) -> list[int]:
    place, run, before = followed(tokens)
    worth = run + before // FORGIVEN
    if not place or worth < shortest:
        return []
    return continuation(tokens, place, max(0, min(most, factor * worth + offset)))


texts = st.integers(1, 4).flatmap(lambda vocabulary: st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=30))


@settings(max_examples=1000, deadline=None)
@given(texts)
def test_the_longest_match_and_the_latest_of_them(text: list[int]) -> None:
    drafter = SuffixDrafter()
    for end in range(1, len(text) + 1):
        tokens = tuple(text[:end])
        assert drafter.read(tokens).match == SuffixDrafter().read(tokens).match == matches(tokens)[0]


@settings(max_examples=1000, deadline=None)
@given(texts, st.integers(1, 12), st.integers(0, 4), st.integers(-3, 5), st.integers(0, 4))
def test_the_draft_is_what_followed(text: list[int], most: int, factor: int, offset: int, shortest: int) -> None:
    tokens = tuple(text)
    drafter = SuffixDrafter(most, factor, offset, shortest)
    assert drafted(drafter, tokens) == expected(tokens, most, factor, offset, shortest)


edits = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["replace", "insert", "leave out"]), st.integers(0, 60)))


@settings(max_examples=1000, deadline=None)
@given(st.integers(2, 40), edits, st.integers(0, 4), st.integers(0, 5), st.integers(0, 4))
def test_an_edited_copy(length: int, changes: list[tuple[int, str, int]], factor: int, offset: int, low: int) -> None:
    copy = list(range(length))
    for at, change, token in changes:
        copy[at : at if change == "insert" else at + 1] = [] if change == "leave out" else [token]
    tokens, drafter = (*range(length), *copy), SuffixDrafter(12, factor, offset, low)
    for end in range(length, len(tokens) + 1):
        assert drafted(drafter, tokens[:end]) == expected(tokens[:end], 12, factor, offset, low)


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ((*range(20), *range(9), 70), [10, 11]),  # 9 is replaced
        ((*range(20), *range(9), 70, 9), [10, 11]),  # or not: 70 was inserted
        ((*range(20), *range(9), 10), [11, 12]),  # 9 is left out
        ((*range(20), *range(9), 5), [10, 11]),  # what replaces it occurred before; a copy of 9 tokens is worth 1
        ((*range(20), *range(1, 9), 5), [10, 11]),
        ((*range(20), *range(2, 9), 5), [6, 7]),  # one of 7 is worth nothing
        ((*range(20), *range(9), 5, 6), [7, 8]),  # a longer match ends the copy
        ((*range(20), *range(9), 70, 71), [11, 12]),  # 9 is worth 1 when it is rejected, and goes on
        ((*range(20), *range(9), 70, 71, 72), []),  # then it is worth nothing, and does not
        ((*range(20), 3, 70), [5, 6]),  # where nothing else is known, any copy goes on,
        ((*range(20), 3, 70, 71), []),  # once
    ],
)
def test_a_rejected_copy_goes_on(text: Tokens, draft: list[int]) -> None:
    assert drafted(SuffixDrafter(most=2, shortest=0), text) == draft


moves = st.tuples(st.integers(0, 6), st.integers(0, 12), st.lists(st.integers(0, 2), max_size=6))


@settings(max_examples=1000, deadline=None)
@given(st.lists(moves, max_size=25))
def test_texts_that_grow_roll_back_and_take_turns(steps: list[tuple[int, int, list[int]]]) -> None:
    """More texts than are remembered, each cut by up to 12 tokens and grown by up to 6 at its turn."""
    drafter = SuffixDrafter()
    held: list[Tokens] = [(0,)] * 7
    for which, back, more in steps:
        tokens = held[which]
        held[which] = (*tokens[: max(1, len(tokens) - back)], *more)[:30]
        assert drafted(drafter, held[which]) == drafted(SuffixDrafter(), held[which])
        assert drafter.read(held[which]).match == matches(held[which])[0]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(10, 60), st.lists(st.integers(0, 2), max_size=9)
)
def test_endless_repetition_still_gives_a_longest_match(loop: list[int], times: int, tail: list[int]) -> None:
    """Where more matches are nested than are kept up to date, the latest may be missed, the longest never."""
    tokens = (*(loop * times), *tail)
    assert SuffixDrafter().read(tokens).match in matches(tokens)


def test_a_loop_is_continued() -> None:
    assert drafted(SuffixDrafter(most=7, factor=9), (5, 1, 2, 3, 1, 2, 3)) == [1, 2, 3, 1, 2, 3, 1]


def test_the_draft_grows_with_the_match() -> None:
    tokens = (*range(20), 50, *range(8))
    lengths = [len(drafted(SuffixDrafter(12, 2, 1), (*tokens[: 21 + m],))) for m in range(1, 9)]
    assert lengths == [3, 5, 7, 9, 11, 12, 12, 12]


def test_the_draft_grows_with_what_the_copy_is_worth() -> None:
    """16 tokens before the rejection are worth 2; those behind it one each."""
    tokens = (*range(40), *range(16), 70, *range(17, 20))
    lengths = [len(drafted(SuffixDrafter(12, 2, 1), tokens[:end])) for end in range(57, 61)]
    assert lengths == [5, 7, 9, 11]
    assert drafted(SuffixDrafter(factor=1, offset=0), (1, 2) * 8 + (2,)) == [2, 2]  # a 1 is left out behind 14 tokens


def test_a_copy_worth_less_than_the_shortest_match_is_not_used() -> None:
    tokens = (*range(20), *range(16), 70)
    assert [drafted(SuffixDrafter(most=1, shortest=m), tokens) for m in (1, 2, 3)] == [[17], [17], []]
    tokens = (*range(20), *range(7), 70)
    assert [drafted(SuffixDrafter(most=1, shortest=m), tokens) for m in (0, 1)] == [[8], []]
    assert drafted(SuffixDrafter(shortest=0), (1, 2, 3)) == []


def tabled() -> LookupTree:
    """A tree over bigrams of three tokens, which know none of a text's ids."""
    return LookupTree(Bigrams(numpy.array([[1], [2], [0]]), numpy.array([[0.5]] * 3)))


def test_proposals_are_certain_and_named() -> None:
    for proposal in SuffixDrafter(source="mine")((1, 2, 1)):
        assert proposal.q == PointMass(proposal.token)
        assert proposal.source == "mine"


def test_a_stream_outlives_the_growth_of_its_drafter() -> None:
    drafter = SuffixDrafter(most=3, factor=9)
    stream = drafter((1, 2, 3, 1))
    first = next(stream).token
    drafter.read((1, 2, 3, 1, 9, 9, 9))
    assert [first, *(proposal.token for proposal in stream)] == [2, 3, 1]


def test_an_interruption_leaves_no_wrong_memo() -> None:
    class Interrupting(int):
        @override
        def __hash__(self) -> int:
            raise KeyboardInterrupt

    drafter, text = SuffixDrafter(), (1, 2, 3, 1, 2)
    drafter.read(text[:3])
    with pytest.raises(KeyboardInterrupt):
        drafter.read((*text, Interrupting(1), 4))
    assert drafter.read(text).match == Match(2, 2)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns a thousand times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


Sharing: TypeAlias = SuffixDrafter | LookupTree | PromptLookup


def beginning_of(drafter: Sharing, tokens: Tokens, most: int = 6) -> list[tuple[int, int]]:
    """The first drafts of a text, and what they follow."""
    return [(draft.token, draft.parent) for draft in islice(drafter(tokens), most)]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("make", [SuffixDrafter, LookupTree, PromptLookup])
def test_threads_share_a_drafter(make: Callable[[], Sharing]) -> None:
    """More texts at once than are remembered, with one beginning, and each of them in two threads."""
    random, shared = Random(0), make()
    beginning = tuple(random.choices(range(4), k=100))
    held = [(*beginning, *random.choices(range(4), k=100)) for _ in range(5)] * 2

    def grow(drafter: Sharing, tokens: Tokens) -> list[list[tuple[int, int]]]:
        return [beginning_of(drafter, tokens[:end]) for end in range(1, len(tokens), 3)]

    alone = [grow(make(), tokens) for tokens in held]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(partial(grow, shared), held)) == alone


def test_conversations_in_turns_are_not_read_again() -> None:
    """Four of them, in any order: each call takes in what its text grew by, and no more."""
    drafter, grown, random = SuffixDrafter(), list[int](), Random(0)
    texts = [tuple(Random(seed).choices(range(9), k=200)) for seed in range(4)]
    for end in range(50, 200, 5):
        for text in random.sample(texts, 4):
            before = {id(memo): len(memo.text) for memo in drafter._memos}
            drafter.read(text[:end])
            grown.append(len(drafter._memos[0].text) - before.get(id(drafter._memos[0]), 0))
    assert grown == [50] * 4 + [5] * (len(grown) - 4)


def test_a_stream_that_is_left_leaves_the_memo_right() -> None:
    random = Random(1)
    text = tuple(random.choices(range(3), k=80))
    drafters: tuple[Sharing, ...] = (SuffixDrafter(), LookupTree())
    for end in range(1, 80):
        for drafter in drafters:
            stream = drafter(text[:end])
            next(stream, None)
            stream.close()  # type: ignore[attr-defined] # both are generators
            assert beginning_of(drafter, text[:end]) == beginning_of(type(drafter)(), text[:end])


@pytest.mark.parametrize("make", [SuffixDrafter, LookupTree, PromptLookup])
def test_a_text_is_whatever_plainly_holds_ids(make: Callable[[], Sharing]) -> None:
    expected = beginning_of(make(), (1, 2, 3, 1))
    for text in ([1, 2, 3, 1], torch.tensor([1, 2, 3, 1]), torch.tensor([[1, 2, 3, 1]]), numpy.array([1, 2, 3, 1])):
        assert beginning_of(make(), text) == expected  # type: ignore[arg-type]
    assert list(make()(())) == []


@pytest.mark.parametrize("make", [SuffixDrafter, LookupTree, PromptLookup])
@pytest.mark.parametrize(
    "text", [None, 3, "abca", b"abca", (1, "a"), (1, None), (1, 0.5), (torch.tensor(1),) * 2, {1: 2}]
)
def test_a_text_that_holds_no_ids_is_refused(make: Callable[[], Sharing], text: object) -> None:
    with pytest.raises(DecodeError, match=r"ids|int"):
        list(make()(text))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [SuffixDrafter, LookupTree, PromptLookup, tabled])
@pytest.mark.parametrize("token", [-1, 2**31, 2**63, 2**70])
def test_ids_of_any_size_are_copied_as_they_are(make: Callable[[], Sharing], token: int) -> None:
    text = (token, 5, 6, token)
    drafts = [draft for draft, _ in beginning_of(make(), text, 2)]
    assert drafts[0] == 5
    assert all(type(draft) is int for draft in drafts)


def test_no_factor_takes_a_draft_out_of_its_bounds() -> None:
    text = (1, 2, 3) * 40
    assert len(drafted(SuffixDrafter(most=7, factor=1e308, offset=1e308), text)) == 7
    assert drafted(SuffixDrafter(factor=-1e308, offset=-1e308), text) == []
    assert len(drafted(SuffixDrafter(most=numpy.int64(7)), text)) == 7  # type: ignore[arg-type]


def test_a_text_that_grew_is_not_read_again() -> None:
    """The memo is used: the automaton takes as many tokens as the text grew by."""
    drafter = SuffixDrafter()
    drafter.read((1, 2, 3))
    (automaton,) = drafter._memos
    drafter.read((1, 2, 3, 4))
    assert drafter._memos == [automaton]
    drafter.read((1, 2, 9))
    assert len(drafter._memos) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SuffixDrafter(most=0),
        lambda: SuffixDrafter(shortest=-1),
        lambda: SuffixDrafter(factor=float("nan")),
        lambda: SuffixDrafter(offset=float("inf")),
        lambda: SuffixDrafter(most=True),
        lambda: SuffixDrafter(most=2.0),  # type: ignore[arg-type]
        lambda: SuffixDrafter(most=2**31),
        lambda: SuffixDrafter(shortest=None),  # type: ignore[arg-type]
        lambda: SuffixDrafter(factor="2"),  # type: ignore[arg-type]
        lambda: SuffixDrafter(source=None),  # type: ignore[arg-type]
        lambda: PromptLookup(num_output_tokens=1.0),  # type: ignore[arg-type]
        lambda: PromptLookup(max_matching_ngram_size=True),
        lambda: LookupTree(branches=0.5),  # type: ignore[arg-type]
        lambda: LookupTree(followers={}),  # type: ignore[arg-type]
        lambda: as_chain(None),  # type: ignore[arg-type]
        lambda: as_chain(SuffixDrafter(), least=float("nan")),
    ],
    ids=[
        "most",
        "shortest",
        "factor",
        "offset",
        "most",
        "most",
        "most",
        "shortest",
        "factor",
        "source",
        "num_output_tokens",
        "max_matching_ngram_size",
        "branches",
        "followers",
        "drafter",
        "least",
    ],
)
def test_wrong_parameters_are_refused(wrong: Callable[[], object], request: pytest.FixtureRequest) -> None:
    with pytest.raises(DecodeError) as refused:
        wrong()
    assert refused.value.parameter in request.node.name


@pytest.mark.parametrize("junk", [None, 3, [3], [None], ["a"]])
def test_what_a_drafter_returns_is_looked_at(junk: object) -> None:
    def drafter(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        return junk  # type: ignore[return-value]

    with pytest.raises(DecodeError, match="drafter"):
        list(as_chain(drafter)((1, 2)))
