"""What torch keeps for a thread and a decode takes to be its own: gradients, inference mode, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, final

import torch

from specflow.predictors.autocast import KINDS


@final
class Modes(NamedTuple):
    """How torch computes at one moment in one thread."""

    gradients: bool
    inference: bool
    casts: tuple[tuple[bool, torch.dtype], ...]
    """For each of `KINDS` whether autocast is on, and what it casts to, or would."""
    cached: bool
    """Whether autocast keeps the weights that it has cast."""


def modes_now() -> Modes:
    """How torch computes here."""
    return Modes(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple([(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in KINDS]),
        torch.is_autocast_cache_enabled(),
    )


def within(modes: Modes) -> AbstractContextManager[None]:
    """The block computes so, whatever its thread does, which is put back afterwards.

    Each change is put back to what it was when the block began, so that blocks of several greenlets may end in any
    order.
    """
    return nullcontext() if modes_now() == modes else _changed(modes)


@contextmanager
def _changed(modes: Modes) -> Iterator[None]:
    here = torch.is_inference_mode_enabled()
    with nullcontext() if here == modes.inference else torch.inference_mode(modes.inference):
        entered = modes_now()
        _set(modes)
        try:
            yield
        finally:
            _set(entered)


def _set(modes: Modes) -> None:
    """All but inference mode. Not by `torch.autocast`, which counts blocks and drops cast weights at the last end."""
    torch.set_grad_enabled(modes.gradients)
    for kind, (enabled, dtype) in zip(KINDS, modes.casts, strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_cache_enabled(modes.cached)
