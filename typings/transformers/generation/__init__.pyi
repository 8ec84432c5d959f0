from torch import Tensor

class GenerateDecoderOnlyOutput:
    sequences: Tensor
    def __init__(self, *, sequences: Tensor) -> None: ...
