"""Cost-aware γ where drafters tell their chances: as many drafts as promise the most tokens per second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple, final

from attrs import Factory, define, field

from specflow.distribution import PointMass
from specflow.guards.checks import number
from specflow.policies.acceptance import PRIOR, Certain, pulled
from specflow.policies.choice import DOUBT, Choice, are_numbers, credit
from specflow.policies.meter import CostMeter, Costs, Durations
from specflow.state import TEXT, DecodeState, Pace, Proposal
from specflow.trees import parent_of

TRUST: Final = 4.0  # for how many tokens a drafter's chances are believed before the text has told what they are worth

_is_chance = number("a draft's chance is not a finite number", "give the guess of a probability")


class ChancesPace(NamedTuple):
    """What is carried between steps: what the last one took and promised, the text, and whose it is.

    Of the text: the tokens that its drafts promised and gave, and the seconds lost to them.
    """

    length: float
    gamma: float
    drafting: float
    promised: float
    text_promised: float
    text_given: float
    text_lost: float
    policy: float

    @property
    def worth(self) -> float:
        """How many tokens of the text came for each that the drafter's chances promised."""
        return (self.text_given + TRUST) / (self.text_promised + TRUST)


@final
@define(eq=False)
class _Weighed:
    """Drafts in the making: what each number of them promises in tokens and in seconds, and the best number.

    A draft that was drawn is taken, and all before it: it may not be left out because of what it is.
    """

    costs: Costs
    worth: float
    drafting: float
    credit: float
    drafts: list[Proposal] = field(factory=list)
    chances: list[float] = field(factory=list)
    tokens: list[float] = field(factory=lambda: [1.0])
    seconds: list[float] = field(init=False, default=Factory(lambda self: [self.costs.expected[0]], takes_self=True))
    drawn: int = 0
    best: int = 0
    _left: dict[int, float] = field(factory=lambda: {TEXT: 1.0})
    _shortest: list[float] = field(
        init=False,
        default=Factory(lambda self: list(accumulate(self.costs.expected[::-1], min))[::-1], takes_self=True),
    )

    def add(self, draft: Proposal) -> None:
        n = len(self.drafts) + 1
        parent = parent_of(draft, n - 1)
        if draft.chance is None:
            chance = PRIOR * max(0.0, self._left[parent])
        else:
            _is_chance("chance", draft.chance)
            chance = min(max(float(draft.chance), 0.0), 1.0)  # numpy's in a pace would be no number of ours
        self._left[parent] -= chance
        self._left[n - 1] = chance
        self.drafts.append(draft)
        self.chances.append(chance)
        self.tokens.append(self.tokens[-1] + self.worth * chance)
        self.seconds.append(self._seconds(n))
        if not isinstance(draft.q, PointMass):
            self.drawn = self.best = n
        elif self._pays(n, self.tokens[n]):
            self.best = n

    def goes_on(self, drawn: bool) -> bool:
        """Whether more drafts may pay. Those that are `drawn` have to be taken: would they, by a guess of them?"""
        n, most = len(self.drafts), len(self.costs.expected) - 1
        chance = self.chances[-1] if self.chances else 1.0
        if not drawn:
            further = (most - n) * self.worth * chance  # the drafts to come are no likelier than this one
            least = self._shortest[n] + n * self.drafting
            return n < most and (self.tokens[n] + further) / least > self._rate
        tokens = self.tokens[n]
        for more in range(n + 1, most + 1):
            chance *= PRIOR
            tokens += self.worth * chance
            if self._pays(more, tokens):
                return True
        return False

    @property
    def _rate(self) -> float:
        return self.tokens[self.best] / self.seconds[self.best]

    def _seconds(self, n: int) -> float:
        return self.costs.expected[n] + n * self.drafting

    def _pays(self, n: int, tokens: float) -> bool:
        """Whether n drafts that promise so much are better than the best, and the text can afford their rejection."""
        first = self.tokens[1] if self.drafts else 1 + self.worth * PRIOR
        # What was never timed may take more than is expected, whether its drafts stand or not.
        risk = self.costs.worst[n] - self.costs.expected[n]
        is_safe = max(DOUBT, 2 - first) * (self._seconds(n) - self.costs.expected[0]) + risk <= self.credit
        return is_safe and tokens / self._seconds(n) > self._rate


