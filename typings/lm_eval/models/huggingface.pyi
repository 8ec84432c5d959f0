from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

class HFLM(TemplateLM):
    def __init__(
        self, pretrained: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1, max_length: int | None = None
    ) -> None: ...
    @property
    @override
    def eot_token_id(self) -> int: ...
    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]: ...
    @override
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], Sequence[int], Sequence[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]: ...
    @override
    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]: ...
    @override
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]: ...
