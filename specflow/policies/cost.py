"""Cost-aware γ: measure what passes and drafts take here, and choose the γ with the most expected tokens per second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from operator import mul
from secrets import randbits
from threading import RLock
from typing import Final, NamedTuple, final

from attrs import define, field

from specflow.guards.checks import a, calls, drafts, valid
from specflow.policies.acceptance import Acceptance, Certain, Pulled, Watched
from specflow.policies.chances import ByChances
from specflow.policies.choice import DOUBT, Choice, are_numbers, credit
from specflow.policies.meter import CostMeter, Costs, Durations
from specflow.prefix import TEXTS
from specflow.state import DecodeState, Pace, Proposal

CLOSE: Final = 1.1  # how many times the tokens per second of no draft a draft must promise to be taken nevertheless
LOOK: Final = 0.01  # certain drafts that take less than this share of a pass are looked at before it is decided


@final
@define(eq=False)
class _Drafting:
    """What drafts take: the first of a text (the drafter reads the prompt), the first of a step, and all others."""

    meeting: Durations = field(factory=Durations)
    first: Durations = field(factory=Durations)
    other: Durations = field(factory=Durations)

    def seconds(self, drafts: int) -> float:
        """What a step's drafts take. What was never timed takes nothing, so that it soon is timed."""
        return self.first.estimate + (drafts - 1) * self.other.estimate if drafts > 0 else 0.0


STEPS: Final = count(1)  # numbers the steps of all policies, so that no two of them are one


class CostAwarePace(NamedTuple):
    """What `CostAware` carries between steps: whose it is, the last step, the seconds lost, if the drafter was asked.

    Of the step its number, where it began, what it took, and the seconds that it promised; 0 is no promise.
    """

    policy: float
    step: float
    lost: float
    met: float
    start: float
    gamma: float
    drafting: float
    promised: float


