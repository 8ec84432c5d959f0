"""The spec's logits processors, and the law that each one draws from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Protocol, final

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Tensor
from typing_extensions import override

from specflow.distribution import BlackBox, Categorical, Distribution, PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import calls, described, is_floats, number, valid, whole
from specflow.guards.checks import temperature as check_temperature
from specflow.guards.finite import NOTICED, chosen, finite, is_near
from specflow.guards.ids import text_of
from specflow.laws import Laws, Lazily
from specflow.state import Tokens

_TOP_K: Final = whole(1, "keep at least one token")
_TOP_P: Final = number("top_p is outside (0, 1]", "use 1.0 to keep every token", lambda top_p: 0 < top_p <= 1)


class Processor(Protocol):
    """Turns a model's logits into the laws that tokens are drawn from.

    >>> class Coldest:
    ...     def laws(self, tokens, logits, /):
    ...         return tuple([PointMass(token) for token in logits.argmax(-1).tolist()])
    >>> from specflow import Dice, autoregressive_step, run, start
    >>> from specflow.testing import TableModel
    >>> run(autoregressive_step(TableModel(5, seed=1), Coldest(), Dice()), start((0,), 3).unwrap()).state.output
    (4, 2, 4)
    """

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`, row k - 2 all but the last.

        A processor that is total, one that has a law after any text, makes them all at once, as a tuple. Any other
        makes them `Lazily`.

        Logits on a device have not been looked at: where tokens are chosen from them here, `guards.finite.finite`
        refuses those that are not finite.
        """
        ...


@final
@frozen
class EachPrefix:
    """A processor made of a function: (prefix, logits [V] after it) → the law of what follows the prefix.

    It is asked about a prefix only once the text, or a draft that may stand, has come that far, and never after a stop
    token. So a strict automaton, which refuses what is not in its language, never hears of a draft that it forbids. A
    prefix may be asked about again.

    >>> def no_repeat(prefix, logits):
    ...     return PointMass(int(logits.index_fill(0, torch.tensor(prefix[-1]), -torch.inf).argmax()))
    >>> EachPrefix(no_repeat).laws((2, 1), torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]))[1]
    PointMass(token=2)
    """

    law: Callable[[Tokens, Tensor], Distribution] = field(
        validator=valid(calls("a law", "give a function of a prefix and the logits after it"))
    )

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Lazily:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        _rows(logits)
        tokens = text_of(tokens)
        first = len(tokens) - len(logits) + 1
        if first < 0:
            happened, remedy = f"logits have more rows than a text of {len(tokens)} has prefixes", "give the text's own"
            raise DecodeError("logits", happened, f"{len(logits)} rows", remedy)
        return Lazily(len(logits), lambda row: self.law(tokens[: first + row], logits[row]))


class LogitsProcessor(ABC):
    """softmax(_process(logits) / temperature), and a way to choose from it. Subclass it to write your own.

    A subclass needs `_process` and `sample` and works everywhere. Where `sample` is one of ours its law is known
    (one-hot for greedy, the probabilities for the others) and drafts are verified against that law. Where it is not,
    the sampler is used as it is, by sample-and-match, which is exact whatever it does.

    1e-30 ≤ temperature ≤ 1e30, else `DecodeError`.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        check_temperature("temperature", temperature)
        self.temperature = float(temperature)

    def __call__(self, logits: Tensor) -> Tensor:
        """Probabilities of the shape of `logits` [..., V], in at least fp32. The input is never written to."""
        exact = torch.promote_types(_floats("logits", logits).dtype, torch.float32)  # 16 bits would round what is added
        scores = _floats(type(self).__name__, self._process(logits.to(exact, copy=True)))
        if scores.shape != logits.shape:
            happened, remedy = f"{type(self).__name__} changes the shape of its logits", "return as many as came"
            raise DecodeError("processor", happened, f"{list(scores.shape)} for {list(logits.shape)}", remedy)
        return F.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)) / float(self.temperature), dim=-1)

    @abstractmethod
    def _process(self, logits: Tensor) -> Tensor:
        """The logits that the softmax is taken of, made of a copy of the model's in at least fp32."""

    @abstractmethod
    def sample(self, probs: Tensor) -> Tensor:
        """One token for each row of `probs` [..., V], as [..., 1]."""

    def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[Distribution, ...]:
        """The law that `sample` draws from, for each row of `logits` [k, V]."""
        _rows(logits)
        kind = type(self)
        if kind.sample is GreedyProcessor.sample:
            # The argmax of the logits: their softmax may round two of them to one number.
            untouched = kind._process is GreedyProcessor._process and kind.__call__ is LogitsProcessor.__call__
            scores = logits if untouched else self(logits)
            # Where there is no largest score there is no law: its softmax is NaN, and is noticed if it is asked for.
            return tuple(
                [
                    PointMass(token) if token != NOTICED else Categorical(scores[row].softmax(-1))
                    for row, token in enumerate(chosen(scores))
                ]
            )
        probs = self(logits)
        if kind.sample is MultinomialProcessor.sample:
            return tuple([Categorical(row) for row in probs.unbind()])
        if not is_near(logits):
            finite(logits, len(tokens))  # nobody knows what a sampler makes of them
        return tuple([BlackBox(row, self.sample) for row in probs.unbind()])


