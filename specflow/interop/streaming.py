"""Streaming: transformers' streamers, asynchronous iteration, and stopping criteria."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from specflow.loop import unfold
from specflow.state import DecodeState, Finished, Step, Tokens


class Streamer(Protocol):
    """What we ask of a streamer; transformers' `TextStreamer` and its relatives are some."""

    def put(self, value: Tensor, /) -> object:
        """Take the prompt, and then the new tokens of each step, as [k]."""
        ...

    def end(self) -> object:
        """The text has ended."""
        ...


def stream(step: Step, state: DecodeState, streamer: Streamer) -> Finished:
    """`run(step, state)`, with the text so far and then the new tokens of each step put into `streamer`.

    With an asynchronous streamer, run it in a thread: `asyncio.to_thread(stream, step, state, streamer)`.
    """
    streamer.put(torch.tensor(state.tokens))
    outcome: DecodeState | Finished = state
    for outcome in unfold(step, state):
        after = outcome.state if isinstance(outcome, Finished) else outcome
        if len(after.tokens) > len(state.tokens):
            streamer.put(torch.tensor(after.tokens[len(state.tokens) :]))
        state = after
    streamer.end()
    assert isinstance(outcome, Finished)
    return outcome


async def new_tokens(step: Step, state: DecodeState) -> AsyncIterator[Tokens]:
    """The new tokens of each step, as they come. Each step runs in a thread, so that others can run meanwhile.

    Left early (a `break`, a cancelled task), it takes no further step; one that has begun is finished by its thread.

    >>> from specflow import start
    >>> async def collect():
    ...     counting = lambda state: DecodeState(state.request, (*state.tokens, len(state.tokens)))
    ...     return [tokens async for tokens in new_tokens(counting, start([0], 3).unwrap())]
    >>> asyncio.run(collect())
    [(1,), (2,), (3,)]
    """
    outcomes = unfold(step, state)
    while (outcome := await asyncio.to_thread(next, outcomes, None)) is not None:
        after = outcome.state if isinstance(outcome, Finished) else outcome
        if len(after.tokens) > len(state.tokens):
            yield after.tokens[len(state.tokens) :]
        state = after


def stops(criteria: StoppingCriteriaList, before: Tokens = ()) -> Callable[[DecodeState], bool]:
    """A `StoppingCriteriaList` as the condition of `stages.StopWhen`.

    Criteria see the ids [1, n] after each committed token, in order, and no scores; so a criterion with a state sees
    exactly the committed prefixes. `before` are tokens that criteria see and the model does not, such as padding.
    """

    def hold(state: DecodeState) -> bool:
        return bool(criteria(torch.tensor([before + state.tokens]), ()).any())

    return hold
