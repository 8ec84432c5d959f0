"""What outlives a pass is made outside of inference mode: a tensor that is made in it can be written in no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import torch

_NOTHING: Final = nullcontext()


def lasting() -> AbstractContextManager[None]:
    """What is made in the block may be written in any mode.

    >>> with torch.inference_mode(), lasting():
    ...     torch.zeros(1).is_inference()
    False
    """
    return _outside() if torch.is_inference_mode_enabled() else _NOTHING


@contextmanager
def _outside() -> Iterator[None]:
    with torch.inference_mode(mode=False), torch.no_grad():  # to leave the one mode would turn gradients on
        yield
