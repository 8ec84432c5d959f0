"""What a policy that chooses by cost says of its choice, and which paces it can go on from."""

from __future__ import annotations

from math import inf
from typing import Final, final

from attrs import frozen

DOUBT: Final = 0.5  # the least probability of a refusal that this reckons with


def are_numbers(pace: tuple[object, ...]) -> bool:
    """Whether a pace holds finite numbers and nothing else, so that its policy can go on from it.

    >>> are_numbers((2.5, 7)), are_numbers((float("nan"),))
    (True, False)
    """
    return all(isinstance(number, int | float) and -inf < number < inf for number in pace)


@final
@frozen
class Choice:
    """Why a step took its γ: what each γ from 0 on promised, in tokens and in seconds.

    `position` is where the first draft stands in the text, `seen` how many drafts were looked at before deciding, and
    `lost` the seconds that the text has lost to drafting so far (negative: gained). Nothing is promised while the
    target's pass over one token is not known.
    """

    position: int
    seen: int
    gamma: int
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    lost: float
