"""The probabilities that a draft is judged by: read one by one on the host, copied all at once from a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import TypeAlias

import torch

from specflow.distribution import Categorical, Distribution, Known
from specflow.finite import is_near, not_finite
from specflow.state import Proposal

Probability: TypeAlias = Callable[[Known, int], float]
"""law, token → the probability of the token."""


def probabilities(proposals: Sequence[Proposal], laws: Sequence[Distribution], start: int) -> Probability:
    """law.of(token) for the drafts x_i, their p and their q; what lies on a device is copied now, in one copy.

    `DecodeError` where a law there is none, as its logits were not finite.
    """
    far = [
        (i, law, draft.token)
        for i, draft in enumerate(proposals)
        for law in (laws[i], draft.q)
        if isinstance(law, Categorical) and not is_near(law.probs)
    ]
    if not far:
        return _of
    place = far[0][1].probs.device
    sent = torch.stack([law.probs[token].to(place) for _, law, token in far])
    numbers: dict[tuple[int, int], float] = {}
    for (i, law, token), number in zip(far, sent.tolist(), strict=True):
        if isnan(number):
            raise not_finite(start + i - 1)
        numbers[id(law), token] = number
    return lambda law, token: numbers[id(law), token] if (id(law), token) in numbers else law.of(token)


def _of(law: Known, token: int) -> float:
    return law.of(token)