@final
@define(eq=False)
class ByChances:
    """The first n drafts, with n maximising (1 + w Σ chance) / (t(n + 1) + d(n)): seconds of a pass, and of drafting.

    Σ is over the n drafts: a draft's chance is the probability that one more token is taken; where the drafter does not
    tell it, it is 0.6 of what its parent and the siblings before it leave. w corrects the chances by what came of them
    in this text, (given + 4) / (promised + 4) in tokens. What a text may lose to drafting, whose time is measured, and
    to drafts that were not taken, is what `choice.credit` says.

    Certain drafts are looked at before n is chosen. One that is drawn is taken, so whether to draw it is decided
    before, by a guess: each of the next is 0.6 times as likely as the one before it.
    Source: Chen et al. 2402.12374 (Sequoia), whose one tree for a machine is chosen anew here for each text and place.
    """

    meter: CostMeter
    most: int
    identity: int
    _drafting: Durations = field(init=False, factory=Durations)
    _certain: Certain = field(init=False, factory=Certain)

    def step(
        self,
        stream: Iterator[Proposal],
        state: DecodeState,
        costs: Costs | None,
        lost: float,
        before: Sequence[Proposal] = (),
    ) -> tuple[tuple[Proposal, ...], Choice, Pace]:
        """The drafts to take, why, and the pace to carry on.

        `lost` is what the text lost, where the pace does not say it. `before` were pulled from the stream already.
        """
        pace = self._settled(state, costs, lost)
        left = 0.0 if costs is None else credit(costs.expected[0], len(state.output), pace.text_lost)
        weighed = _Weighed(costs or Costs(*[(1.0,) * (len(before) + 1)] * 2), pace.worth, self._drafting.estimate, left)
        for draft in before:
            self._certain.note(len(weighed.drafts), draft)
            weighed.add(draft)
        taken, drafting = weighed.drawn, 0.0
        tokens: tuple[float, ...] = ()
        seconds: tuple[float, ...] = ()
        # A tree after a prompt that was not read costs a whole pass more, and no pass tells what a longer prompt costs.
        if costs is not None and state.output and self._drafting.estimate <= left:
            spent = self._pull(stream, weighed)
            taken, drafting = weighed.best, min(spent, 3 * weighed.seconds[weighed.best])  # a stall is nobody's loss
            tokens, seconds = tuple(weighed.tokens), tuple(weighed.seconds)
        choice = Choice(len(state.tokens), len(weighed.drafts), taken, tokens, seconds, pace.text_lost)
        promised = sum(weighed.chances[:taken])
        after = pace._replace(length=len(state.tokens), gamma=taken, drafting=drafting, promised=promised)
        return tuple(weighed.drafts[:taken]), choice, after

    def _pull(self, stream: Iterator[Proposal], weighed: _Weighed) -> float:
        """As many drafts as it takes to tell, and as there is time for; the seconds that went into them."""
        began, before = self.meter.now(), len(weighed.drafts)
        asked, is_late, spent = False, False, 0.0
        while not is_late and weighed.goes_on(len(weighed.drafts) >= self._certain.known):
            asked, draft = True, pulled(stream)
            spent = self.meter.since(began)
            is_late = spent > weighed.credit
            if not self._drafting.count:  # what drafts take is seen as they come
                weighed.drafting = spent / (1 + len(weighed.drafts) - before)
            if draft is None:
                break
            self._certain.note(len(weighed.drafts), draft)
            if not (is_late and isinstance(draft.q, PointMass)):
                weighed.add(draft)
        if asked:
            self._drafting.note(spent / max(1, len(weighed.drafts) - before))
        return spent

    def _settled(self, state: DecodeState, costs: Costs | None, lost: float) -> ChancesPace:
        """The pace, once what became of the last step is counted; a new one where it is not this policy's."""
        pace = state.pace
        if not isinstance(pace, ChancesPace) or pace.policy != self.identity or not are_numbers(pace):
            return ChancesPace(0, 0, 0.0, 0.0, 0.0, 0.0, lost, self.identity)
        came = len(state.tokens) - pace.length
        took = 0.0
        if costs is not None:
            took = costs.worst[min(int(pace.gamma), len(costs.worst) - 1)] - costs.expected[0] * came
        return pace._replace(
            text_promised=pace.text_promised + pace.promised,
            text_given=pace.text_given + (came - 1 if pace.gamma else 0),
            text_lost=pace.text_lost + took + pace.drafting,
        )
