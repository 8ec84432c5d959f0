"""The conformance kit: whatever was read, drafted, refused and gone back to, a predictor answers like a fresh pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from itertools import islice
from math import inf
from random import Random
from typing import TypeAlias, final

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from specflow.predictor import CachedPredictor, Limits, limits_of
from specflow.state import TEXT, Node, Predictor, Tokens, TreePredictor


class Move(Enum):
    """What a step of the script does to the text before it reads."""

    READ = "read"
    DRAFT = "draft"
    ACCEPT = "accept"
    REJECT = "reject"
    FORK = "fork"
    RETURN = "return to an old state"


@final
@frozen
class Divergence:
    """One row that differs: the logits behind the token at `position`, in step `step` of the script."""

    step: int
    move: Move
    position: int
    difference: float


@final
@frozen
class Conformance:
    """What the script found. `divergences` are the rows that differ by more than `tolerance`, in order.

    >>> print(Conformance(2, 3, 0.5, 1e-9, (Divergence(1, Move.FORK, 7, 0.5),)))
    1 of 3 rows differ; the first in step 1 (fork) behind token 7, by 0.5 where 1e-09 is allowed; by at most 0.5
    """

    steps: int
    rows: int
    largest: float
    tolerance: float
    divergences: tuple[Divergence, ...]

    @property
    def holds(self) -> bool:
        """Whether every row was within the tolerance."""
        return not self.divergences

    @override
    def __str__(self) -> str:
        if self.holds:
            found = f"{self.rows} rows in {self.steps} steps differ by at most {self.largest:.2g}"
            return f"{found} ({self.tolerance:g} is allowed)"
        first = self.divergences[0]
        return (
            f"{len(self.divergences)} of {self.rows} rows differ; the first in step {first.step} ({first.move.value}) "
            f"behind token {first.position}, by {first.difference:.2g} where {self.tolerance:g} is allowed; "
            f"by at most {self.largest:.2g}"
        )


Reading: TypeAlias = tuple[Move, Tokens, int]
"""Why, which text, and how many of its last rows."""


def conformance(
    predictor: Predictor,
    fresh: Predictor,
    vocab_size: int,
    *,
    tolerance: float,
    seed: int = 0,
    steps: int = 60,
    longest: int = 64,
    prune: Callable[[Tokens], object] | None = None,
) -> Conformance:
    """Walks `predictor` through a random script of `steps` readings and compares each with `fresh`.

    The law: predictor(tokens, last) = fresh(tokens, last) whatever was read before. The script, which `seed` decides,
    reads on, drafts token by token, verifies drafts and accepts or rejects them, leaves its text for another and comes
    back. Texts have at most `longest` tokens; where something depends on the length (a window, a capacity), go past it.
    `prune`, where given, is told the text that stands after some of the drafts.

    >>> logits = lambda tokens, last: torch.arange(len(tokens) - last, len(tokens))[:, None] + torch.zeros(1, 4)
    >>> conformance(logits, logits, 4, tolerance=0.0).holds
    True
    >>> conformance(lambda tokens, last: logits(tokens[1:], last), logits, 4, tolerance=0.0).largest
    1.0
    """
    rows, largest, divergences = 0, 0.0, []
    for step, (move, tokens, last) in enumerate(islice(_script(vocab_size, seed, longest, prune), steps)):
        differences = _differences(predictor(tokens, last), fresh(tokens, last))
        rows, largest = rows + last, max(largest, *differences)
        divergences += [
            Divergence(step, move, len(tokens) - last + row, difference)
            for row, difference in enumerate(differences)
            if not difference <= tolerance
        ]
    return Conformance(steps, rows, largest, tolerance, tuple(divergences))


def model_conformance(
    model: Module,
    *,
    predictor: CachedPredictor | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    steps: int = 60,
    longest: int = 64,
) -> Conformance:
    """`conformance` of a model's memo with plain calls of the model, which must be in evaluation mode.

    `predictor` is a `CachedPredictor(model)` unless given. The tolerance is absolute, on logits: 1e-9 for an fp64
    model, 1e-4 for others. Models that compute parts of themselves in fp32 need fp32's in fp64 too.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2))
    >>> model_conformance(model.double().eval(), steps=20).holds
    True
    """
    parameter = next(model.parameters(), torch.empty(0))
    memo = CachedPredictor(model) if predictor is None else predictor
    limits = limits_of(model)

    @torch.no_grad()
    def fresh(tokens: Tokens, last: int) -> Tensor:
        logits: Tensor = model(torch.tensor([tokens], device=parameter.device)).logits[0, -last:]
        return logits

    return conformance(
        memo,
        fresh,
        _vocabulary(limits, fresh),
        tolerance=tolerance if tolerance is not None else 1e-9 if parameter.dtype == torch.float64 else 1e-4,
        seed=seed,
        steps=steps,
        longest=longest if limits.context is None else min(longest, limits.context),
        prune=memo.prune,
    )


def through_trees(target: TreePredictor, vocab_size: int, *, seed: int = 0) -> Predictor:
    """What a predictor of trees says along one path of each tree, the others being made by chance: for `conformance`.

    >>> from specflow import path_by_path
    >>> logits = lambda tokens, last: torch.tensor(tokens).cumsum(0)[-last:, None]
    >>> through_trees(path_by_path(logits), 4)((1, 2, 3), 2).tolist()
    [[3], [6]]
    """
    random = Random(seed)

    def predict(tokens: Tokens, last: int) -> Tensor:
        text, path = tokens[: len(tokens) - last + 1], tokens[len(tokens) - last + 1 :]
        nodes: list[Node] = []
        wanted = [TEXT]
        for token in path:
            for _ in range(random.randrange(3)):
                other = random.randrange(vocab_size - 1)
                nodes.append(
                    Node(other + (other >= token), random.choice((wanted[-1], random.randrange(-1, len(nodes)))))
                )
            nodes.append(Node(token, wanted[-1]))
            wanted.append(len(nodes) - 1)
        return target(text, nodes)[[i + 1 for i in wanted]]

    return predict


def _vocabulary(limits: Limits, fresh: Predictor) -> int:
    return fresh((0,), 1).shape[-1] if limits.vocab_size is None else limits.vocab_size


def _script(vocab_size: int, seed: int, longest: int, prune: Callable[[Tokens], object] | None) -> Iterator[Reading]:
    """An endless script of readings."""
    random = Random(seed)

    def some(most: int, least: int = 1) -> Tokens:
        return tuple(random.randrange(vocab_size) for _ in range(random.randint(least, most)))

    text = some(min(8, longest))
    old = [text]
    yield Move.READ, text, 1
    while True:
        move = random.choice(list(Move))
        draft = some(5)
        if len(text) + len(draft) + 1 > longest:
            move = Move.RETURN
        match move:
            case Move.READ:
                text += draft
                yield move, text, random.randint(1, len(draft))
            case Move.DRAFT:
                for end in range(1, len(draft) + 1):
                    yield move, text + draft[:end], 1
            case Move.ACCEPT | Move.REJECT:
                text += some(1)
                draft = draft[: longest - len(text)]
                yield move, text + draft, len(draft) + 1
                text += draft if move is Move.ACCEPT else draft[: random.randrange(len(draft))] if draft else ()
                if prune is not None and random.random() < 0.5:
                    prune(text)
            case Move.FORK:
                old.append(text)
                text = (*text[: max(0, len(text) - random.randint(1, 6))], *draft)
                yield move, text, 1
            case Move.RETURN:
                text = random.choice(old)
                yield move, text, random.randint(1, min(3, len(text)))


def _differences(ours: Tensor, theirs: Tensor) -> list[float]:
    """The largest difference of each row; ∞ where either holds a NaN. Equal infinities differ by nothing."""
    theirs = theirs.to(ours)
    apart = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).nan_to_num(nan=inf, posinf=inf)
    found: list[float] = apart.amax(dim=-1).tolist()
    return found
