"""A device made of nothing: tensors on `far` look like those of a GPU, and what is copied to the host is counted.

It is a backend of torch's own kind (a PrivateUse1 device whose kernels are Python), so an operation that needs a number
on the host (`item`, `tolist`, `if tensor`, `.cpu()`) reaches the same kernels as on a GPU, and mixing it with tensors
on the CPU fails as there. Importing this registers the device for the whole process: do it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel
from typing_extensions import override

_setup_privateuseone_for_python_backend("far")
torch.accelerator.synchronize = lambda *_: None  # all is computed when a call returns, and Python kernels cannot say so

COPIES: Final[list[str]] = []
"""Grows by one name at each copy from the device to the host."""


class Far(Tensor):
    """A tensor on the device; `near` has its numbers."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Far], near: Tensor) -> Far:
        """A tensor that says it is on the device."""
        made: Any = torch._C._acc.create_empty_tensor(near.shape, near.dtype)
        made.__class__ = cls
        return made  # type: ignore[no-any-return]

    def __init__(self, near: Tensor) -> None:
        self.near = near

    @override
    def detach(self) -> Tensor:
        """torch's own would lose the numbers."""
        return Far(self.near)


def _kernel(operation: OpOverload, *arguments: object, **named: object) -> object:
    """Any operation: done on the CPU, its results put back."""
    known: dict[int, Far] = {}

    def fetch(value: object) -> object:
        if isinstance(value, Far):
            known[id(value.near)] = value
            return value.near
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def put(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Far(value)

    name, place = operation._schema.name, named.get("device")
    result = operation(*tree_map(fetch, arguments), **tree_map(fetch, named))
    if name == "aten::_local_scalar_dense" or (isinstance(place, torch.device) and place.type == "cpu"):
        COPIES.append(name)
        return result
    return tree_map(put, result)


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, Far) and not isinstance(target, Far):
        COPIES.append("aten::copy_")
    (target.near if isinstance(target, Far) else target).copy_(source.near if isinstance(source, Far) else source)
    return target


def _empty(size: list[int], *, dtype: torch.dtype | None = None, **named: object) -> Tensor:
    return Far(torch.empty(size, dtype=dtype))


def _empty_strided(size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **named: object) -> Tensor:
    return Far(torch.empty_strided(size, stride, dtype=dtype))


def _abs(source: Far) -> Tensor:
    return Far(source.near.abs())  # torch's own goes by way of an empty tensor, which cannot grow here


def _as_strided(source: Far, size: list[int], stride: list[int], offset: int | None = None) -> Tensor:
    """A view, given in terms of a tensor that is contiguous and begins its storage, as all seem to do on the device."""
    near = source.near.contiguous()
    return Far(near.as_strided(size, stride, near.storage_offset() + (offset or 0)))


_ANY: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_ANY.fallback(_kernel, "PrivateUse1")
_KERNELS: Final[dict[str, Callable[..., object]]] = {
    "abs": _abs,
    "as_strided": _as_strided,
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy,
}
for _name, _made in _KERNELS.items():
    torch.library.impl(f"aten::{_name}", "PrivateUse1")(_made)


@final
class Remote(Module):
    """A model on the device: what it computes, and copies meanwhile, is its own affair and not counted."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.place = Parameter(Far(torch.zeros(1)), requires_grad=False)
        self.config = model.config
        self.inner = [model]  # in a list, so that its parameters are not this model's

    @override
    def forward(self, input_ids: Far, cache: object = None, use_cache: bool = True) -> object:
        """Takes and gives tensors on the device."""
        assert isinstance(input_ids, Far)
        output = self.inner[0](input_ids.near, cache=cache, use_cache=use_cache)
        output.logits = Far(output.logits)
        return output
