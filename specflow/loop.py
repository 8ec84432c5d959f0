"""Start a decode, and repeat a step until the text ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy
from numpy.typing import NDArray
from returns.result import Failure, Result, Success
from torch import Tensor

from specflow.errors import DecodeError
from specflow.guards.checks import calls, is_id, is_whole, named, shown
from specflow.guards.ids import ids_of
from specflow.lossy import Lossy
from specflow.protocols import Limits, checked_limits
from specflow.state import DecodeState, Finished, Reason, Request, Step, Tokens, a_state

SPEC_NAMES: Final = {"prompt": "inputs", "max_new_tokens": "max_gen_len", "stop": "eos_tokens_id"}
"""What the spec's functions call the parameters of `start`."""

LARGEST: Final = 2**63
"""No id and no length is this large: models read ids of 64 bits, one of them for the sign."""

REMEDY: Final = "use the tokenizer that belongs to the target"


def start(
    prompt: Sequence[int] | Tensor | NDArray[numpy.integer],
    max_new_tokens: int,
    stop: Iterable[int] | Tensor = (),
    limits: Limits = Limits(),
) -> Result[DecodeState, DecodeError]:
    """The state before the first step, or why there cannot be one. Nothing is run.

    The text ends after `max_new_tokens`, after a token in `stop`, or where the model's context is full. Ids may be in a
    row of whole numbers of torch or numpy too. Refused: an empty prompt, ids that are not ints or outside the
    vocabulary, a prompt longer than the context, a `max_new_tokens` that is negative or no whole number.

    >>> start([5, 6], max_new_tokens=3).unwrap().room
    3
    >>> print(start([], max_new_tokens=3).failure())
    the prompt is empty: received no tokens; give at least one token, such as the model's bos.
    """
    try:
        return Success(_started(prompt, max_new_tokens, stop, limits))
    except DecodeError as error:
        return Failure(error)


def _started(prompt: object, max_new_tokens: object, stop: object, limits: object) -> DecodeState:
    limits = checked_limits(limits, "limits")
    tokens = _ids("prompt", prompt, limits.vocab_size, REMEDY)
    stops = frozenset(_ids("stop", stop, limits.vocab_size, f"{REMEDY}, or give [] for a text that no token ends"))
    if not tokens:
        remedy = "give at least one token, such as the model's bos"
        raise DecodeError("prompt", "the prompt is empty", "no tokens", remedy)
    if limits.context is not None and len(tokens) > limits.context:
        happened = f"the prompt is longer than the target's context of {limits.context}"
        raise DecodeError("prompt", happened, f"{len(tokens)} tokens", "shorten the prompt")
    remedy = "give 0 or more tokens"
    if not is_id(max_new_tokens):
        what = "negative" if is_whole(max_new_tokens) else "not a whole number"
        raise DecodeError("max_new_tokens", f"the number of new tokens is {what}", shown(max_new_tokens), remedy)
    limit = len(tokens) + int(max_new_tokens)
    limit = limit if limits.context is None else min(limit, limits.context)
    if limit >= LARGEST:
        raise DecodeError("max_new_tokens", "no text is that long", shown(max_new_tokens), "give fewer tokens")
    return DecodeState(Request(tokens, limit, stops, limits.vocab_size), tokens)


def _ids(name: str, given: object, vocab_size: int | None, remedy: str) -> Tokens:
    """Ids of the vocabulary as plain ints, whatever they came in."""
    if isinstance(given, Tensor | numpy.ndarray) and given.ndim != 1:
        received, flat = f"shape {list(given.shape)}", "give whole numbers of shape [n], one text"
        raise DecodeError(name, f"{name} is not a row of ids", received, flat)
    if isinstance(given, Iterable) and not isinstance(given, Sequence | Mapping | Tensor | numpy.ndarray):
        given = list(given)
    tokens = ids_of(name, given)
    for token in tokens:
        if not 0 <= token < (LARGEST if vocab_size is None else vocab_size):
            size = "the vocabulary" if vocab_size is None else f"the vocabulary of {vocab_size}"
            raise DecodeError(name, f"a token id is outside {size}", token, remedy)
    return tokens


