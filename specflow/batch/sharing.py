"""What all do alike who read several texts in one pass: who waits for whose prompt, and what the pass tells a meter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, final
from weakref import WeakSet

from attrs import define, field

from specflow.batch.hub import Asked, Reply
from specflow.policies import CostMeter
from specflow.prefix import common_prefix
from specflow.state import Tokens

WORTH: Final = 32
"""How many tokens of a text are worth a pass of waiting, where another text of this pass begins with them, too."""

TELLING: Final = 1.25
"""How many tokens a text of a pass has on average, at least, for the pass to tell what two of each would take."""


@final
@define(eq=False)
class Waiting:
    """Who has waited for what another text reads."""

    _waited: WeakSet[Asked] = field(init=False, factory=WeakSet)

    def waits(self, asked: Asked, tokens: Tokens, known: int, reading: Iterable[tuple[Tokens, bool]]) -> bool:
        """Whether it is worth a pass of waiting: this one reads more of a text's beginning than the `known` tokens.

        Of each text that it reads: its tokens, and whether it reads all of them. Once it has, nobody waits again,
        though it may have been forgotten at once for want of room.
        """
        if asked in self._waited:
            return False
        ahead = [whole for text, whole in reading if common_prefix(text, tokens) > known + WORTH]
        if any(ahead):
            self._waited.add(asked)
        return bool(ahead)


def in_turns(read: Callable[[Sequence[Asked]], list[Reply]], asked: Sequence[Asked], slots: int) -> list[Reply]:
    """What is replied where `read` is asked about up to `slots` texts at a time.

    The others wait where one of those is not yet done: they would take the place of what was read of it, for ever.
    """
    replies: list[Reply] = []
    for start in range(0, len(asked), slots):
        some = asked[start : start + slots]
        replies += [None] * len(some) if any(reply is None for reply in replies) else read(some)
    return replies


def note_pass(meter: CostMeter, slots: int, lengths: Sequence[int], began: float) -> None:
    """Tell what a text's tokens cost in a batch: a pass over texts of these lengths, if it was half full at least.

    Of different lengths it is what the pass would take if each had the whole number next to their mean, on the line
    through a pass over one token of each.
    """
    if 2 * len(lengths) < slots:
        return
    mean = sum(lengths) / len(lengths)
    k, seconds = 1 if mean == 1 else max(2, round(mean)), meter.since(began)
    if k != mean:
        single = meter.seconds(1)
        if single is None or mean < TELLING:
            return
        seconds = max(single[0], single[0] + (seconds - single[0]) * (k - 1) / (mean - 1))
    meter.note(k, seconds)
