"""Trees of drafts: how their nodes hang together, and how any predictor reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from specflow.asked import no_rows, node_of
from specflow.checks import calls
from specflow.state import TEXT, Node, Predictor, Tokens, TreePredictor


def path_to(nodes: Sequence[Node], node: int) -> list[int]:
    """The numbers of the nodes from the text down to `node`, itself included.

    >>> path_to((Node(5), Node(6), Node(7, parent=0)), 2)
    [0, 2]
    """
    path = []
    while node != TEXT:
        path.append(node)
        node = nodes[node].parent
    return path[::-1]


def path_along(nodes: Sequence[Node], tokens: Tokens) -> list[int]:
    """The numbers of the nodes that `tokens` follow from the text on, as far as there are any.

    >>> path_along((Node(5), Node(6), Node(7, parent=0)), (5, 7, 9))
    [0, 2]
    """
    children = children_of(nodes)
    path: list[int] = []
    for token in tokens:
        following = children.get(path[-1] if path else TEXT, {}).get(token)
        if following is None:
            break
        path.append(following)
    return path


def children_of(nodes: Sequence[Node]) -> dict[int, dict[int, int]]:
    """parent → token → node, the first of equals; only parents that have children are there.

    >>> children_of((Node(5), Node(6), Node(7, parent=0)))
    {-1: {5: 0, 6: 1}, 0: {7: 2}}
    """
    children: dict[int, dict[int, int]] = {}
    for i, node in enumerate(nodes):
        children.setdefault(node.parent, {}).setdefault(node.token, i)
    return children


def leaves(nodes: Sequence[Node]) -> list[int]:
    """The nodes that no other follows.

    >>> leaves((Node(5), Node(6), Node(7, parent=0)))
    [1, 2]
    """
    inner = {node.parent for node in nodes}
    return [i for i in range(len(nodes)) if i not in inner]


def preorder(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The same tree, each node followed by all that is below it, its first child first.

    So the likeliest path lies together, if the likeliest child comes first.

    >>> [node.token for node in preorder((Node(5), Node(6), Node(7, parent=0)))]
    [5, 7, 6]
    """
    children: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(i)
    number = {TEXT: TEXT}
    waiting = children.get(TEXT, [])[::-1]
    while waiting:
        i = waiting.pop()
        number[i] = len(number) - 1
        waiting += children.get(i, [])[::-1]
    ordered = [nodes[i] for i in number if i != TEXT]
    return tuple([Node(node.token, number[node.parent], node.chance, node.source) for node in ordered])


def depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors each node has.

    >>> depths([TEXT, 0, 1, 0, TEXT])
    [0, 1, 2, 1, 0]
    """
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent == TEXT else found[parent] + 1)
    return found


def lineage(parents: Sequence[int]) -> NDArray[numpy.bool_]:
    """Which nodes each node sees, [n, n]: its ancestors and itself.

    >>> lineage([TEXT, TEXT, 0]).astype(int).tolist()
    [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    """
    seen = numpy.eye(len(parents), dtype=numpy.bool_)
    for i, parent in enumerate(parents):
        if parent != TEXT:
            seen[i] |= seen[parent]
    return seen


def path_by_path(predictor: Predictor) -> TreePredictor:
    """Any predictor reads a tree: each path from the text down to a leaf, one after the other.

    It tells what a tree's logits are, and serves the models that cannot read a tree in one pass.

    >>> sums = lambda tokens, last: torch.tensor(tokens).cumsum(0)[-last:, None]
    >>> path_by_path(sums)((1, 1), (Node(5), Node(6), Node(7, parent=0)))[:, 0].tolist()
    [2, 7, 8, 14]
    """

    calls("a predictor", "give a function of (tokens, last), such as a CachedPredictor")("predictor", predictor)

    def read(tokens: Tokens, nodes: Sequence[Node]) -> Tensor:
        for number, node in enumerate(nodes):
            node_of(predictor, node, number, None)
        rows: dict[int, Tensor] = {}
        for leaf in leaves(nodes) or [TEXT]:
            path = path_to(nodes, leaf)
            drafted = tuple([nodes[i].token for i in path])
            logits: object = predictor(tokens + drafted, len(path) + 1)
            if not (isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(path) + 1):
                raise no_rows(logits, len(path) + 1, predictor, len(tokens) + len(path), "predictor")
            rows |= zip((TEXT, *path), logits, strict=True)
        return torch.stack([rows[i] for i in range(TEXT, len(nodes))])

    return read
