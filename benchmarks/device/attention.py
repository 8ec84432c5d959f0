"""Attention by cuDNN, and not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

OTHERS: Final = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What torch chooses from without cuDNN."""

OPERATOR: Final = "aten::_scaled_dot_product_"
"""How the names of torch's kinds of attention begin, as the profiler tells them."""


def may_use_cudnn() -> bool:
    """Whether torch may choose cuDNN's attention."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call] # of torch


ALLOWED: Final = may_use_cudnn()
"""Whether torch comes with leave to choose it."""


def without_cudnn() -> AbstractContextManager[object]:
    """No attention by cuDNN in the block.

    By itself torch may choose it, and does on some devices in bf16. There cuDNN plans anew for each number of keys, so
    each pass of a text but a captured one would be timed with a plan.
    """
    return sdpa_kernel(OTHERS)


def cudnn_first() -> AbstractContextManager[object]:
    """Attention by cuDNN in the block wherever cuDNN can: where it is only allowed, torch may choose another."""
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *OTHERS], set_priority=True)
