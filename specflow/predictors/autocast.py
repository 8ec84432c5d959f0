"""What `torch.autocast` makes of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

KINDS: Final = tuple([kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)])
"""The kinds of devices that there is autocast for: torch raises where it is asked about others."""


def cast_to(kind: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None where it is off.

    >>> cast_to("cpu")
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     cast_to("cpu")
    torch.bfloat16
    """
    return torch.get_autocast_dtype(kind) if kind in KINDS and torch.is_autocast_enabled(kind) else None


def casts() -> tuple[torch.dtype | None, ...]:
    """What autocast casts to on each kind of device; nothing where it is off on all, as it mostly is.

    >>> casts()
    ()
    """
    return tuple(map(cast_to, KINDS)) if any(map(torch.is_autocast_enabled, KINDS)) else ()


@contextmanager
def uncast(kind: str) -> Iterator[None]:
    """A block in which nothing is cast on a kind of device. Not by `torch.autocast`: see `batch.modes`.

    >>> with torch.autocast("cpu", torch.bfloat16), uncast("cpu"):
    ...     torch.ones(1, 1).matmul(torch.ones(1, 1)).dtype
    torch.float32
    """
    if cast_to(kind) is None:
        yield
        return
    torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, True)
