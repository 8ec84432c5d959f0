from torch import Tensor

class PromptLookupCandidateGenerator:
    def __init__(
        self,
        eos_token_id: Tensor | None = None,
        num_output_tokens: int = 10,
        max_matching_ngram_size: int = 2,
        max_length: int = 20,
    ) -> None: ...
    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]: ...
