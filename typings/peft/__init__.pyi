# The few names of PEFT that the tests and examples use.
from typing import Any

from torch.nn import Module
from transformers import PreTrainedModel

class LoraConfig:
    def __init__(
        self, *, task_type: str, r: int = 8, init_lora_weights: bool = True, target_modules: str | list[str] = ..., lora_dropout: float = 0
    ) -> None: ...

class PromptTuningConfig:
    def __init__(self, *, task_type: str, num_virtual_tokens: int) -> None: ...

class PrefixTuningConfig:
    def __init__(self, *, task_type: str, num_virtual_tokens: int) -> None: ...

class PeftModel(Module):
    def get_base_model(self) -> PreTrainedModel: ...
    def disable_adapter_layers(self) -> None: ...
    def enable_adapter_layers(self) -> None: ...
    # A tensor, or with return_dict_in_generate an output that holds one.
    def generate(self, **kwargs: object) -> Any: ...

def get_peft_model(
    model: PreTrainedModel, peft_config: LoraConfig | PromptTuningConfig | PrefixTuningConfig
) -> PeftModel: ...
