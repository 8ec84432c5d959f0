"""transformers' logits processors as the processor of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isnan
from typing import Any, Final, TypeAlias, final

import torch
import torch.nn.functional as F
import transformers as tf
from attrs import define, field, frozen, setters
from torch import Tensor
from torch.nn import Module

from specflow.distribution import Categorical, Distribution, PointMass
from specflow.errors import DeadEndError, DecodeError
from specflow.guards.checks import calls, shown, valid
from specflow.guards.finite import finite, is_near
from specflow.guards.ids import ids_of
from specflow.interop.copying import Common, copies_of, is_fixed, name_of
from specflow.laws import Laws, Lazily
from specflow.prefix import common_prefix
from specflow.state import Tokens

Processing: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(ids [1, n], scores [1, V]) → scores [1, V]: what transformers calls a logits processor."""

REMEMBERED: Final = 64
"""How many positions of a text stateful processors can be taken back by."""

TOTAL: Final = frozenset(
    {
        tf.EpsilonLogitsWarper,
        tf.EtaLogitsWarper,
        tf.ExponentialDecayLengthPenalty,
        tf.InfNanRemoveLogitsProcessor,
        tf.LogitNormalization,
        tf.MinPLogitsWarper,
        tf.RepetitionPenaltyLogitsProcessor,
        tf.TemperatureLogitsWarper,
        tf.TopHLogitsWarper,
        tf.TopKLogitsWarper,
        tf.TopPLogitsWarper,
        tf.TypicalLogitsWarper,
    }
)
"""transformers' processors that are functions of the prefix and leave a law after any text. A subclass is none."""

OF_THE_PREFIX: Final = TOTAL | {
    tf.EncoderNoRepeatNGramLogitsProcessor,
    tf.EncoderRepetitionPenaltyLogitsProcessor,
    tf.ForcedBOSTokenLogitsProcessor,
    tf.ForcedEOSTokenLogitsProcessor,
    tf.MinLengthLogitsProcessor,
    tf.MinNewTokensLengthLogitsProcessor,
    tf.NoBadWordsLogitsProcessor,
    tf.NoRepeatNGramLogitsProcessor,
    tf.SequenceBiasLogitsProcessor,
    tf.SuppressTokensAtBeginLogitsProcessor,
    tf.SuppressTokensLogitsProcessor,
    tf.WatermarkLogitsProcessor,
}
"""Those that are functions of the prefix; after some texts they may forbid every token."""


def refuse_uncallable(name: str, part: object) -> None:
    """`DecodeError` for what cannot be called. Modules and lists that can be are called in `generate` too."""
    if not callable(part) or isinstance(part, type):
        raise DecodeError(name, f"{name} cannot be called", shown(part), "give functions of ids and scores")
    if isinstance(part, Module) and any(weight.is_meta for weight in part.parameters()):
        raise DecodeError(name, f"{name} cannot be called", "a module on the meta device", "load its weights")


@final
@frozen
class Stateless:
    """Says of a processor, or of a `prefix_allowed_tokens_fn`, that it is a function of its arguments: never copied.

    >>> table = {5: [1, 2]}
    >>> Stateless(lambda batch, ids: table[int(ids[-1])])(0, torch.tensor([5]))
    [1, 2]
    """

    processor: Callable[..., Any] = field(validator=valid(refuse_uncallable))

    # Whatever the processor says: it stands where the processor stood.
    def __call__(self, *arguments: object) -> Any:  # noqa: ANN401
        """What the processor says."""
        return self.processor(*arguments)


def most_likely(scores: Tensor) -> PointMass:
    """Greedy choice: certainty of the largest of `scores` [V]. `DeadEndError` where all are -∞, `DecodeError` at a NaN.

    >>> most_likely(torch.tensor([0.0, 3.0, 1.0]))
    PointMass(token=1)
    """
    _refuse_none(_row(scores), "the scores are no law", "no token has a chance")
    return PointMass(int(scores.argmax()))


def sampled(scores: Tensor) -> Categorical:
    """Sampling: softmax of `scores` [V]. A row that is none gives NaN, which whoever draws from it refuses.

    >>> sampled(torch.tensor([0.25, 0.75]).log()).probs
    tensor([0.2500, 0.7500])
    """
    return Categorical(F.softmax(_row(scores), dim=-1))


@final
@frozen(eq=False)
class InRow:
    """A processor of a batch, asked about one of its rows: that row stands in all of them, with the padding before."""

    processor: Processing
    before: Tokens
    device: torch.device
    batch: int = 1
    row: int = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        ids, scores = ids.to(self.device), scores.to(self.device)
        if self.before:
            ids = torch.cat([torch.tensor([self.before], device=self.device), ids], dim=1)
        if self.batch == 1:
            return self.processor(ids, scores)
        said: object = self.processor(ids.repeat(self.batch, 1), scores.repeat(self.batch, 1))
        if not isinstance(said, Tensor):
            happened = "a processor gave no scores"
            raise DecodeError("processors", happened, shown(said), "return scores [batch, vocabulary]")
        return said[self.row : self.row + 1]


