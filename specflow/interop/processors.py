"""transformers' logits processors as the processor of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Final, final

import torch
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor
from torch.nn import Module
from transformers import LogitsProcessorList

from specflow.distribution import Categorical, Distribution, PointMass
from specflow.errors import DecodeError
from specflow.finite import finite, is_near
from specflow.prefix import common_prefix
from specflow.state import Tokens

REMEMBERED: Final = 64
"""How many positions of a text stateful processors can be taken back by."""

STATEFUL: Final = frozenset({"SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"})
"""The processors of transformers' own that are not functions of the prefix."""


def most_likely(scores: Tensor) -> PointMass:
    """Greedy choice: certainty of the largest of `scores` [V].

    >>> most_likely(torch.tensor([0.0, 3.0, 1.0]))
    PointMass(token=1)
    """
    return PointMass(int(scores.argmax()))


def sampled(scores: Tensor) -> Categorical:
    """Sampling: softmax of `scores` [V].

    >>> sampled(torch.tensor([0.25, 0.75]).log()).probs
    tensor([0.2500, 0.7500])
    """
    return Categorical(F.softmax(scores, dim=-1))


@final
@define(eq=False)
class ProcessorList:
    """A `LogitsProcessorList` in a decoder: law = choose(processors(prefix, logits)), as `generate` has it.

    Each position is processed in fp32 with exactly the prefix that stands before it, drafts included. transformers'
    own processors are functions of that prefix. Others may have a state: they are copied at each position, and the
    copies of refused drafts are dropped, so that the one whose law a token is drawn from has seen exactly the committed
    prefixes, in order, each once. What was given is not called, only its copies are. One list is for one text and its
    branches, and for the target or the drafter, not for both.

    `before` are tokens that processors see and the model does not, such as padding. Processors that were made for a
    batch see the text in all of its `batch` rows, and `row` of their answer is taken.

    `DecodeError` for a processor that holds a model or cannot be copied, and for going back by more than 64 positions.

    >>> from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
    >>> never = ProcessorList(LogitsProcessorList([SuppressTokensLogitsProcessor([1])]))
    >>> never.laws((5,), torch.tensor([[0.0, 3.0, 1.0]]))
    (PointMass(token=2),)
    """

    processors: LogitsProcessorList
    choose: Callable[[Tensor], Distribution] = most_likely
    before: Tokens = ()
    batch: int = 1
    row: int = 0
    _tokens: Tokens = field(init=False, default=(), repr=False)
    _states: dict[int, LogitsProcessorList] = field(init=False, factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        _copied(self.processors)  # what cannot be copied is refused before a model runs

    def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[Distribution, ...]:
        """The law behind each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        if not is_near(logits):
            finite(logits, len(tokens))  # logits on a device have not been looked at
        first = len(tokens) - len(logits) + 1
        ids = torch.tensor(self.before + tokens, device=logits.device).expand(self.batch, -1)
        state, laws = self._state_before(tokens, first), []
        for length, row in enumerate(logits, start=first):
            self._states[length] = state
            state = _copied(state)
            scores = state(ids[:, : len(self.before) + length], row.float().repeat(self.batch, 1))
            laws.append(self.choose(scores[self.row]))
        self._states[len(tokens) + 1] = state
        self._tokens = tokens
        while len(self._states) > REMEMBERED + len(logits):
            del self._states[sorted(self._states)[1]]  # the first is the state behind the prompt
        return tuple(laws)

    def _state_before(self, tokens: Tokens, length: int) -> LogitsProcessorList:
        """The processors as they are when they have seen the prefixes shorter than `length`; what is longer goes."""
        if all(map(_is_stateless, self.processors)):
            return self.processors
        if not min(self._states, default=length) <= length <= common_prefix(self._tokens, tokens) + 1:
            self._states = {}  # a text that they have not followed from its prompt on is a new one
        state = self._states.get(length, None if self._states else self.processors)
        if state is None:
            happened = f"stateful processors cannot go back by more than {REMEMBERED} positions"
            raise DecodeError("processors", happened, f"position {length}", "start again from the prompt")
        self._states = {at: kept for at, kept in self._states.items() if at < length}
        return state


def _is_stateless(processor: object) -> bool:
    kind = type(processor)
    return kind.__module__.startswith("transformers.") and kind.__name__ not in STATEFUL


def _copied(processors: LogitsProcessorList) -> LogitsProcessorList:
    return LogitsProcessorList(
        [processor if _is_stateless(processor) else _copy_of(processor) for processor in processors]
    )


def _copy_of(processor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    name = type(processor).__name__
    if any(isinstance(value, Module) for value in vars(processor).values()):
        remedy = "use processors that hold no model"
        raise DecodeError("processors", "a processor that runs a model cannot be taken back", name, remedy)
    try:
        return deepcopy(processor)
    except Exception as error:
        happened = f"a processor with a state cannot be copied ({error})"
        raise DecodeError("processors", happened, name, "give it a __deepcopy__") from error
