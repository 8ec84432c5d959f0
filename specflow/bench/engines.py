"""What runs a target: torch, or llama.cpp. How it is read, and how its passes are watched, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, final

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.batch import BatchPredictor
from specflow.bench.stopwatch import Stopwatch, clock_for
from specflow.commands import one_sentence
from specflow.interop.llama_cpp import LlamaCpp
from specflow.policies import CostMeter, meter_of
from specflow.policies.meter import Clock
from specflow.predictors import CachedPredictor, UncachedPredictor
from specflow.state import Tokens

if TYPE_CHECKING:
    from llama_cpp import Llama

ROOM: Final = 64
"""How many drafts may lie beside one another where a text ends: without room for them trees are read path by path."""


class Engine(Protocol):
    """What runs a target."""

    def reading(self, features: tuple[int, ...] | None, clock: Clock | None) -> CachedPredictor | LlamaCpp:
        """What reads a text, and has read nothing yet. Its meter goes by `clock`, or else by its own."""
        ...

    def together(
        self, features: tuple[int, ...] | None, clock: Clock | None, slots: int
    ) -> Callable[[], BatchPredictor | LlamaCpp]:
        """What makes a predictor that reads up to `slots` texts in a pass, and has read nothing. All share a meter."""
        ...

    def watching(self, stopwatch: Stopwatch) -> AbstractContextManager[None]:
        """The target's passes within the block are `stopwatch`'s."""
        ...

    def row(self, tokens: Tokens) -> Tensor:
        """Logits [V] after a text, of a fresh pass."""
        ...


@final
@frozen(eq=False)
class Torch:
    """A module."""

    model: Module

    def reading(self, features: tuple[int, ...] | None, clock: Clock | None) -> CachedPredictor:
        """A memo of its own; what passes cost is known to all who read the model, unless a clock is given."""
        meter = meter_of(self.model) if clock is None else CostMeter(clock)
        return CachedPredictor(self.model, features=features, meter=meter)

    def together(
        self, features: tuple[int, ...] | None, clock: Clock | None, slots: int
    ) -> Callable[[], BatchPredictor | LlamaCpp]:
        """Memos of their own. Their meter is no other decoder's."""
        meter = CostMeter(clock or clock_for(self.model))
        return partial(BatchPredictor, self.model, slots, meter=meter, features=features)

    def watching(self, stopwatch: Stopwatch) -> AbstractContextManager[None]:
        """By hooks of the module."""
        return stopwatch.watching(self.model)

    def row(self, tokens: Tokens) -> Tensor:
        """Logits [V] after a text."""
        return UncachedPredictor(self.model)(tokens, ())[0]


@final
@define(eq=False)
class Gguf:
    """A GGUF file, which llama.cpp runs: one memory for texts of up to `context` tokens, forgotten between them, and
    one for as many texts at a time as somebody asked for.

    It is that of a `Llama`, whose settings are the usual ones, so that with equal passes ours says what that says.

    `DecodeError` for what llama.cpp cannot load.
    """

    path: Path
    context: int
    _target: LlamaCpp = field(init=False)
    _beside: dict[int, LlamaCpp] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self._target = self._made(1)

    def reading(self, features: tuple[int, ...] | None, clock: Clock | None) -> LlamaCpp:
        """The memory, empty. It shows no features, and has its own clock."""
        self._target.forget()
        return self._target

    def together(self, features: tuple[int, ...] | None, clock: Clock | None, slots: int) -> Callable[[], LlamaCpp]:
        """The memory for so many texts, empty. It shows no features, and has its own clock."""
        if slots not in self._beside:
            self._beside[slots] = self._made(slots)
        target = self._beside[slots]

        def empty() -> LlamaCpp:
            target.forget()
            return target

        return empty

    @contextmanager
    def watching(self, stopwatch: Stopwatch) -> Iterator[None]:
        """Every pass of llama.cpp within the block, ours and its own: the binding's function is replaced meanwhile."""
        from llama_cpp import llama_cpp  # noqa: PLC0415 - it may be missing

        decode = llama_cpp.llama_decode

        def timed(ctx: object, batch: llama_cpp.llama_batch) -> int:
            began = stopwatch.clock()
            code = decode(ctx, batch)
            llama_cpp.llama_synchronize(ctx)
            stopwatch.passed(batch.n_tokens, stopwatch.clock() - began)
            return code

        llama_cpp.llama_decode = timed
        try:
            yield
        finally:
            llama_cpp.llama_decode = decode

    def row(self, tokens: Tokens) -> Tensor:
        """Logits [V] after a text."""
        return self.reading(None, None)(tokens, ())[0]

    def _made(self, slots: int) -> LlamaCpp:
        return LlamaCpp(opened(self.path, self.context + ROOM, all_rows=False), slots=slots)


def opened(path: Path, context: int, *, all_rows: bool) -> Llama:
    """A `Llama` with as many threads as torch has, with the logits of all rows of a pass or of its last alone.

    `DecodeError` for what it cannot load.
    """
    from llama_cpp import Llama  # noqa: PLC0415

    threads = torch.get_num_threads()
    with one_sentence("source", "llama.cpp cannot load the model", "give another GGUF file"):
        return Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=all_rows,
            verbose=False,
        )
