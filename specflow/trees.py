"""Trees of drafts: how they hang together, and how a function of texts reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy
import torch
from attrs import evolve
from numpy.typing import NDArray
from torch import Tensor

from specflow.asked import looked_at, rows_of
from specflow.checks import calls
from specflow.state import TEXT, Predictor, Proposal, Tokens, chain, parents_of

Rows: TypeAlias = Callable[[Tokens, int], Tensor]
"""(tokens, last) → logits [last, V] of what follows each of the last `last` prefixes. A pure function of tokens."""


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


def path_by_path(rows: Rows) -> Predictor:
    """A predictor made of what gives the last rows of one text: each path down to a leaf, one after the other.

    It serves the models that cannot read a tree in one pass.

    >>> sums = lambda tokens, last: torch.tensor(tokens).cumsum(0)[-last:, None].float()
    >>> path_by_path(sums)((1, 1), (Proposal(5), Proposal(6, parent=TEXT), Proposal(7, parent=0)))[:, 0].tolist()
    [2.0, 7.0, 8.0, 14.0]
    """
    calls("a function of texts", "give one of (tokens, last)")("rows", rows)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        parents = parents_of(drafts)
        if is_chain(parents):
            text = tokens + tuple([draft.token for draft in drafts])
            return looked_at(rows(text, len(drafts) + 1), len(drafts) + 1, rows, len(text), "predictor")
        known: dict[int, Tensor] = {}
        for leaf in leaves(parents):
            path = path_to(parents, leaf)
            text = tokens + tuple([drafts[i].token for i in path])
            logits = looked_at(rows(text, len(path) + 1), len(path) + 1, rows, len(text), "predictor")
            known |= zip((TEXT, *path), logits, strict=True)
        return torch.stack([known[i] for i in range(TEXT, len(drafts))])

    return predict


def along_paths(model: Callable[[Tokens], Tensor]) -> Predictor:
    """A predictor made of any function of one text that gives a row of logits [V]: the meaning of all faster ones.

    >>> along_paths(lambda tokens: torch.tensor([float(sum(tokens))]))((1, 1), (Proposal(5), Proposal(6))).tolist()
    [[2.0], [7.0], [13.0]]
    """
    calls("a function of a text", "give one that returns logits [V]")("model", model)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        parents = parents_of(drafts)
        texts = [tokens + tuple([drafts[k].token for k in path_to(parents, i)]) for i in range(TEXT, len(drafts))]
        return torch.stack([looked_at(model(text)[None], 1, model, len(text), "predictor")[0] for text in texts])

    return predict


def last_rows(predictor: Predictor, tokens: Tokens, last: int, name: str = "predictor") -> Tensor:
    """Logits [last, V] of what follows each of the last `last` prefixes of a text, in one reading.

    >>> sums = along_paths(lambda tokens: torch.tensor([float(sum(tokens))]))
    >>> last_rows(sums, (1, 1, 5), 2).tolist()
    [[2.0], [7.0]]
    """
    end = len(tokens) - last + 1
    return rows_of(predictor, tokens[:end], chain(tokens[end:]), name)
