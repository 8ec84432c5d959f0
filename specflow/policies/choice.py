"""What a policy that chooses by cost says of its choice, and which paces it can go on from."""

from __future__ import annotations

from math import inf
from typing import Final, final

from attrs import frozen

DOUBT: Final = 0.5  # the least probability of a rejection that this reckons with
ADVANCE: Final = 0.8  # how many passes a text may lose to drafting before it has gained anything
LOSS: Final = 0.012  # how much more of a pass it may lose for each token


def credit(single: float, tokens: int, lost: float) -> float:
    """The seconds that a text may still lose to drafting once it has `tokens` new ones and has `lost` some.

    A pass over one token takes `single`.

    >>> round(credit(1.0, tokens=48, lost=0.5), 2)
    0.88
    """
    return single * (ADVANCE + LOSS * tokens) - lost


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
