"""How much of a text is known: compared token by token, however it is compared."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from specflow.prefix import NEAR, PIECE, begins, common_prefix, parting


def naive_common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40), st.integers(0, 40))
def test_common_prefix(a: list[int], b: list[int], shared: int) -> None:
    for left, right in ((a, b), (a, a[:shared] + b), (a, a)):
        common = naive_common_prefix(left, right)
        assert common_prefix(left, right) == common_prefix(left, tuple(right)) == common <= parting(left, right)
        assert begins(left, tuple(right)) == (common == len(left))


@given(st.integers(0, 3 * PIECE), st.integers(0, 2 * NEAR), st.integers(0, 2 * NEAR), st.booleans())
@example(2 * PIECE, 0, 1, False)
@example(PIECE, 1, 1, False)
def test_common_prefix_of_long_texts(shared: int, more: int, others: int, twice: bool) -> None:
    beginning = tuple(i % 7 for i in range(shared))
    a, b = beginning + (8,) * more, beginning + (9,) * others
    if twice:  # they part once, and end alike
        a, b = (*a, *range(NEAR)), (*b, *range(NEAR))
    for left, right in ((a, b), (b, a)):
        common = naive_common_prefix(left, right)
        assert common_prefix(left, right) == common <= parting(left, right) <= min(len(left), len(right))
        assert begins(list(left), right) == (common == len(left))