class GreedyProcessor(LogitsProcessor):
    """Always the most probable token. `__call__` still gives the full softmax, as the spec has it.

    >>> greedy = GreedyProcessor()
    >>> greedy.sample(greedy(torch.tensor([0.1, 2.0, 0.3]))).item()
    1
    """

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return logits

    @override
    def sample(self, probs: Tensor) -> Tensor:
        """argmax, as [..., 1]."""
        return _floats("probs", probs).argmax(dim=-1, keepdim=True)


class MultinomialProcessor(LogitsProcessor):
    """Sampling from the full law.

    p = softmax(logits / temperature). 1e-30 ≤ temperature ≤ 1e30, else `DecodeError`.

    >>> MultinomialProcessor(temperature=0.5)(torch.tensor([0.5, 0.3, 0.2]).log())
    tensor([0.6579, 0.2368, 0.1053])
    """

    def __init__(self, temperature: float) -> None:
        super().__init__(temperature)

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return logits

    @override
    def sample(self, probs: Tensor) -> Tensor:
        """One draw for each row, from torch's default generator, as [..., 1]."""
        rows = _floats("probs", probs).reshape(-1, probs.shape[-1])
        try:
            return torch.multinomial(rows, num_samples=1).reshape(*probs.shape[:-1], 1)
        except RuntimeError as error:  # torch has looked at them
            remedy = "give probabilities that sum to more than 0"
            raise DecodeError("probs", "a row is not a law", str(error), remedy) from error


class TopKProcessor(MultinomialProcessor):
    """Sampling from the k most probable tokens: exactly k of them, ties broken as `torch.topk` does.

    top_k ≥ 1, else `DecodeError`; more than the vocabulary keeps everything.

    >>> TopKProcessor(temperature=1.0, top_k=1)(torch.tensor([0.1, 2.0, 0.3]))
    tensor([0., 1., 0.])
    """

    def __init__(self, temperature: float, top_k: int) -> None:
        super().__init__(temperature)
        _TOP_K("top_k", top_k)
        self.top_k = int(top_k)

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return _keep_top_k(logits, self.top_k)


class NucleusProcessor(MultinomialProcessor):
    """Sampling from the nucleus: the smallest set of tokens whose probabilities, at this temperature, reach top_p.

    0 < top_p ≤ 1, else `DecodeError`. Source: Holtzman et al. 1904.09751, section 3.1.

    >>> NucleusProcessor(temperature=1.0, top_p=0.6)(torch.tensor([0.5, 0.3, 0.2]).log())
    tensor([0.6250, 0.3750, 0.0000])
    """

    def __init__(self, temperature: float, top_p: float) -> None:
        super().__init__(temperature)
        _TOP_P("top_p", top_p)
        self.top_p = float(top_p)

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return _keep_nucleus(logits, self.temperature, self.top_p)


class TopKNucleusProcessor(MultinomialProcessor):
    """Sampling from the nucleus of the k most probable tokens.

    The top k come first; the nucleus is the smallest set of those k tokens whose probabilities among themselves, at
    this temperature, reach top_p. top_k ≥ 1 and 0 < top_p ≤ 1, else `DecodeError`.

    >>> TopKNucleusProcessor(temperature=1.0, top_k=2, top_p=0.6)(torch.tensor([0.5, 0.3, 0.2]).log())
    tensor([1., 0., 0.])
    """

    def __init__(self, temperature: float, top_k: int, top_p: float) -> None:
        super().__init__(temperature)
        _TOP_K("top_k", top_k)
        self.top_k = int(top_k)
        _TOP_P("top_p", top_p)
        self.top_p = float(top_p)

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return _keep_nucleus(_keep_top_k(logits, self.top_k), self.temperature, self.top_p)


def _floats(name: str, value: object) -> Tensor:
    if not is_floats(value) or value.ndim == 0 or value.shape[-1] == 0:
        happened, remedy = f"{name} gives no tensor of floats [..., V]", "give logits or probabilities"
        raise DecodeError(name, happened, described(value), remedy)
    return value


def _rows(logits: object) -> None:
    shape = _floats("logits", logits).shape
    if len(shape) != 2 or shape[0] == 0:
        raise DecodeError("logits", "logits are not rows", f"shape {list(shape)}", "give logits [k, V]")


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    best = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)


def _keep_nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    if top_p == 1.0:
        return logits  # a rounded cumulative sum reaches 1 before the last token does
    ordered = logits.sort(dim=-1, descending=True)
    probs = F.softmax(ordered.values.to(torch.promote_types(logits.dtype, torch.float32)) / float(temperature), dim=-1)
    # A token stays while the mass before it falls short of top_p; the first always does.
    outside = probs.cumsum(dim=-1) - probs >= top_p
    outside[..., 0] = False  # in fp32 a top_p below 7e-46 is 0
    return logits.masked_fill(outside.scatter(-1, ordered.indices, outside), -torch.inf)
