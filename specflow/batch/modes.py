"""What torch keeps for a thread and a decode takes to be its own: gradients, inference mode, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, final

import torch
from attrs import frozen

DEVICES: Final = ("cpu", "cuda")
"""The kinds of devices whose autocast is kept apart."""


@final
@frozen
class Modes:
    """How torch computes at one moment in one thread."""

    gradients: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    cached: bool
    """Whether autocast keeps the weights that it has cast."""

    @classmethod
    def now(cls) -> Modes:
        """How it computes here."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple([(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES]),
            torch.is_autocast_cache_enabled(),
        )


@contextmanager
def within(modes: Modes) -> Iterator[None]:
    """The block computes so, whatever its thread does, which is put back afterwards.

    Each change is put back to what it was when the block began, so that blocks of several greenlets may end in any
    order.
    """
    here = Modes.now()
    with ExitStack() as stack:
        if here.inference != modes.inference:
            stack.enter_context(torch.inference_mode(modes.inference))
        if here != modes:
            stack.enter_context(torch.set_grad_enabled(modes.gradients))
            for kind, enabled, dtype in modes.autocast:
                stack.enter_context(_cast(kind, enabled, dtype, modes.cached))
        yield


@contextmanager
def _cast(kind: str, enabled: bool, dtype: torch.dtype, cached: bool) -> Iterator[None]:
    """`torch.autocast` without its count of blocks: when that comes to 0 torch drops the weights that were cast."""
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()
    _set(kind, enabled, dtype, cached)
    try:
        yield
    finally:
        _set(kind, *before)


def _set(kind: str, enabled: bool, dtype: torch.dtype, cached: bool) -> None:
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(cached)
