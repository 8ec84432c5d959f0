"""Attention by cuDNN, and not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def may_use_cudnn() -> bool:
    """Whether torch may choose cuDNN's attention."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call] # of torch


@contextmanager
def cudnn_attention(chosen: bool) -> Iterator[None]:
    """Whether torch may choose cuDNN's attention in the block.

    It may elsewhere, unless told otherwise, and does on some devices in bf16. There cuDNN plans anew for each number of
    keys, so each pass of a text but a captured one would be timed with a plan.
    """
    before = may_use_cudnn()
    torch.backends.cuda.enable_cudnn_sdp(chosen)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
