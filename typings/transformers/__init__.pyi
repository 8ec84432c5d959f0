# The few names of transformers that specflow uses, typed exactly: checking through transformers itself takes half a minute.
from collections.abc import Sequence
from os import PathLike
from typing import Self

import torch
from torch import Tensor
from torch.nn import Module

from transformers.cache_utils import Cache as Cache
from transformers.cache_utils import DynamicCache as DynamicCache
from transformers.cache_utils import QuantizedCache as QuantizedCache
from transformers.cache_utils import StaticCache as StaticCache

class PreTrainedConfig:
    vocab_size: int
    eos_token_id: int | list[int] | None
    def __init__(self, **kwargs: object) -> None: ...
    def get_text_config(self, decoder: bool | None = None) -> PreTrainedConfig: ...
    def to_dict(self) -> dict[str, object]: ...

class LlamaConfig(PreTrainedConfig): ...
class GPT2Config(PreTrainedConfig): ...
class AutoConfig:
    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **kwargs: object) -> PreTrainedConfig: ...

class GenerationConfig:
    eos_token_id: int | list[int] | None
    def to_dict(self) -> dict[str, object]: ...

class PreTrainedModel(Module):
    config: PreTrainedConfig
    generation_config: GenerationConfig
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def generate(self, inputs: Tensor, **kwargs: object) -> Tensor: ...
    def save_pretrained(self, directory: str | PathLike[str]) -> None: ...

class LlamaForCausalLM(PreTrainedModel):
    def __init__(self, config: LlamaConfig) -> None: ...

class GPT2LMHeadModel(PreTrainedModel):
    def __init__(self, config: GPT2Config) -> None: ...

class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **kwargs: object) -> PreTrainedModel: ...
    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> PreTrainedModel: ...

class BatchEncoding:
    input_ids: list[int]

class PreTrainedTokenizerBase:
    eos_token_id: int | None
    chat_template: str | None
    def __call__(self, text: str, **kwargs: object) -> BatchEncoding: ...
    def __len__(self) -> int: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...
    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
    ) -> BatchEncoding: ...
    def save_pretrained(self, directory: str | PathLike[str]) -> None: ...

class AutoTokenizer:
    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **kwargs: object) -> PreTrainedTokenizerBase: ...

class TextStreamer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_prompt: bool = False, *, skip_special_tokens: bool = False) -> None: ...
    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...
