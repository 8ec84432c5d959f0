"""Any other model: a copy of it with linear layers of ours."""

from __future__ import annotations

from copy import deepcopy
from typing import final

from torch import Tensor
from torch.nn import Linear as TorchLinear
from torch.nn import Module, Parameter
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from specflow.accelerate.linear import Linear, MakeLinear, computing
from specflow.errors import DecodeError


@final
class Replaced(Module):
    """A linear layer of ours where a model expects one of torch's.

    `weight` and `bias` are there for models that look at them instead of calling the layer, as Mamba does.
    """

    def __init__(self, linear: Linear, weight: Parameter, bias: Parameter | None) -> None:
        super().__init__()
        self._linear = linear
        self._dtype = computing(weight.dtype)
        self.weight: Parameter | None = weight
        self.bias = bias

    @override
    def extra_repr(self) -> str:
        """What its weights are laid out as."""
        return type(self._linear).__name__

    @override
    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], both in the model's dtype."""
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype)
        return self._linear(rows).to(x.dtype).view(*x.shape[:-1], -1)


def with_linears(model: Module, make: MakeLinear) -> Module:
    """A copy of `model` whose linear layers are made by `make`, in evaluation mode. `DecodeError` where it has none.

    It shares nothing with `model` but the linear weights themselves, which few models look at, and of these none that
    is an embedding, too.
    """
    linear = [weight for module in model.modules() if is_linear(module) for weight in module.parameters(recurse=False)]
    if not linear:
        remedy = "use it as it is"
        raise DecodeError("model", "none of its layers is a plain linear layer", type(model).__name__, remedy)
    others = [module.parameters(recurse=False) for module in model.modules() if not is_linear(module)]
    elsewhere = {id(weight) for weights in others for weight in weights}
    copy = deepcopy(model, {id(weight): weight for weight in linear if id(weight) not in elsewhere})
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            if is_linear(child):
                own = dict(child.named_parameters(recurse=False))
                setattr(parent, name, Replaced(make(*weight_and_bias(child)), own["weight"], own.get("bias")))
    return copy.eval()


def is_linear(module: Module) -> bool:
    """Whether this is a linear layer and nothing more, of weights that are plain tensors."""
    return (type(module) is TorchLinear or type(module) is Conv1D) and type(module.weight) is Parameter


def weight_and_bias(module: Module) -> tuple[Tensor, Tensor | None]:
    """The weight [out, in] and the bias of a module that `is_linear`; GPT-2's is stored the other way round."""
    weight = module.get_parameter("weight").detach()
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    return weight.T if type(module) is Conv1D else weight, None if bias is None else bias.detach()
