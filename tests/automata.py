"""Small languages, each twice: a matcher, and a plain function that looks through all texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import product
from math import inf
from typing import Final, TypeAlias, final

import torch
from attrs import frozen
from torch import Tensor

from specflow import EachPrefix, Processor, Tokens
from specflow.constraints import Grammar
from specflow.distribution import Distribution
from specflow.laws import Lazily

Allowed: TypeAlias = Callable[[Tokens], frozenset[int]]
"""output → the tokens that may follow it, the end among them."""


@final
@frozen
class Brackets:
    """Well-nested brackets, at most two deep: token 0 opens, and token 1 closes."""

    depth: int = 0

    def mask(self) -> Tensor:
        """Which of the two may come."""
        return torch.tensor([self.depth < 2, self.depth > 0])

    def after(self, token: int, /) -> Brackets | None:
        """One deeper, or one less."""
        depth = {0: self.depth + 1, 1: self.depth - 1}.get(token, -1)
        return Brackets(depth) if 0 <= depth <= 2 else None

    def forced(self) -> Tokens:
        """At the deepest only closing is left."""
        return (1,) if self.depth == 2 else ()

    def may_end(self) -> bool:
        """Where all is closed."""
        return self.depth == 0


END: Final = 2
BRACKETS: Final = Grammar(Brackets, stop=(END,))

PATTERN: Final = "(a|bc)*(ca)?"
LETTERS: Final = (b"a", b"b", b"c", b"")
LETTERS_END: Final = 3
REGEX: Final = Grammar.regex(PATTERN, LETTERS, stop=(LETTERS_END,))


@cache
def in_brackets(output: Tokens) -> frozenset[int]:
    """By looking through the texts of brackets that begin with the output."""
    return _by_looking(output, _is_nested, 2, END)


@cache
def in_letters(output: Tokens) -> frozenset[int]:
    """By looking through the texts of letters that begin with the output."""
    return _by_looking(output, _is_matched, 3, LETTERS_END)


def _is_nested(text: Tokens) -> bool:
    depths = [sum(1 if token == 0 else -1 for token in text[:end]) for end in range(len(text) + 1)]
    return min(depths) >= 0 and max(depths) <= 2 and depths[-1] == 0


def _is_matched(text: Tokens) -> bool:
    return re.fullmatch(PATTERN, "".join("abc"[token] for token in text)) is not None


def _by_looking(output: Tokens, holds: Callable[[Tokens], bool], letters: int, end: int) -> frozenset[int]:
    longer = {
        token
        for token in range(letters)
        for more in range(3)
        if any(holds((*output, token, *rest)) for rest in product(range(letters), repeat=more))
    }
    return frozenset(longer | ({end} if holds(output) else set()))


@final
@frozen
class Oracle:
    """The law of `inner` over what is allowed after a prompt, without any of our code for grammars."""

    inner: Processor
    allowed: Allowed
    prompt: Tokens

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Lazily:
        """The law after each row."""
        return EachPrefix(self._law).laws(tokens, logits)

    def _law(self, prefix: Tokens, logits: Tensor) -> Distribution:
        allowed = self.allowed(prefix[len(self.prompt) :])
        scores = [float(score) if token in allowed else -inf for token, score in enumerate(logits)]
        assert max(scores) > -inf, f"no law after {prefix}: choose another seed"
        return self.inner.laws(prefix, torch.tensor([scores], dtype=logits.dtype))[0]
