"""Trees of drafts: how they hang together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from attrs import evolve
from numpy.typing import NDArray

from specflow.state import TEXT, Proposal, Tokens, parents_of


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each draft follows the one before it.

    >>> is_chain((TEXT, 0, 1)), is_chain((TEXT, TEXT))
    (True, False)
    """
    return all(parent == i - 1 for i, parent in enumerate(parents))


def path_to(parents: Sequence[int], i: int) -> list[int]:
    """The numbers of the drafts from the text down to draft i, itself included.

    >>> path_to((TEXT, TEXT, 0), 2)
    [0, 2]
    """
    path = []
    while i != TEXT:
        path.append(i)
        i = parents[i]
    return path[::-1]


def path_along(drafts: Sequence[Proposal], parents: Sequence[int], tokens: Tokens) -> list[int]:
    """The numbers of the drafts that `tokens` follow from the text on, as far as there are any.

    >>> path_along((Proposal(5), Proposal(6), Proposal(7)), (TEXT, TEXT, 0), (5, 7, 9))
    [0, 2]
    """
    path: list[int] = []
    for token in tokens:
        here = path[-1] if path else TEXT
        following = next((i for i, draft in enumerate(drafts) if parents[i] == here and draft.token == token), None)
        if following is None:
            break
        path.append(following)
    return path


def leaves(parents: Sequence[int]) -> list[int]:
    """The drafts that no other follows.

    >>> leaves((TEXT, TEXT, 0))
    [1, 2]
    """
    inner = set(parents)
    return [i for i in range(len(parents)) if i not in inner]


def preorder(drafts: Sequence[Proposal]) -> tuple[Proposal, ...]:
    """The same drafts, each followed by all that is below it, its first child first. A chain stays as it is.

    So the likeliest path lies together, if the likeliest child comes first.

    >>> [draft.token for draft in preorder((Proposal(5), Proposal(6, parent=TEXT), Proposal(7, parent=0)))]
    [5, 7, 6]
    """
    parents = parents_of(drafts)
    if is_chain(parents):
        return tuple(drafts)
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        children.setdefault(parent, []).append(i)
    number = {TEXT: TEXT}
    waiting = children.get(TEXT, [])[::-1]
    while waiting:
        i = waiting.pop()
        number[i] = len(number) - 1
        waiting += children.get(i, [])[::-1]
    return tuple([evolve(drafts[i], parent=number[parents[i]]) for i in number if i != TEXT])


def depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors each draft has.

    >>> depths([TEXT, 0, 1, 0, TEXT])
    [0, 1, 2, 1, 0]
    """
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent == TEXT else found[parent] + 1)
    return found


def lineage(parents: Sequence[int]) -> NDArray[numpy.bool_]:
    """Which drafts each draft sees, [n, n]: its ancestors and itself.

    >>> lineage([TEXT, TEXT, 0]).astype(int).tolist()
    [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    """
    seen = numpy.eye(len(parents), dtype=numpy.bool_)
    for i, parent in enumerate(parents):
        if parent != TEXT:
            seen[i] |= seen[parent]
    return seen
