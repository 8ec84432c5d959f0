"""What specflow uses of llama.cpp's Python binding, which is not typed and not installed with specflow's own tools."""

from collections.abc import Callable, Generator

import numpy
from numpy.typing import NDArray

from llama_cpp._internals import LlamaModel
from llama_cpp.llama_cpp import llama_context_params

from llama_cpp import llama_cpp as llama_cpp

class Llama:
    _model: LlamaModel
    context_params: llama_context_params
    lora_path: str | None
    model_path: str
    draft_model: Callable[[NDArray[numpy.intc]], NDArray[numpy.intc]] | None
    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int = ...,
        n_batch: int = ...,
        type_k: int | None = ...,
        type_v: int | None = ...,
        n_threads: int | None = ...,
        n_threads_batch: int | None = ...,
        attention_type: int = ...,
        kv_overrides: dict[str, bool | int | float | str] | None = ...,
        logits_all: bool = ...,
        verbose: bool = ...,
    ) -> None: ...
    n_tokens: int
    def close(self) -> None: ...
    def n_ctx(self) -> int: ...
    def reset(self) -> None: ...
    def eval(self, tokens: list[int]) -> None: ...
    def generate(self, tokens: list[int], *, top_k: int = ..., temp: float = ...) -> Generator[int]: ...
