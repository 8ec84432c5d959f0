"""Whether passes over a model are equal bit for bit, on the machine where it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from specflow.errors import DecodeError
from specflow.guards.checks import a, shown, whole
from specflow.paths import last_rows
from specflow.predictors import CachedPredictor, UncachedPredictor, limits_of
from specflow.predictors.reader import vocabulary_of
from specflow.state import Tokens

LENGTHS: Final = (1, 40, 300, 490, 1000)
"""How many tokens are read before the passes that are compared; after 490 they cross a border of the keys."""

PASSES: Final = tuple(range(2, 33))


@final
@frozen
class Disagreement:
    """A pass over `tokens` tokens after `length` others, and how many of its logits have other bits."""

    length: int
    tokens: int
    elements: int


@final
@frozen
class Agreement:
    """What was compared with passes over single tokens, and what differed.

    `lengths` were read first, in one pass; after each, passes over `passes` tokens, each after a rollback; and the
    whole text at once, which appears among the differences as a pass after 0 tokens. `elements` logits were compared.
    """

    dtype: str
    threads: int
    lengths: tuple[int, ...]
    passes: tuple[int, ...] = field(repr=False)
    elements: int
    differing: tuple[Disagreement, ...]

    @property
    def equal(self) -> bool:
        """Whether all bits were the same."""
        return not self.differing

    @override
    def __str__(self) -> str:
        setting = f"{self.dtype}, {self.threads} threads, passes over {min(self.passes)} to {max(self.passes)} tokens"
        if self.equal:
            return f"all {self.elements} logits are equal bit for bit ({setting}, after {self.lengths} tokens)"
        worst = max(self.differing, key=lambda difference: difference.elements)
        count = sum(difference.elements for difference in self.differing)
        return f"{count} of {self.elements} logits differ ({setting}), most in {worst}"


def check(model: Module, lengths: Iterable[int] = LENGTHS, passes: Iterable[int] = PASSES) -> Agreement:
    """Compare passes over k tokens with k passes over one, bit for bit, on any model that specflow can call.

    Texts of fixed, arbitrary tokens are used; lengths for which the model's context is too short are left out, and
    where that leaves none it is a `DecodeError`. The result holds for this machine, this number of threads
    (`torch.get_num_threads()`) and this build of torch.
    """
    a(Module, "give a model, such as AutoModelForCausalLM loads")("model", model)
    passes = tuple(sorted(set(_counts("passes", passes))))
    limits, vocab_size, most = limits_of(model), vocabulary_of(model), max(passes)
    asked = _counts("lengths", lengths)
    lengths = tuple([length for length in asked if limits.context is None or length + most <= limits.context])
    if not lengths:
        happened = f"no length leaves room for a pass over {most} tokens in a context of {limits.context}"
        raise DecodeError("lengths", happened, list(asked), "give shorter ones, and shorter passes")
    differing, compared, dtype = [], 0, "no logits"
    for length in lengths:
        text = arbitrary_text(length + most, vocab_size)
        predict = CachedPredictor(model)
        predict(text[:length], ())
        alone = torch.cat([predict(text[: length + k], ()) for k in range(1, most + 1)])
        dtype = str(alone.dtype)
        read = [(length, k, last_rows(predict, text[: length + k], k)) for k in passes]
        whole = last_rows(UncachedPredictor(model), text, most)
        for start, k, logits in (*read, (0, length + most, whole)):
            compared += logits.numel()
            elements = _differing_bits(logits, alone[: len(logits)])
            if elements:
                differing.append(Disagreement(start, k, elements))
    return Agreement(dtype, torch.get_num_threads(), lengths, passes, compared, tuple(differing))


def _counts(name: str, values: object) -> tuple[int, ...]:
    """Numbers of tokens, at least one of them."""
    remedy = "give numbers of tokens, such as (1, 40)"
    numbers: object = values.tolist() if isinstance(values, Tensor) else values
    counts = tuple(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str | bytes) else ()
    if not counts:
        raise DecodeError(name, f"{name} is not one number or more", shown(values), remedy)
    for count in counts:
        whole(1, remedy)(name, count)
    return tuple(map(int, counts))


def arbitrary_text(length: int, vocab_size: int | None) -> Tokens:
    """Tokens of no meaning, always the same ones."""
    return tuple([7919 * i * i % (vocab_size or 2) for i in range(1, length + 1)])


def _differing_bits(a: Tensor, b: Tensor) -> int:
    return int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).view(*a.shape, -1).any(-1).sum())
