"""Streaming: transformers' streamers, asynchronous iteration, and stopping criteria."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

from specflow.batch.modes import modes_now, within
from specflow.errors import DecodeError
from specflow.guards.checks import does, shown
from specflow.loop import grow
from specflow.state import DecodeState, Finished, Step, Tokens

T = TypeVar("T")

Growing: TypeAlias = Iterator[tuple[Tokens, DecodeState | Finished]]
"""What `grow` says of a text: the new tokens of each step, and its outcome."""


class Streamer(Protocol):
    """What we ask of a streamer; transformers' `TextStreamer` and its relatives are some."""

    def put(self, value: Tensor, /) -> object:
        """Take the prompt, as [1, n], and then each new token, as [1]: what `generate` puts."""
        ...

    def end(self) -> object:
        """The text has ended, or an error has ended it."""
        ...


def stream(step: Step, state: DecodeState, streamer: Streamer) -> Finished:
    """`run(step, state)`, with the text so far and then the new tokens, as they come, put into `streamer`.

    Whatever happens, an error or Ctrl-C, the streamer is ended once. With an asynchronous streamer, run it in a thread:
    `asyncio.to_thread(stream, step, state, streamer)`.

    >>> from specflow import start
    >>> class Printing:  # in real life a TextStreamer
    ...     def put(self, value): print(value.tolist())
    ...     def end(self): print("the end")
    >>> counting = lambda state: DecodeState(state.request, (*state.tokens, len(state.tokens)))
    >>> stream(counting, start([0], 2).unwrap(), Printing()).state.tokens
    [[0]]
    [1]
    [2]
    the end
    (0, 1, 2)
    """
    growing = grow(step, state)
    does("a streamer", "give a TextStreamer, or anything with put and end", "put", "end")("streamer", streamer)
    with ended(streamer):
        streamer.put(torch.tensor([state.tokens], device="cpu"))
        return put_through(growing, streamer)


@contextmanager
def ended(streamer: Streamer | None) -> Iterator[None]:
    """Ends the streamer, if there is one, when the block ends, however that ends."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def put_through(growing: Growing, streamer: Streamer) -> Finished:
    """The end of a text that grows, with each new token put into `streamer`."""
    for new, outcome in growing:
        for token in new:
            streamer.put(torch.tensor([token], device="cpu"))
        if isinstance(outcome, Finished):
            return outcome
    raise AssertionError("a text ends")


def new_tokens(step: Step, state: DecodeState) -> AsyncGenerator[Tokens, None]:
    """The new tokens of each step, as they come. Each step runs in a thread, so that others can run meanwhile.

    The thread has the caller's context variables and torch's modes: gradients, inference mode, autocast.

    Left early (a `break`, a cancelled task), it takes no further step. Cancelled while a step runs, it waits for the
    end of that step: when it is gone, nothing of it runs, and its step and predictor can be used again.

    >>> from specflow import start
    >>> async def collect():
    ...     counting = lambda state: DecodeState(state.request, (*state.tokens, len(state.tokens)))
    ...     return [tokens async for tokens in new_tokens(counting, start([0], 3).unwrap())]
    >>> asyncio.run(collect())
    [(1,), (2,), (3,)]
    """
    return _new_tokens(grow(step, state))


async def _new_tokens(growing: Growing) -> AsyncGenerator[Tokens, None]:
    while (grown := await _next(growing)) is not None:
        if grown[0]:
            yield grown[0]


async def _next(growing: Iterator[T]) -> T | None:
    """The next step, from a thread. A task that is cancelled meanwhile stays until the thread is done with it."""
    context, modes = copy_context(), modes_now()

    def grown() -> T | None:
        with within(modes):
            return next(growing, None)

    running = asyncio.get_running_loop().run_in_executor(None, context.run, grown)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait((running,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        running.exception()  # looked at: nobody is left whom it could tell anything
        raise cancelled
    return running.result()


def stops(criteria: Sequence[Callable[..., object]]) -> Callable[[DecodeState], bool]:
    """A `StoppingCriteriaList` as the condition of `stages.StopWhen`.

    Criteria see the ids [1, n] after each committed token, in order, and no scores (None, as in `generate`); so a
    criterion with a state sees exactly the committed prefixes, each once. They are for one text.

    >>> from transformers import MaxLengthCriteria
    >>> from specflow import start
    >>> is_over = stops([MaxLengthCriteria(3)])
    >>> [is_over(start(ids, 9).unwrap()) for ids in ([1, 2], [1, 2, 3])]
    [False, True]
    """
    return condition(criteria, (), torch.device("cpu"))


def condition(criteria: object, before: Tokens, device: torch.device) -> Callable[[DecodeState], bool]:
    """The same for criteria that see ids on a device, and tokens before the text that the model does not see."""
    if not isinstance(criteria, list | tuple):
        raise DecodeError("criteria", "criteria are not a list", shown(criteria), "give a StoppingCriteriaList")
    for criterion in criteria:
        if not callable(criterion) or isinstance(criterion, LogitsProcessor):
            happened = "a criterion cannot be called as one is"
            raise DecodeError("criteria", happened, shown(criterion), "give functions of ids")
    asked = StoppingCriteriaList(criteria)
    return lambda state: bool(asked(torch.tensor([before + state.tokens], device=device), None).any())
