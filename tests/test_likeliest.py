"""Trees that are drafted the likeliest first: against all paths, and what is asked for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import islice
from random import Random

import pytest

from specflow import TEXT, DecodeError, Tokens
from specflow.drafters import Candidate, likeliest_first


def known(seed: int) -> Callable[[Tokens], tuple[Candidate, ...]]:
    """What follows each path, up to four drafts deep; many of the chances are equal."""

    @cache
    def followers(path: Tokens) -> tuple[Candidate, ...]:
        random = Random(f"{seed} {path}")
        tokens = random.sample(range(9), random.randrange(4) if len(path) < 4 else 0)
        return tuple([Candidate(token, random.choice((0.5, 0.25, 0.125)), f"of {len(path)}") for token in tokens])

    return followers


def chances_of(followers: Callable[[Tokens], tuple[Candidate, ...]]) -> dict[Tokens, float]:
    """All paths, each with the product of its chances, which are powers of two."""
    chances: dict[Tokens, float] = {(): 1.0}
    todo: list[Tokens] = [()]
    for path in todo:
        for token, chance, _ in followers(path):
            chances[*path, token] = chances[path] * chance
            todo.append((*path, token))
    return chances


def longer(path: Tokens, token: int) -> Tokens:
    return (*path, token)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_drafts_are_the_likeliest_of_all_paths(seed: int) -> None:
    followers = known(seed)
    chances = chances_of(followers)
    text: Tokens = ()
    drafts = list(likeliest_first(text, followers, longer))
    paths: list[Tokens] = []
    for draft in drafts:
        before = () if draft.parent == TEXT else paths[draft.parent]
        paths.append((*before, draft.token))
        assert draft.chance == chances[paths[-1]]
        assert draft.source == f"of {len(before)}"
    assert sorted(paths) == sorted(chances.keys() - {()})
    assert [draft.chance for draft in drafts] == sorted((chances[path] for path in paths), reverse=True)
    # Of equals the one that was offered first: after the earlier draft, and there in the order of the answer.
    offers = [(path, offer.token) for path in ((), *paths) for offer in followers(path)]
    ranks = [offers.index((path[:-1], path[-1])) for path in paths]
    pairs = zip(zip(paths, ranks, strict=True), islice(zip(paths, ranks, strict=True), 1, None), strict=False)
    assert all(chances[one] > chances[other] or i < j for (one, i), (other, j) in pairs)


def test_nothing_is_asked_about_drafts_that_nobody_took() -> None:
    asked: list[int] = []

    def followers(place: int) -> tuple[Candidate, ...]:
        asked.append(place)
        return Candidate(place + 1, 0.5), Candidate(place + 2, 0.3)

    stream = likeliest_first(0, followers, lambda place, token: token)
    assert asked == []
    assert [draft.token for draft in islice(stream, 3)] == [1, 2, 2]
    assert asked == [0, 1, 2]  # the third draft, another 2, was not asked about


@pytest.mark.parametrize("function", [None, 3, "ab"])
def test_what_is_no_function_is_refused_at_once(function: object) -> None:
    with pytest.raises(DecodeError):
        likeliest_first(0, function, lambda place, token: token)  # type: ignore[arg-type]
    with pytest.raises(DecodeError):
        likeliest_first(0, lambda place: (), function)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "offered",
    [
        None,
        3,
        [3],
        [(1, 0.5, "a")],
        [Candidate(-1, 0.5)],
        [Candidate(1, 2.0)],
        [Candidate(1, float("nan"))],
        [Candidate(1, "a")],  # type: ignore[arg-type]
        [Candidate(1, 0.5, 3)],  # type: ignore[arg-type]
    ],
)
def test_what_is_no_candidate_is_refused(offered: object) -> None:
    def the_offers(place: int) -> object:
        return offered

    stream = likeliest_first(0, the_offers, lambda place, token: token)  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match="the_offers"):
        next(stream)