def is_of_the_prefix(processor: object) -> bool:
    """Whether a processor is known, or was declared, to be a function of the prefix."""
    if isinstance(processor, InRow):
        return is_of_the_prefix(processor.processor)
    if type(processor) is tf.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return isinstance(allowed, Stateless) or is_fixed(allowed)
    return isinstance(processor, Stateless) or type(processor) in OF_THE_PREFIX


def parts_of(processors: Sequence[Processing]) -> tuple[Processing, ...]:
    """The processors of a list, in order; of a list that has its own way to call them, that list."""
    given: object = processors
    if not isinstance(given, list | tuple):
        raise DecodeError("processors", "processors are not a list", shown(given), "give a LogitsProcessorList")
    own_way = isinstance(given, tf.LogitsProcessorList) and (
        type(given).__call__ is not tf.LogitsProcessorList.__call__
    )
    parts = (given,) if own_way else tuple(given)
    for part in parts:
        refuse_uncallable("processors", part)
    return parts


_is_choice: Final = calls("a choice", "give most_likely or sampled")


@final
@define(eq=False)
class InOrder:
    """A `LogitsProcessorList` for one text, asked as `generate` asks it: law = choose(processors(prefix, logits)).

    The processors themselves are called, about each committed prefix once and in order, whatever state they keep and
    wherever they keep it. Each position is processed in fp32. It costs what it costs in `generate`.

    `DecodeError` where it is asked to go back, or to leave a prefix out; `ProcessorList` can go back.

    >>> from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
    >>> never = InOrder(LogitsProcessorList([SuppressTokensLogitsProcessor([1])]))
    >>> never.laws((5,), torch.tensor([[0.0, 3.0, 1.0]]))[0]
    PointMass(token=2)
    """

    processors: tuple[Processing, ...] = field(converter=parts_of, on_setattr=setters.frozen)
    choose: Callable[[Tensor], Distribution] = field(default=most_likely, validator=valid(_is_choice))
    _is_stateless: bool = field(init=False, repr=False)
    _seen: Tokens = field(init=False, default=(), repr=False)
    _end: tuple[str, str, object, str] | None = field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        self._is_stateless = all(map(is_of_the_prefix, self.processors))

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V], made when it is asked for; row k - 1 follows all of `tokens`."""
        return _laws(self.processors, tokens, logits, self._law)

    def _law(self, ids: Tensor, prefix: Tokens, scores: Tensor) -> Distribution:
        if not self._is_stateless and self._seen:
            if self._end is not None and prefix == self._seen:
                raise DeadEndError(*self._end)  # known since the draft was accepted; now the next step asks
            if prefix[:-1] != self._seen:
                happened = "processors in order are asked about each prefix of one text once"
                received = f"a prefix of {len(prefix)} tokens after one of {len(self._seen)}"
                raise DecodeError("processors", happened, received, "make one for each text, or use ProcessorList")
        self._seen, self._end = prefix, None  # even if the processors fail there: they may have changed by then
        try:
            return _law(self.processors, self.choose, ids, scores)
        except DeadEndError as error:
            self._end = error.parameter, error.happened, error.received, error.remedy
            raise


@final
@define(eq=False)
class ProcessorList:
    """A `LogitsProcessorList` that can go back: law = choose(processors(prefix, logits)), as `generate` has it.

    Each position is processed in fp32 with exactly the prefix that stands before it. Processors that are functions of
    it (transformers' own, but for those with a state, and what is named `Stateless`) are called as they are. Others may
    have a state: they are copied at each position, and the copies of rejected drafts are dropped, so that the one whose
    law a token is drawn from has seen exactly the prefixes of its text that were asked about, in order, each once. What
    was given is not called, only its copies are. One list is for one text and its branches, and for the target or the
    drafter, not for both. Where nothing goes back, `InOrder` copies nothing.

    `DecodeError` for a processor of which there is no sound copy (state in closures, in attributes of functions or
    classes, in globals, in what cannot be copied), for another text, and for going back by more than 64 positions.

    >>> from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
    >>> never = ProcessorList(LogitsProcessorList([SuppressTokensLogitsProcessor([1])]))
    >>> never.laws((5,), torch.tensor([[0.0, 3.0, 1.0]]))[0]
    PointMass(token=2)
    """

    processors: tuple[Processing, ...] = field(converter=parts_of, on_setattr=setters.frozen)
    choose: Callable[[Tensor], Distribution] = field(default=most_likely, validator=valid(_is_choice))
    _first: tuple[Processing, ...] = field(init=False, repr=False)
    _is_stateless: bool = field(init=False, repr=False)
    _tokens: Tokens = field(init=False, default=(), repr=False)
    _root: Tokens = field(init=False, default=(), repr=False)
    _states: dict[int, tuple[Processing, ...]] = field(init=False, factory=dict, repr=False)
    _lost: int = field(init=False, default=0, repr=False)

    def __attrs_post_init__(self) -> None:
        self._is_stateless = all(map(is_of_the_prefix, self.processors))
        self._first, _ = fresh(self.processors)  # what cannot be copied is refused before a model runs

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V], made when it is asked for; row k - 1 follows all of `tokens`."""
        return _laws(self.processors, tokens, logits, self._law)

    def _law(self, ids: Tensor, prefix: Tokens, scores: Tensor) -> Distribution:
        if self._is_stateless:
            return _law(self._first, self.choose, ids, scores)
        before = self._state_before(prefix)
        after, common = fresh(before)
        law = _law(after, self.choose, ids, scores)
        common.refuse_changes("a processor keeps a state where no copy of it reaches", COPIES)
        self._tokens, self._root = prefix, self._root or prefix
        self._lost = min(self._lost, len(prefix) - 1)
        self._states = {at: state for at, state in self._states.items() if at < len(prefix)}
        self._states |= {len(prefix): before, len(prefix) + 1: after}
        while len(self._states) > REMEMBERED + 2:
            self._lost = sorted(self._states)[1]  # the first is the state after the prompt
            del self._states[self._lost]
        return law

    def _state_before(self, prefix: Tokens) -> tuple[Processing, ...]:
        """The processors that have seen what was asked about of the prefixes shorter than this one."""
        if not self._states:
            return self._first
        if prefix[: len(self._root)] != self._root:
            remedy = "make another list for another text"
            raise DecodeError("processors", "one list is for one text", f"{len(prefix)} other tokens", remedy)
        known = min(len(prefix), common_prefix(self._tokens, prefix) + 1)
        at = max(length for length in self._states if length <= known)
        if at < min(self._lost, known):
            happened = f"stateful processors cannot go back by more than {REMEMBERED} positions"
            raise DecodeError("processors", happened, f"position {len(prefix)}", "start again from the prompt")
        return self._states[at]


COPIES: Final = "use InOrder where no draft is taken back, or name it Stateless where it is a function of the prefix"
"""The remedy where a processor cannot be copied."""


def fresh(parts: tuple[Processing, ...], remedy: str = COPIES) -> tuple[tuple[Processing, ...], Common]:
    """Processors in the same state, which will not change with these."""
    return copies_of(parts, is_of_the_prefix, remedy)


def _laws(
    parts: tuple[Processing, ...],
    tokens: Tokens,
    logits: object,
    make: Callable[[Tensor, Tokens, Tensor], Distribution],
) -> Laws:
    tokens = ids_of("tokens", tokens)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not 0 < len(logits) <= len(tokens):
        received = tuple(logits.shape) if isinstance(logits, Tensor) else shown(logits)
        remedy = "give a row for each of the last k prefixes"
        raise DecodeError("logits", f"logits are not [k, V] after a text of {len(tokens)} tokens", received, remedy)
    if not is_near(logits):
        finite(logits, len(tokens))  # logits on a device have not been looked at
    try:
        ids = torch.tensor([tokens], device=logits.device)
    except (RuntimeError, ValueError) as error:  # torch has looked at them
        raise DecodeError("tokens", "a token id is beyond 64 bits", shown(max(tokens)), "give ids") from error
    first = len(tokens) - len(logits) + 1

    def law(row: int) -> Distribution:
        scores = logits[row][None].to(torch.float32, copy=True)  # processors may write to both
        return make(ids[:, : first + row].clone(), tokens[: first + row], scores)

    if all(type(part) in TOTAL for part in parts):
        return tuple([law(row) for row in range(len(logits))])
    return Lazily(len(logits), law)


def _law(
    parts: Iterable[Processing], choose: Callable[[Tensor], Distribution], ids: Tensor, scores: Tensor
) -> Distribution:
    """choose(processors(ids, scores)); `DecodeError` where that is none, naming the position and the processors.

    It is a `DeadEndError` where all are -∞.
    """
    by = ", ".join(map(name_of, parts)) or "no processor"
    for part in parts:
        said: object = part(ids, scores)
        if not isinstance(said, Tensor) or said.shape != scores.shape:
            happened = f"{name_of(part)} gave no scores of shape {tuple(scores.shape)}"
            received = tuple(said.shape) if isinstance(said, Tensor) else shown(said)
            raise DecodeError("processors", happened, received, "return scores [B, V]")
        scores = said
    where = f"nothing but -∞, or NaN, after the token at position {ids.shape[1] - 1}"
    _refuse_none(scores[0], f"the law after the processors ({by}) is none", where)
    return choose(scores[0])


def _refuse_none(scores: Tensor, happened: str, received: str) -> None:
    best = float(scores.max())
    if not best > -torch.inf:
        kind = DecodeError if isnan(best) else DeadEndError
        raise kind("processors", happened, received, "leave at least one token a chance")


def _row(scores: object) -> Tensor:
    if not isinstance(scores, Tensor) or scores.dim() != 1 or len(scores) == 0 or scores.is_meta:
        received = tuple(scores.shape) if isinstance(scores, Tensor) else shown(scores)
        raise DecodeError("scores", "scores are not [V]", received, "give the scores of one position")
    if not scores.is_floating_point():
        raise DecodeError("scores", "scores are no floats", scores.dtype, "give the scores of one position")
    return scores
