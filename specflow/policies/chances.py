"""Cost-aware γ where drafters tell their chances: as many drafts as promise the most tokens per second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, takewhile
from typing import Final, NamedTuple, final

from attrs import define, field

from specflow.distribution import PointMass
from specflow.guards.checks import number
from specflow.policies.acceptance import PRIOR
from specflow.policies.choice import DOUBT, Choice, are_numbers
from specflow.policies.meter import CostMeter, Durations
from specflow.state import BEFORE, TEXT, DecodeState, Pace, Proposal

ADVANCE: Final = 1.5
"""How many passes a text may lose to trees before it has gained anything."""

LOSS: Final = 0.01
"""How much of a pass it may lose beside for each token."""

TRUST: Final = 4.0
"""For how many tokens a drafter's chances are believed before the text has told what they are worth."""


_is_chance = number("a draft's chance is not a finite number", "give the guess of a probability")


class _Text(NamedTuple):
    """A text between two steps: the tokens that its trees promised and gave, and the seconds lost to them."""

    promised: float = 0.0
    given: float = 0.0
    lost: float = 0.0

    @property
    def worth(self) -> float:
        """How many tokens came for each that the drafter's chances promised."""
        return (self.given + TRUST) / (self.promised + TRUST)


class ChancesPace(NamedTuple):
    """What is carried between steps: what the last one took and promised, the text, and whose it is."""

    length: float
    gamma: float
    drafting: float
    promised: float
    text_promised: float
    text_given: float
    text_lost: float
    policy: float


@final
@define(eq=False)
class ByChances:
    """The first n drafts, with n maximising (1 + w Σ chance) / (seconds of a pass over n + 1 tokens).

    Σ is over the n drafts: a draft's chance is the probability that one more token is taken; where the drafter does not
    tell it, it is 0.6 of that of its parent. w corrects the chances by what came of them in this text, (given + 4) /
    (promised + 4) in tokens. A text may lose 1.5 passes, and 1 % of a pass for each token, to drafts that were not
    taken; more drafts than that pays for are left alone. What drafting takes is measured and counted too, and ended
    when a text cannot afford more.
    Source: Chen et al. 2402.12374 (Sequoia), its hardware-aware tree optimizer, whose one tree for a machine is chosen
    anew here for each text and place.
    """

    meter: CostMeter
    most: int
    identity: int
    _drafting: Durations = field(init=False, factory=Durations)

    def step(self, stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Choice, Pace]:
        """The drafts to take, why, and the pace to carry on."""
        costs = self.meter.seconds(self.most + 1)
        text = self._settled(state, costs)
        credit = 0.0 if costs is None else costs[0] * (ADVANCE + LOSS * len(state.output)) - text.lost
        if costs is None or self._drafting.estimate > credit:
            nothing = Choice(len(state.tokens), 0, 0, (), (), text.lost)
            return (), nothing, ChancesPace(len(state.tokens), 0, 0.0, 0.0, *text, self.identity)
        began = self.meter.now()
        in_time = takewhile(lambda _: self.meter.since(began) <= credit, stream)
        drafts, tokens, seconds, best = self._weighed(in_time, costs, text.worth, credit)
        self._drafting.note((self.meter.since(began)) / max(1, len(drafts)))
        choice = Choice(len(state.tokens), len(drafts), best, tuple(tokens), tuple(seconds), text.lost)
        promised = (tokens[best] - 1) / text.worth
        drafting = seconds[len(drafts)] - costs[len(drafts)]
        pace = ChancesPace(len(state.tokens), best, drafting, promised, *text, self.identity)
        return tuple(drafts[:best]), choice, pace

    def _weighed(
        self, stream: Iterator[Proposal], costs: Sequence[float], worth: float, credit: float
    ) -> tuple[list[Proposal], list[float], list[float], int]:
        """As many drafts as it takes to tell, what each number of them promises in tokens and seconds, and the best.

        A draft that was drawn is taken, and all before it: it may not be left out because of what it is.
        """
        shortest = list(accumulate(reversed(costs), min))[::-1]
        drafts, chances, tokens, seconds, best = list[Proposal](), list[float](), [1.0], [costs[0]], 0
        for draft in islice(stream, len(costs) - 1):
            chances.append(_chance(draft, chances))
            drafts.append(draft)
            n = len(drafts)
            tokens.append(tokens[-1] + worth * chances[-1])
            seconds.append(costs[n] + n * self._drafting.estimate)
            refused = max(DOUBT, 2 - tokens[1])
            safe = refused * (seconds[n] - costs[0]) <= credit
            if not isinstance(draft.q, PointMass) or (safe and tokens[n] / seconds[n] > tokens[best] / seconds[best]):
                best = n
            further = (len(costs) - 1 - n) * worth * chances[-1]  # the drafts to come are no likelier than this one
            if (tokens[n] + further) / shortest[n] <= tokens[best] / seconds[best]:
                break
        return drafts, tokens, seconds, best

    def _settled(self, state: DecodeState, costs: Sequence[float] | None) -> _Text:
        """The text up to here, once what became of the last step is counted."""
        match state.pace:
            case ChancesPace(length, gamma, drafting, promised, before, given, lost, policy) if (
                policy == self.identity and are_numbers(state.pace)
            ):
                came = len(state.tokens) - length
                took = 0.0 if costs is None else costs[min(int(gamma), len(costs) - 1)] - costs[0] * came
                return _Text(before + promised, given + (came - 1 if gamma else 0), lost + took + drafting)
        return _Text()


def _chance(draft: Proposal, before: Sequence[float]) -> float:
    """The probability that the target takes the whole path down to a draft, as its drafter or a guess has it."""
    if draft.chance is not None:
        _is_chance("chance", draft.chance)
        return draft.chance
    parent = len(before) - 1 if draft.parent == BEFORE else draft.parent
    return PRIOR * (1.0 if parent == TEXT else before[parent])
