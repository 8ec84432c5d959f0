"""Logits that are not finite are refused, and noticing them never waits for a device.

On the host every row is looked at as it comes. On a device looking would be a copy to the host of its own; there a
row is noticed when the first number made of it arrives, which `on_arrival` arranges: an id of `NOTICED` in place of a
token. A row of which no number ever arrives, such as one after a rejected draft, is not text and not noticed.
"""

from __future__ import annotations

from math import isfinite
from typing import Final

import torch
from numpy import uint16
from torch import Tensor

from specflow.errors import DecodeError

NOTICED: Final = -1
"""Stands in place of a token that was chosen from a row which is not finite."""

INFINITY: Final = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits of +∞; with `SIGN` those of -∞. What is above either is a NaN."""

SIGN: Final = 0x8000


def is_near(tensor: Tensor) -> bool:
    """Whether the numbers are on the host, where looking at them costs no copy."""
    return tensor.is_cpu


def finite(logits: Tensor, end: int) -> Tensor:
    """`logits` [k, V] themselves; `DecodeError` where a row holds a NaN or +∞ or nothing but -∞.

    `end` is the length of the text that the last row follows.
    """
    arrived(chosen(logits), end - logits.shape[0])
    return logits


def chosen(rows: Tensor) -> list[int]:
    """`argmax` of rows [k, V] wherever they are. From a device only the ids are copied."""
    if is_near(rows):
        return argmax(rows)
    best: list[int] = on_arrival(rows.argmax(dim=-1), rows).tolist()
    return best


def argmax(rows: Tensor) -> list[int]:
    """The index of the largest number in each row [k, V] on the host, the first of equals; `NOTICED` where it is none.

    >>> argmax(torch.tensor([[0.5, 2.0, 2.0], [-1.0, -3.0, -2.0], [0.0, torch.nan, 1.0]], dtype=torch.bfloat16))
    [1, 0, -1]
    """
    if rows.dtype in INFINITY:
        # Positive numbers are in the order of their bits, all negative ones below them: a quarter of the time.
        bits, infinity = rows.view(torch.int16).numpy(force=True), INFINITY[rows.dtype]
        best: list[int] = bits.argmax(-1).tolist()
        without_sign = all(0 < bits[row, token] < infinity for row, token in enumerate(best))
        if without_sign and bits.view(uint16).max() <= infinity + SIGN:  # above it are the NaNs with a sign
            return best
    # Unlike torch, numpy wakes no other thread to reduce a row.
    numbers = (rows if rows.itemsize >= 4 else rows.float()).numpy(force=True)
    found: list[int] = numbers.argmax(-1).tolist()
    return [token if isfinite(numbers.item(row, token)) else NOTICED for row, token in enumerate(found)]


def on_arrival(ids: Tensor, rows: Tensor) -> Tensor:
    """`ids` [...], chosen from `rows` [..., V] of logits or of probabilities, to be copied; nothing waits here.

    >>> on_arrival(torch.tensor([1, 0]), torch.tensor([[0.0, 2.0], [torch.nan, 1.0]]))
    tensor([ 1, -1])
    """
    return torch.where(rows.amax(dim=-1).isfinite(), ids, NOTICED)


def arrived(ids: list[int], start: int) -> list[int]:
    """What `on_arrival` sent, on the host; `DecodeError` if a row was not finite.

    `start` is the position after which the first of them was chosen.
    """
    if NOTICED in ids:
        raise not_finite(start + ids.index(NOTICED))
    return ids


def not_finite(position: int) -> DecodeError:
    """The error that names the token after which the logits are not finite."""
    return DecodeError(
        "model",
        "the model's logits are not finite",
        f"NaN or infinity after the token at position {position}",
        "check the weights and the dtype",
    )


def checked(logits: Tensor, end: int) -> Tensor:
    """`logits`, finite where they are on the host: those after a text of `end` tokens."""
    return finite(logits, end) if is_near(logits) else logits
