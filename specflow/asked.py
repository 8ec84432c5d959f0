"""What users' parts answer, looked at before it is used: logits, laws and drafts. A refusal names who said it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import isnan
from typing import Protocol, TypeVar, cast

import numpy
from attrs import evolve
from torch import Tensor

from specflow.distribution import BlackBox, Categorical, Distribution, Origin, PointMass, flaw, no_law, normalised
from specflow.errors import DeadEndError, DecodeError
from specflow.guards.checks import described, is_floats, is_id, named, shown
from specflow.guards.finite import is_near
from specflow.laws import Laws, Lazily
from specflow.processors import EachPrefix, LogitsProcessor, Processor
from specflow.protocols import ReadsFeatures
from specflow.randomness import Randomness
from specflow.state import Predictor, Proposal, Tokens
from specflow.trees import no_draft

T = TypeVar("T")


def rows_of(predictor: Predictor, tokens: Tokens, drafts: Sequence[Proposal] = (), parameter: str = "target") -> Tensor:
    """`predictor(tokens, drafts)`, which has to be logits [n + 1, V]."""
    rows = len(drafts) + 1
    return looked_at(predictor(tokens, drafts), rows, predictor, len(tokens) + len(drafts), parameter)


def looked_at(logits: object, rows: int, predictor: object, end: int, parameter: str = "target") -> Tensor:
    """`logits`, which have to be [rows, V]; `end` is the length of the text that was read."""
    if is_floats(logits) and logits.ndim == 2 and logits.shape[0] == rows and logits.shape[1] > 0:
        return logits.detach() if logits.requires_grad else logits
    happened = f"the {parameter} {named(predictor)} gives no rows of logits"
    where = f"{described(logits)} for a text up to position {end - 1}"
    raise DecodeError(parameter, happened, where, f"return floats of shape [{rows}, V]")


def features_of(showing: ReadsFeatures, tokens: Tokens, last: int, parameter: str = "target") -> Tensor:
    """`showing.features(tokens, last)`, which has to be floats [last, F]."""
    rows: object = showing.features(tokens, last)
    if is_floats(rows) and rows.ndim == 2 and rows.shape[0] == last and rows.shape[1] > 0:
        return rows.detach() if rows.requires_grad else rows
    happened, remedy = f"the {parameter} {named(showing)} shows no rows of features", f"return floats [{last}, F]"
    raise DecodeError(parameter, happened, described(rows), remedy)


def laws_of(processor: Processor, tokens: Tokens, logits: Tensor) -> Laws:
    """What the processor answers, each law looked at, and one that is not ours `normalised`, when it is asked for.

    Laws on a device are looked at where a number of theirs arrives. A tuple of those stays one, to be drawn from at
    once.
    """
    return _seen(processor.laws(tokens, logits), processor, len(tokens), logits)


def law_after(processor: Processor, tokens: Tokens, row: Tensor) -> Distribution | None:
    """The law of the token after a text, made of logits `row` [V]; None where the processor lets none follow."""
    try:
        return laws_of(processor, tokens, row[None])[0]
    except DeadEndError:
        return None


def _seen(laws: Laws, processor: Processor, end: int, logits: Tensor) -> Laws:
    """`laws` that were made of `logits` [k, V], the last of them after a text of `end` tokens."""
    rows, quick = logits.shape[0], _is_ours(processor)
    if quick and isinstance(laws, tuple) and {*map(type, laws)} == {PointMass}:
        return laws  # each is an index of its row
    # A function that was made a processor is known by its own name.
    name = named(processor.law if isinstance(processor, EachPrefix) else processor)
    try:
        count = len(laws)
    except TypeError:
        count = -1
    if count != rows:
        received = f"{count} for {rows} rows" if count >= 0 else shown(laws)
        where = f"{received} after the token at position {end - rows}"
        raise DecodeError("processor", f"{name} does not give a law for each row", where, "return one law for each row")
    origin = Origin(name, logits, end - rows + 1)

    def checked(row: int) -> Distribution:
        law = laws[row]
        if isinstance(law, Categorical) and law.by is not None and len(law.probs) == logits.shape[1]:
            return law  # the processor inside made it, and it was looked at there
        if not (_is_softmax(law) if quick else _is_law(law, logits.shape[1])):
            raise no_law(law, origin.start + row, origin)
        if not isinstance(law, Categorical):
            return law
        return Categorical(law.probs if quick else normalised(law.probs), origin)

    if isinstance(laws, tuple) and any(isinstance(law, Categorical) and not is_near(law.probs) for law in laws):
        return tuple([checked(row) for row in range(rows)])
    return Lazily(rows, checked)


def laws_when_asked(processor: Processor, tokens: Tokens, logits: Tensor) -> Laws:
    """The same, and on the host our own processors make a law only then: after a rejection nobody asks."""
    rows = logits.shape[0]
    if rows == 1 or not is_near(logits) or not _is_ours(processor):
        return laws_of(processor, tokens, logits)
    first = len(tokens) - rows + 1

    def made(row: int) -> Distribution:
        alone = logits[row : row + 1]
        return _seen(processor.laws(tokens, alone), processor, first + row, alone)[0]  # of the row alone

    return Lazily(rows, made)


def _is_ours(processor: Processor) -> bool:
    """Whether each law is a softmax, or an index, of its row alone."""
    kind = type(processor)
    ours = LogitsProcessor
    return issubclass(kind, ours) and kind.laws is ours.laws and kind.__call__ is ours.__call__


def _is_softmax(law: Distribution) -> bool:
    """Whether a softmax is a law: it is, or all of it is NaN."""
    return isinstance(law, PointMass) or not is_near(law.probs) or not isnan(float(law.probs[0]))


def _is_law(law: Distribution, vocab_size: int) -> bool:
    if isinstance(law, Categorical | BlackBox) and not is_near(law.probs):
        return len(law.probs) == vocab_size
    return flaw(law, vocab_size) is None


def accepts(rng: Randomness, probability: float) -> bool:
    """`rng.accept(probability)`, which has to be True or False."""
    said: object = rng.accept(probability)
    if isinstance(said, bool | numpy.bool_):
        return bool(said)
    raise DecodeError("rng", f"{named(rng)} takes no decision", shown(said), "return True or False")


def stream_of(drafter: object, stream: object) -> Iterator[object]:
    """What a drafter returned, as an iterator."""
    if isinstance(stream, Iterable):
        return iter(stream)
    happened = f"the drafter {named(drafter)} gives no stream"
    raise DecodeError("drafter", happened, shown(stream), "yield proposals, or return an iterator over them")


class Doing(Protocol):
    """Does some work, and hands on what it returns: `lambda work: work()`, with a clock read before and after."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def done_by(doing: Doing, drafter: Callable[[Tokens], Iterator[T]]) -> Callable[[Tokens], Iterator[T]]:
    """The same drafter, of chains or of trees; its call and each of its proposals are work that `doing` does."""

    def stream(tokens: Tokens, /) -> Iterator[T]:
        return cast(Iterator[T], _done(doing, doing(lambda: stream_of(drafter, drafter(tokens)))))

    stream.__qualname__ = named(drafter)  # errors name the drafter
    return stream


