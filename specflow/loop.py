"""Start a decode, and repeat a step until the text ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from returns.result import Failure, Result, Success

from specflow.errors import DecodeError
from specflow.predictor import Limits
from specflow.state import DecodeState, Finished, Reason, Request, Step


def start(
    prompt: Sequence[int],
    max_new_tokens: int,
    stop: Iterable[int] = (),
    limits: Limits = Limits(),
) -> Result[DecodeState, DecodeError]:
    """The state before the first step, or why there cannot be one. Nothing is run.

    The text ends after `max_new_tokens`, after a token in `stop`, or where the model's context is full. Refused: an
    empty prompt, ids that are not ints or outside the vocabulary, a prompt longer than the context, a negative
    `max_new_tokens`.

    >>> start([5, 6], max_new_tokens=3).unwrap().room
    3
    >>> print(start([], max_new_tokens=3).failure())
    the prompt is empty: received no tokens; give at least one token, such as the model's bos.
    """
    tokens = tuple(prompt)
    stops = frozenset(stop)
    vocabulary = limits.vocab_size
    if not tokens:
        remedy = "give at least one token, such as the model's bos"
        return Failure(DecodeError("inputs", "the prompt is empty", "no tokens", remedy))
    for name, ids in (("inputs", tokens), ("eos_tokens_id", stops)):
        for token in ids:
            if type(token) is not int:
                remedy = "give plain ints, such as tokenizer(text).input_ids"
                return Failure(DecodeError(name, "a token id is not an int", repr(token), remedy))
            if token < 0 or (vocabulary is not None and token >= vocabulary):
                size = "the vocabulary" if vocabulary is None else f"the vocabulary of {vocabulary}"
                remedy = "use the tokenizer that belongs to the target"
                return Failure(DecodeError(name, f"a token id is outside {size}", token, remedy))
    if limits.context is not None and len(tokens) > limits.context:
        happened = f"the prompt is longer than the target's context of {limits.context}"
        return Failure(DecodeError("inputs", happened, f"{len(tokens)} tokens", "shorten the prompt"))
    if max_new_tokens < 0:
        remedy = "give 0 or more tokens"
        return Failure(DecodeError("max_gen_len", "the number of new tokens is negative", max_new_tokens, remedy))
    limit = len(tokens) + max_new_tokens
    return Success(
        DecodeState(Request(tokens, limit if limits.context is None else min(limit, limits.context), stops), tokens)
    )


def shared_vocabulary(target: Limits, drafter: Limits) -> Result[int | None, DecodeError]:
    """The vocabulary that drafts are expressed in: the target's. Refused if the two cannot be one vocabulary.

    Models of one tokenizer pad it differently (151936 and 152064), so the sizes may differ by 512 tokens and by a
    quarter. Exactness does not depend on this check: a drafter that means other tokens is refused at each of them.

    >>> shared_vocabulary(Limits(151936), Limits(152064)).unwrap()
    151936
    >>> print(shared_vocabulary(Limits(49152), Limits(32000)).failure())
    drafter and target have different vocabularies: received 32000 and 49152; use a drafter with the target's tokenizer.
    """
    if target.vocab_size is None or drafter.vocab_size is None:
        return Success(target.vocab_size)
    small, large = sorted((target.vocab_size, drafter.vocab_size))
    if large - small > min(512, small // 4):
        received = f"{drafter.vocab_size} and {target.vocab_size}"
        remedy = "use a drafter with the target's tokenizer"
        return Failure(DecodeError("drafter", "drafter and target have different vocabularies", received, remedy))
    return Success(target.vocab_size)


def unfold(step: Step, state: DecodeState) -> Iterator[DecodeState | Finished]:
    """Every outcome of repeating `step`, the last one `Finished`: for streaming, and for stepping by hand.

    Whatever was yielded stays valid when the iteration is interrupted; `unfold(step, outcome)` goes on from it.
    A state without room finishes at once and runs nothing.
    """
    outcome: DecodeState | Finished = state
    while isinstance(outcome, DecodeState):
        outcome = step(outcome) if outcome.room > 0 else Finished(outcome, Reason.LIMIT)
        yield outcome


def run(step: Step, state: DecodeState) -> Finished:
    """The end of the text that begins with `state`."""
    outcome: DecodeState | Finished = state
    for outcome in unfold(step, state):  # noqa: B007 - only the last outcome is wanted
        pass
    assert isinstance(outcome, Finished)
    return outcome


def once(first: Step, then: Step) -> Step:
    """`first` for the first step of a text, `then` for all others. The spec's `first_target` is one of these."""
    return lambda state: first(state) if state.tally.steps == 0 else then(state)