def unfold(step: Step, state: DecodeState) -> Iterator[DecodeState | Finished]:
    """Every outcome of repeating `step`, the last one `Finished`: for streaming, and for stepping by hand.

    Whatever was yielded stays valid when the iteration is interrupted; `unfold(step, outcome)` goes on from it.
    A state without room finishes at once and runs nothing. `DecodeError` for a step that adds nothing to the text, or
    returns no state.

    >>> from specflow import Dice, GreedyProcessor, autoregressive_step
    >>> from specflow.testing import TableModel
    >>> step = autoregressive_step(TableModel(5, seed=1), GreedyProcessor(), Dice())
    >>> *states, end = unfold(step, start((0,), 3).unwrap())
    >>> [state.tokens for state in states], end.state.tokens
    ([(0, 4), (0, 4, 2)], (0, 4, 2, 4))
    """
    _is_step("step", step)
    a_state("state", state)
    return _outcomes(step, state)


def _outcomes(step: Step, state: DecodeState) -> Iterator[DecodeState | Finished]:
    outcome: DecodeState | Finished = state
    while isinstance(outcome, DecodeState):
        outcome = _longer(step, outcome, step(outcome)) if outcome.room > 0 else Finished(outcome, Reason.LIMIT)
        yield outcome


def grow(step: Step, state: DecodeState) -> Iterator[tuple[Tokens, DecodeState | Finished]]:
    """`unfold`, each outcome with the tokens that its step added: for all who stream.

    A text that has no room ends without new tokens. `DecodeError` as in `unfold`.

    >>> from specflow.state import Request
    >>> counting = lambda state: DecodeState(state.request, (*state.tokens, len(state.tokens)))
    >>> [tokens for tokens, outcome in grow(counting, DecodeState(Request((7,), 3), (7,)))]
    [(1,), (2,), ()]
    """
    return _growing(unfold(step, state), len(state.tokens))


def _growing(
    outcomes: Iterator[DecodeState | Finished], length: int
) -> Iterator[tuple[Tokens, DecodeState | Finished]]:
    for outcome in outcomes:
        tokens = (outcome.state if isinstance(outcome, Finished) else outcome).tokens
        yield tokens[length:], outcome
        length = len(tokens)


def run(step: Step, state: DecodeState) -> Finished:
    """The end of the text that begins with `state`. `DecodeError` as in `unfold`.

    >>> from specflow import Dice, GreedyProcessor, autoregressive_step
    >>> from specflow.testing import TableModel
    >>> end = run(autoregressive_step(TableModel(5, seed=1), GreedyProcessor(), Dice()), start((0,), 3).unwrap())
    >>> end.state.tokens, end.reason.value
    ((0, 4, 2, 4), 'length limit')
    """
    outcome: DecodeState | Finished = state
    for outcome in unfold(step, state):  # noqa: B007 - only the last outcome is wanted
        pass
    assert isinstance(outcome, Finished)
    return outcome


def once(first: Step, then: Step) -> Step:
    """`first` for the first step of a text, `then` for all others. The spec's `first_target` is one of these."""
    _is_step("first", first)
    _is_step("then", then)
    return lambda state: first(state) if state.tally.steps == 0 else then(state)


_is_step = calls("a step", "compose one, such as speculative_step(…)")


def _longer(step: Step, before: DecodeState, outcome: object) -> DecodeState | Finished:
    """The outcome of a step; refused if a text could go on like this for ever."""
    remedy = "return the next DecodeState, or Finished"
    if isinstance(outcome, Lossy):
        remedy = "make it a step that runs with accept_loss, if its loss is wanted"
    if not isinstance(outcome, DecodeState | Finished):
        raise DecodeError("step", f"the step {named(step)} returns no state", shown(outcome), remedy)
    after = outcome.state if isinstance(outcome, Finished) else outcome
    new = len(after.tokens) - len(before.tokens)
    if new < 0 or (new == 0 and outcome is after):
        received = f"a text of {len(after.tokens)} tokens after one of {len(before.tokens)}"
        raise DecodeError("step", f"the step {named(step)} adds nothing", received, "emit at least one token")
    return outcome
