"""What a decoder is given, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeAlias, TypeVar, final

from attrs import frozen
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from specflow.batch import BatchPredictor
from specflow.bench.stopwatch import Stopwatch
from specflow.interop.llama_cpp import LlamaCpp
from specflow.loop import unfold
from specflow.predictors import CachedPredictor
from specflow.processors import LogitsProcessor
from specflow.randomness import Randomness
from specflow.state import DecodeState, Finished, Step, Tally, Tokens
from specflow.vocabulary import SharedTokens

T = TypeVar("T")


@final
@frozen(eq=False)
class Context:
    """What a decoder is made from. Each text gets its own: an empty memo, a generator seeded by the prompt.

    `target` is a predictor over `model`, or over the GGUF file that it was made of; its passes are timed. `assistant`
    is the drafting model, if there is one, and `reading` makes the predictor that it is read through; `shared` is what
    its vocabulary and the model's have in common, None where they are one, and `assistant_tokenizer` its own. What is
    learnt from a text may be kept for those of the same `repeat`: in another one that very text is asked for again.
    """

    model: Module
    target: CachedPredictor | BatchPredictor | LlamaCpp
    processor: LogitsProcessor
    rng: Randomness
    tokenizer: PreTrainedTokenizerBase
    prompt: Tokens
    assistant: Module | None
    stopwatch: Stopwatch
    reading: Callable[[Module], CachedPredictor | BatchPredictor] = partial(CachedPredictor)
    shared: SharedTokens | None = None
    assistant_tokenizer: PreTrainedTokenizerBase | None = None
    repeat: int = 0

    def timed(self, drafter: Callable[[Tokens], Iterator[T]]) -> Callable[[Tokens], Iterator[T]]:
        """The same drafter, its time reported as drafting. That of a drafter left bare counts as specflow's own."""
        return self.stopwatch.timed(drafter)


class Emit(Protocol):
    """Is told the tokens of a step as soon as they stand, and the tally of the text so far, where somebody counts."""

    def __call__(self, tokens: Tokens, tally: Tally | None, /) -> None: ...


Session: TypeAlias = Callable[[DecodeState, Emit], object]
"""Decodes one text to its end. This is what is timed."""

Prepare: TypeAlias = Callable[[Context], Session]
"""Gets a decoder ready for one text. Not timed."""

Compose: TypeAlias = Callable[[Context], Step]
"""A decoder of specflow's: `def mine(context: Context) -> Step`. It is called for each text afresh."""


def composed(compose: Compose) -> Prepare:
    """Any step as a decoder that can be measured."""

    def prepare(context: Context) -> Session:
        step = compose(context)

        def session(state: DecodeState, emit: Emit) -> None:
            for outcome in unfold(step, state):
                after = outcome.state if isinstance(outcome, Finished) else outcome
                emit(after.tokens[len(state.tokens) :], after.tally)
                state = after

        return session

    return prepare
