"""Passes without autograd's bookkeeping, which takes a few per cent of a short one, under `torch.no_grad` too.

Not by `torch.inference_mode`: what a model keeps from a pass could not be trained on afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, TypeAlias

import torch
from torch.nn import Module, Parameter

Context: TypeAlias = Callable[[], AbstractContextManager[None]]

Untracked: TypeAlias = Callable[[int], AbstractContextManager[None]]
"""The number of tokens in a pass → what the pass runs in."""

# Private to torch: in a build without them a pass is tracked, and as right.
WITHOUT_GRADIENTS: Final[Context] = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
WITHOUT_GRADIENTS_AND_VIEWS: Final[Context] = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", nullcontext)


def untracked(model: Module) -> Untracked:
    """What the passes of a model run in. Weights that are no plain tensors (sharded, quantised) keep the bookkeeping.

    >>> with untracked(torch.nn.Linear(2, 2))(1):
    ...     torch.zeros(1).is_inference()
    False
    """
    plain = all(type(parameter) is Parameter for parameter in model.parameters())
    return _untracked if plain else _as_it_is


def _untracked(tokens: int) -> AbstractContextManager[None]:
    # Over several tokens views are tracked still: where the view of a weight does not require a gradient, torch would
    # rather copy the weight than rows which do not lie together.
    return WITHOUT_GRADIENTS_AND_VIEWS() if tokens == 1 else WITHOUT_GRADIENTS()


def _as_it_is(tokens: int) -> AbstractContextManager[None]:
    return nullcontext()
