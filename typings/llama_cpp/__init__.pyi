"""What the benchmark of llama.cpp uses of its Python binding, which is not installed with specflow's own tools."""

from collections.abc import Generator

from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

class Llama:
    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int = ...,
        n_threads: int | None = ...,
        n_threads_batch: int | None = ...,
        logits_all: bool = ...,
        draft_model: LlamaPromptLookupDecoding | None = ...,
        verbose: bool = ...,
    ) -> None: ...
    def reset(self) -> None: ...
    def generate(self, tokens: list[int], *, top_k: int = ..., temp: float = ...) -> Generator[int]: ...