@final
@define(eq=False)
class CostAware:
    """The γ with the most expected tokens per second on this machine, from 0 to `most`.

    maximise (1 + Σ_{i ≤ γ} Π_{j ≤ i} a_j) / (t(γ + 1) + d(γ))

    This is for chains whose drafts tell no chance. Once one does, as those of `LookupTree` do, or does not follow the
    one before it, the first n drafts with the most (1 + w Σ chance) / (t(n + 1) + d(n)) are taken from then on, with w
    what came of the chances in this text (`policies.chances`).

    t comes from `meter`, which has to be the one that times the target; d, the time that γ drafts take, is measured
    here; a_j, the acceptance of the j-th draft once those before it stand, is learnt by source and by how many drafts
    it offered. Certain drafts that cost next to nothing are looked at before γ is chosen, and those not taken are still
    compared with the text that comes, so that γ = 0 learns as well.

    A text may lose 0.8 passes to drafting and 1.2 % of a pass for each token; a γ that is likely to lose more is not
    taken, and while the prompt is read only what had to be drawn to be seen. (A drafter may read the prompt beside
    that, unless what is known of it says that the text will not win it back.) Whether a draft is taken is decided
    before it is drawn, or it is certain: the text's law is the target's whatever the clock says. A seed's text depends
    on the clock only where drafts are drawn and may be rejected, as γ decides how many draws there are (not so in a
    `seed_coupled_step`).

    `tell` hears of each choice. One policy serves one drafter, for many texts, and what it learnt stays with it; up to
    four texts that take turns teach it. Threads may share it: while one drafts, the others wait. A pace of any other
    policy is a fresh start, as its seconds are another meter's. most ≥ 1, else `DecodeError`.
    Source: Leviathan et al. 2211.17192, section 3.3, where one α and one cost ratio c stand for what is measured here;
    for trees Chen et al. 2402.12374 (Sequoia).

    >>> from specflow.state import Request
    >>> meter = CostMeter()
    >>> for k, seconds in ((1, 1.0), (1, 1.0), (2, 1.1), (3, 1.2), (4, 2.0)):
    ...     meter.note(k, seconds)
    >>> tree = [Proposal(token, parent=-1, chance=chance) for token, chance in ((5, 0.5), (6, 0.3), (7, 0.2))]
    >>> [draft.token for draft in CostAware(meter, most=3)(iter(tree), DecodeState(Request((1,), 9), (1, 4)))[0]]
    [5, 6]
    """

    meter: CostMeter = field(validator=valid(a(CostMeter, "give the CostMeter that times the target")))
    most: int = field(default=16, validator=valid(drafts))
    tell: Callable[[Choice], object] = field(
        default=lambda choice: None, validator=valid(calls("a listener", "give a function"))
    )
    _identity: int = field(init=False, factory=lambda: randbits(62), repr=False)  # also where a state was pickled
    _drafting: _Drafting = field(init=False, factory=_Drafting, repr=False)
    _acceptance: Acceptance = field(init=False, factory=Acceptance, repr=False)
    _certain: Certain = field(init=False, factory=Certain, repr=False)
    _watched: dict[float, Watched | None] = field(init=False, factory=dict, repr=False)
    """What is compared with the text as it comes, by the steps of the last few texts, the newest last."""
    _lock: RLock = field(init=False, factory=RLock, repr=False)
    _by_chances: ByChances | None = field(init=False, default=None, repr=False)

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        with self._lock:
            before = state.pace
            pace = None
            if isinstance(before, CostAwarePace) and before.policy == self._identity and are_numbers(before):
                pace = before
            costs = self.meter.costs(int(self.most) + 1)
            if self._by_chances is None:
                drafts, choice, after = self._step(stream, state, pace, costs)
            else:
                lost = 0.0 if pace is None else pace.lost
                drafts, choice, after = self._by_chances.step(stream, state, costs, lost)
            self.tell(choice)
            return drafts, after

    def _step(
        self, stream: Iterator[Proposal], state: DecodeState, pace: CostAwarePace | None, costs: Costs | None
    ) -> tuple[tuple[Proposal, ...], Choice, Pace]:
        lost, watched = self._settled(state, pace, costs)
        met = pace is not None and bool(pace.met)
        draft = Pulled(stream, min(self.most if costs is None else len(costs.worst) - 1, state.room - 1), met)
        gamma = 0
        tokens: tuple[float, ...] = ()
        seconds: tuple[float, ...] = ()
        if costs is not None and state.output:
            left = credit(costs.expected[0], len(state.output), lost)
            gamma, tokens, seconds = self._chosen(draft, costs, left, begins=pace is None)
        elif pace is None and (costs is None or self._is_worth_meeting(draft, costs, state.room)):
            self._pull(draft)  # while the prompt is read nothing is weighed, but the drafter may read it, too
            gamma = draft.drawn
        if draft.is_told:
            self._by_chances = ByChances(self.meter, int(self.most), self._identity)
            return self._by_chances.step(stream, state, costs, lost, draft.proposals)
        step, position = next(STEPS), len(state.tokens)
        promised = seconds[gamma] if pace is not None and seconds else 0.0
        self._watched[step] = watched or draft.watched(position)
        if len(self._watched) > TEXTS:
            del self._watched[next(iter(self._watched))]
        choice = Choice(position, len(draft.proposals), gamma, tokens, seconds, lost)
        after = CostAwarePace(self._identity, step, lost, draft.met, position, gamma, draft.seconds, promised)
        return tuple(draft.proposals[:gamma]), choice, after

    def _is_worth_meeting(self, draft: Pulled, costs: Costs, room: int) -> bool:
        """Whether a text of `room` tokens may win back what it takes the drafter to read its prompt."""
        rates = [tokens / seconds for tokens, seconds in zip(*self._promised(draft, costs), strict=True)]
        return self._drafting.meeting.estimate <= room * (costs.expected[0] - 1 / max(rates))

    def _settled(
        self, state: DecodeState, pace: CostAwarePace | None, costs: Costs | None
    ) -> tuple[float, Watched | None]:
        """The seconds lost up to here and what is watched, once what became of the last step is counted and learnt."""
        if pace is None:
            self._acceptance.begin()
            return 0.0, None
        self._acceptance.step += 1
        lost = pace.lost
        if costs is not None and pace.promised:
            # A stall is nobody's loss: what was drafted is charged with thrice what the step promised to take at most.
            took = costs.worst[min(int(pace.gamma), len(costs.worst) - 1)] + min(pace.drafting, 3 * pace.promised)
            lost += took - costs.expected[0] * (len(state.tokens) - pace.start)
        watched = self._watched.pop(pace.step, None)  # a state that is stepped again is not learnt from again
        return lost, None if watched is None else self._acceptance.learn(watched, state.tokens)

    def _chosen(
        self, draft: Pulled, costs: Costs, credit: float, begins: bool
    ) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """γ, and what each γ promises in tokens and in seconds, with as many drafts pulled as it takes to tell."""
        is_timed, dear = self._drafting.first.count and self._drafting.other.count, LOOK * costs.expected[0]
        free = is_timed and self._drafting.seconds(draft.most) <= min(dear, credit)
        if not free and not draft.met and not begins:
            credit -= self._drafting.meeting.estimate

        # What was never timed may take more than is expected, whether its drafts stand or not.
        risk = [worst - seconds for worst, seconds in zip(costs.worst, costs.expected, strict=True)]
        one = costs.expected[0]

        def best(tokens: Sequence[float], seconds: Sequence[float]) -> int:
            rejected = max(DOUBT, 2 - tokens[1]) if len(tokens) > 1 else 1.0
            safe = [g for g in range(draft.drawn + 1, len(tokens)) if rejected * (seconds[g] - one) + risk[g] <= credit]
            return max((draft.drawn, *safe), key=lambda gamma: tokens[gamma] / seconds[gamma])

        while draft.goes_on:
            looking = free and not draft.drawn and len(draft.proposals) < self._certain.known and draft.seconds <= dear
            if not looking and best(*self._promised(draft, costs)) <= len(draft.proposals):
                break
            self._pull(draft)
        tokens, seconds = self._promised(draft, costs)
        gamma = min(len(draft.proposals), best(tokens, seconds))
        if not draft.drawn and self.meter.stale and tokens[gamma] / seconds[gamma] < CLOSE / seconds[0]:
            gamma = 0
        return gamma, tokens, seconds

    def _promised(self, draft: Pulled, costs: Costs) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """For γ = 0, 1, …: the tokens that a step is expected to add, and the seconds it is expected to take."""
        pulled = len(draft.proposals)
        most = draft.most if draft.goes_on else pulled
        survival = accumulate(self._acceptance.chances(draft, most), mul)
        seconds = [costs.expected[gamma] + self._drafting.seconds(max(gamma, pulled)) for gamma in range(most + 1)]
        return tuple(accumulate(survival, initial=1.0)), tuple(seconds)

    def _pull(self, draft: Pulled) -> None:
        """One more draft, or the stream's end, timed."""
        position, met = len(draft.proposals), draft.met
        began = self.meter.now()
        draft.pull()
        seconds = self.meter.since(began)
        timed = self._drafting.other if position else self._drafting.first if met else self._drafting.meeting
        timed.note(seconds)
        if len(draft.proposals) > position:
            self._certain.note(position, draft.proposals[position])
        if met:
            draft.seconds += seconds