def _done(doing: Doing, stream: Iterator[object]) -> Iterator[object]:
    following = partial(next, stream)
    while True:
        try:
            value = doing(following)
        except StopIteration:
            return
        yield value


def proposal_of(drafter: object, value: object, vocab_size: int | None) -> Proposal:
    """A proposal of a stream: a token that can be one, with a law that it may have. Its parent is not looked at.

    A q that nobody has looked at is `normalised`.
    """
    if not isinstance(value, Proposal):
        happened = f"the drafter {named(drafter)} proposes what is not a Proposal"
        raise DecodeError("drafter", happened, shown(value), "yield Proposal(token, q, source)")
    source: object = value.source
    if not isinstance(source, str):
        happened = f"the drafter {named(drafter)} names its drafts by what is not a str"
        raise DecodeError("drafter", happened, shown(source), "give the source a name")
    if not is_id(value.token):
        happened = f"the source {source!r} drafts what is not a token id"
        raise DecodeError("drafter", happened, shown(value.token), "draft plain ints, such as int(logits.argmax())")
    if type(value.token) is not int:
        value = evolve(value, token=int(value.token))
    fits(value, vocab_size)
    q = value.q
    if isinstance(q, PointMass):
        if q.token != value.token:
            raise no_draft(value, f"certainty of token {shown(q.token)}")
    elif isinstance(q, Categorical):
        if q.by is None:
            value = evolve(value, q=Categorical(normalised(q.probs)))
    elif not isinstance(q, BlackBox):
        raise no_draft(value, shown(q))
    return value


def fits(draft: Proposal, vocab_size: int | None) -> None:
    """Refuses a token outside the vocabulary, where that is known."""
    if vocab_size is not None and draft.token >= vocab_size:
        happened = f"the source {draft.source!r} drafts a token outside the vocabulary of {vocab_size}"
        raise DecodeError("drafter", happened, draft.token, "use a drafter with the target's tokenizer")
