"""Passes without autograd's bookkeeping, which takes a few per cent of a short one, under `torch.no_grad` too.

Not by `torch.inference_mode`: what a model keeps from a pass could not be trained on afterwards.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from specflow.predictors.autocast import cast_to

# Private to torch: in a build without them a pass is tracked, and as right.
WITHOUT_GRADIENTS: Final = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
WITHOUT_GRADIENTS_AND_VIEWS: Final = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", nullcontext)


def untracked(ids: Tensor, has_plain_weights: bool) -> AbstractContextManager[None]:
    """What a pass over ids [..., k] runs in. Weights that are no plain tensors (sharded, quantized) keep the
    bookkeeping, and so does autocast, which keeps the weights that it has cast for those who train on them.

    >>> with untracked(torch.zeros(1, 1), True):
    ...     torch.zeros(1).is_inference()
    False
    """
    if not has_plain_weights or cast_to(ids.device.type) is not None:
        return nullcontext()
    # Over several tokens views are tracked still: where the view of a weight does not require a gradient, torch would
    # rather copy the weight than rows which do not lie together.
    return WITHOUT_GRADIENTS_AND_VIEWS() if ids.shape[-1] == 1 else WITHOUT_GRADIENTS()
