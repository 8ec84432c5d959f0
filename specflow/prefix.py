"""How much of a text is known already. Whatever is compared is compared truly, token by token, and quickly.

Texts that grow from one another hold the same int objects, which lists of Python compare five times as fast as tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import ne
from typing import Final

from specflow.guards.ids import Tokens, ids_of

NEAR: Final = 64
"""How near the end `parting` looks."""

TEXTS: Final = 4
"""How many texts are remembered by what remembers texts: enough for a few decodes that take turns."""

PIECE: Final = 1024
"""How many tokens of two texts `common_prefix` compares at once."""


def tokens_of(tokens: object) -> Tokens:
    """A tuple as it is, and the ids of whatever else plainly holds some; `DecodeError` for what holds none.

    >>> tokens_of((1, 2)), tokens_of([1, 2])
    ((1, 2), (1, 2))
    """
    return tokens if isinstance(tokens, tuple) else ids_of("tokens", tokens)


def begins(known: list[int], tokens: Tokens) -> bool:
    """Whether `tokens` begin with what is `known`."""
    beginning = list(tokens)
    del beginning[len(known) :]
    return beginning == known


def parting(a: Sequence[int], b: Sequence[int]) -> int:
    """Where a and b are seen to part when the last `NEAR` tokens before the end of the shorter are looked at.

    They share no more than this, perhaps less. It costs the same however long they are.
    """
    top = min(len(a), len(b))
    low = max(0, top - NEAR)
    return low + common_prefix(a[low:top], b[low:top])


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many tokens, or characters, a and b share from their beginnings on."""
    top = min(len(a), len(b))
    for low in range(0, top, PIECE):
        x, y = list(a[low : low + PIECE]), list(b[low : low + PIECE])
        if x != y:
            differ = [*map(ne, x, y)]
            return low + (differ.index(True) if True in differ else top - low)
    return top
