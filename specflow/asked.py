"""What users' parts answer, looked at before it is used: logits, laws and drafts. A refusal names who said it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isnan
from numbers import Integral

import numpy
from attrs import evolve
from torch import Tensor

from specflow.distribution import BlackBox, Categorical, Distribution, Origin, PointMass, flaw, no_law
from specflow.errors import DecodeError
from specflow.guards.checks import is_id, named, shown
from specflow.guards.finite import is_near
from specflow.laws import Laws, Lazily
from specflow.processors import EachPrefix, LogitsProcessor, Processor
from specflow.randomness import Randomness
from specflow.state import BEFORE, Predictor, Proposal, Tokens


def rows_of(predictor: Predictor, tokens: Tokens, drafts: Sequence[Proposal] = (), parameter: str = "target") -> Tensor:
    """`predictor(tokens, drafts)`, which has to be logits [n + 1, V]."""
    rows = len(drafts) + 1
    return looked_at(predictor(tokens, drafts), rows, predictor, len(tokens) + len(drafts), parameter)


def looked_at(logits: object, rows: int, predictor: object, end: int, parameter: str = "target") -> Tensor:
    """`logits`, which have to be [rows, V]; `end` is the length of the text that was read."""
    if (
        isinstance(logits, Tensor)
        and logits.ndim == 2
        and logits.shape[0] == rows
        and logits.shape[1] > 0
        and logits.is_floating_point()
        and not logits.is_meta
    ):
        return logits.detach() if logits.requires_grad else logits
    raise no_rows(logits, rows, predictor, end, parameter)


def no_rows(logits: object, rows: int, predictor: object, end: int, parameter: str) -> DecodeError:
    """The error that names who gave something else than logits [rows, V]."""
    what = shown(logits)
    if isinstance(logits, Tensor):
        what = f"{logits.dtype} of shape {list(logits.shape)} on {logits.device.type}"
    happened = f"the {parameter} {named(predictor)} gives no rows of logits"
    where = f"{what} for a text up to position {end - 1}"
    return DecodeError(parameter, happened, where, f"return floats of shape [{rows}, V]")


def laws_of(processor: Processor, tokens: Tokens, logits: Tensor) -> Laws:
    """What the processor answers, each law looked at when it is asked for.

    Laws on a device are looked at where a number of theirs arrives. A tuple of those stays one, to be drawn from at
    once.
    """
    laws = processor.laws(tokens, logits)
    name, rows = named(_within(processor)), len(logits)
    try:
        count = len(laws)
    except TypeError:
        count = -1
    if count != rows:
        received = f"{count} for {rows} rows" if count >= 0 else shown(laws)
        where = f"{received} after the token at position {len(tokens) - rows}"
        raise DecodeError("processor", f"{name} does not give a law for each row", where, "return one law for each row")
    origin = Origin(name, logits, len(tokens) - rows + 1)
    quick = (
        isinstance(processor, LogitsProcessor)
        and type(processor).laws is LogitsProcessor.laws
        and type(processor).__call__ is LogitsProcessor.__call__
    )
    if quick and isinstance(laws, tuple) and {type(law) for law in laws} == {PointMass}:
        return laws  # each is an index of its row

    def checked(row: int) -> Distribution:
        law = laws[row]
        return _own(law, row, origin) if quick else _anyones(law, row, origin)

    if isinstance(laws, tuple) and any(isinstance(law, Categorical) and not is_near(law.probs) for law in laws):
        return tuple([checked(row) for row in range(rows)])
    return Lazily(rows, checked)


def _within(processor: object) -> object:
    """Whom to name: a function that was made a processor is known by its own name."""
    return processor.law if isinstance(processor, EachPrefix) else processor


def _own(law: Distribution, row: int, origin: Origin) -> Distribution:
    """A law by softmax: either it is one, or all of it is NaN."""
    if isinstance(law, PointMass):
        return law
    if is_near(law.probs) and isnan(float(law.probs[0])):
        raise no_law(law, origin.start + row, origin)
    return Categorical(law.probs, origin) if isinstance(law, Categorical) else law


def _anyones(law: Distribution, row: int, origin: Origin) -> Distribution:
    vocab_size = origin.logits.shape[1]
    far = isinstance(law, Categorical | BlackBox) and not is_near(law.probs)
    wrong = len(law.probs) != vocab_size if far else flaw(law, vocab_size) is not None  # type: ignore[union-attr]
    if wrong:
        raise no_law(law, origin.start + row, origin)
    return Categorical(law.probs, origin) if isinstance(law, Categorical) else law


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


def proposal_of(drafter: object, value: object, number: int, vocab_size: int | None) -> Proposal:
    """Proposal number `number` of a stream: a token that can be one, after its parent, with a law that it may have."""
    if not isinstance(value, Proposal):
        happened = f"the drafter {named(drafter)} proposes what is no Proposal"
        raise DecodeError("drafter", happened, shown(value), "yield Proposal(token, q, source)")
    _is_named(drafter, value.source)
    parent: object = value.parent
    if type(parent) is not int or not BEFORE <= parent < number:
        if type(parent) is bool or not isinstance(parent, Integral) or not BEFORE <= int(parent) < number:
            happened = f"draft {number} of the source {value.source!r} does not come after its parent"
            raise DecodeError("drafter", happened, shown(value), "yield parents first")
        value = evolve(value, parent=int(parent))
    token = value.token
    if type(token) is not int or token < 0 or (vocab_size is not None and token >= vocab_size):
        value = evolve(value, token=_id(token, value.source, vocab_size))
    q = value.q
    if isinstance(q, PointMass):
        if q.token != value.token:
            raise no_draft(value, f"certainty of token {shown(q.token)}")
    elif not isinstance(q, Categorical | BlackBox):
        raise no_draft(value, shown(q))
    return value


def _is_named(drafter: object, source: object) -> None:
    if not isinstance(source, str):
        happened = f"the drafter {named(drafter)} names its drafts by what is no str"
        raise DecodeError("drafter", happened, shown(source), "give the source a name")


def _id(token: object, source: object, vocab_size: int | None) -> int:
    if not is_id(token):
        happened = f"the source {source!r} drafts what is no token id"
        raise DecodeError("drafter", happened, shown(token), "draft plain ints, such as int(logits.argmax())")
    number = int(token)  # type: ignore[call-overload] # it is an id
    fits(number, source, vocab_size)
    return number  # type: ignore[no-any-return]


def fits(token: int, source: object, vocab_size: int | None) -> None:
    """Refuses a token outside the vocabulary, where that is known."""
    if vocab_size is not None and token >= vocab_size:
        happened = f"the source {source!r} drafts a token outside the vocabulary of {vocab_size}"
        raise DecodeError("drafter", happened, token, "use a drafter with the target's tokenizer")


def no_draft(draft: Proposal, what: str) -> DecodeError:
    """The error that names who proposed a draft with a law that it cannot have been drawn from."""
    return DecodeError(
        "drafter",
        f"the source {draft.source!r} drafts token {draft.token} with a q that it was not drawn from",
        what,
        "give the law that the token was drawn from, such as PointMass(token)",
    )
