"""llama.cpp's own decoding, as llama-cpp-python's users run it: greedily, alone or with its prompt lookup."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy
from numpy.typing import NDArray

from specflow.bench.context import Context, Emit, Prepare, Session
from specflow.bench.engines import opened
from specflow.errors import DecodeError
from specflow.interop.llama_cpp import LlamaCpp
from specflow.processors import GreedyProcessor
from specflow.state import DecodeState

if TYPE_CHECKING:
    from llama_cpp import Llama


def alone(gamma: int | None = None) -> Prepare:
    """Its loop, a token a pass. It drafts nothing, so that `gamma` is refused."""
    if gamma is not None:
        raise DecodeError("decoders", "llama.cpp alone drafts nothing", f"llama.cpp@{gamma}", "use llama.cpp-lookup")

    def prepare(context: Context) -> Session:
        llama = _lent(context)

        def session(state: DecodeState, emit: Emit) -> None:
            _decode(llama, state, lambda token: emit((token,), None))

        return session

    return prepare


def lookup(gamma: int | None = None) -> Prepare:
    """The same with `LlamaPromptLookupDecoding`, which drafts up to `gamma` tokens, 10 unless given."""
    with_rows = cache(partial(opened, all_rows=True))  # without them it fails behind long prompts

    def prepare(context: Context) -> Session:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # noqa: PLC0415 - it may be missing

        lent, watch = _lent(context), context.stopwatch
        llama = with_rows(Path(lent.model_path), lent.n_ctx())
        propose = LlamaPromptLookupDecoding(num_pred_tokens=gamma or 10)

        def session(state: DecodeState, emit: Emit) -> None:
            step: list[int] = []

            def end_step() -> None:
                emit(tuple(step), None)
                step.clear()

            def draft(ids: NDArray[numpy.intc]) -> NDArray[numpy.intc]:
                end_step()  # it asks for drafts where the tokens of a step stand
                return watch.while_drafting(lambda: propose(ids))

            llama.draft_model = draft
            _decode(llama, state, step.append)
            end_step()

        return session

    return prepare


def _decode(llama: Llama, state: DecodeState, hear: Callable[[int], object]) -> None:
    llama.reset()
    for token in islice(llama.generate(list(state.tokens), temp=0.0, top_k=1), state.room):
        hear(token)
        if token in state.request.stop:
            return


def _lent(context: Context) -> Llama:
    """The `Llama` that the target is made of. `DecodeError` where texts are sampled."""
    if not isinstance(context.processor, GreedyProcessor):
        happened, received = "llama.cpp's own loops are compared greedily", f"{context.processor.temperature:g}"
        raise DecodeError("temperature", happened, received, "leave them out, or --temperature")
    assert isinstance(context.target, LlamaCpp)
    return cast("Llama", context.target.source)
