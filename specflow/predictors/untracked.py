"""Passes without autograd's bookkeeping, which takes a few per cent of a short one, under `torch.no_grad` too.

Not by `torch.inference_mode`: what a model keeps from a pass could not be trained on afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeAlias

import torch
from torch.nn import Module, Parameter

Untracked: TypeAlias = Callable[[int], AbstractContextManager[None]]
"""The number of tokens in a pass → what the pass runs in."""

# Private to torch: in a build without them a pass is tracked, and as right.
WITHOUT_GRADIENTS: Final = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
WITHOUT_GRADIENTS_AND_VIEWS: Final = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", nullcontext)


def untracked(model: Module) -> Untracked:
    """What the passes of a model run in. Weights that are no plain tensors (sharded, quantized) keep the bookkeeping.

    >>> with untracked(torch.nn.Linear(2, 2))(1):
    ...     torch.zeros(1).is_inference()
    False
    """
    if not all(type(parameter) is Parameter for parameter in model.parameters()):
        return lambda tokens: nullcontext()
    # Over several tokens views are tracked still: where the view of a weight does not require a gradient, torch would
    # rather copy the weight than rows which do not lie together.
    return lambda tokens: WITHOUT_GRADIENTS_AND_VIEWS() if tokens == 1 else WITHOUT_GRADIENTS()
