"""Cost-aware γ: measure what passes and drafts take here, and choose the γ with the most expected tokens per second."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from math import isfinite
from operator import mul
from secrets import randbits
from statistics import median_low
from threading import Lock, RLock
from time import perf_counter
from typing import Final, NamedTuple, TypeAlias, final

from attrs import define, evolve, field, frozen
from torch import Tensor

from specflow.checks import MOST, a, calls, drafts, number, shown, valid, whole
from specflow.distribution import PointMass
from specflow.errors import DecodeError
from specflow.gamma import are_numbers
from specflow.prefix import TEXTS, common_prefix
from specflow.state import DecodeState, Node, Pace, Predictor, Proposal, Tokens, TreePredictor

Clock: TypeAlias = Callable[[], float]
"""Seconds since some moment. On a GPU it must wait for the device first."""

TICK: Final = 1e-9
"""Nothing takes less, whatever a coarse clock says, or one that goes backwards."""

AGES: Final = 1e9
"""Nothing takes longer: about thirty years."""

WINDOW: Final = 9
"""How many recent durations an estimate looks at."""

HORIZON: Final = 256
"""After how many passes a length that was not timed again is forgotten: what was slow once is tried again some day."""

FRESH: Final = 16
"""For how many passes the duration of a pass over one token is taken for granted where little depends on it."""

CLOSE: Final = 1.1
"""How many times the tokens per second of no draft a draft must promise to be taken nevertheless."""

SLOPE: Final = 0.01
"""What a further token is thought to add to a pass that was never timed: little, so that it soon is timed."""

LOOK: Final = 0.01
"""Certain drafts that together take less than this share of a pass are looked at before it is decided about them."""

PRIOR: Final = 0.6
"""The acceptance of a first draft of which nothing is known: high, so that a drafter is tried."""

WEIGHT: Final = 2.0
"""How many drafts a prior counts for."""

OTHERS: Final = 2.0
"""How many drafts everything counts for that was seen in other texts."""

FADE: Final = 0.97
"""How much of what was seen in a text is kept from step to step."""

ADVANCE: Final = 1.0
"""How many passes a text may lose to drafting before it has gained anything."""

LOSS: Final = 0.015
"""How much of a pass it may lose beside for each token."""

DOUBT: Final = 0.5
"""The least probability of a refusal that this reckons with."""


@final
@define(eq=False)
class Durations:
    """The last few durations of one thing, and the number of the pass that the newest belongs to."""

    estimate: float = 0.0
    newest: int = 0
    _seconds: deque[float] = field(factory=lambda: deque(maxlen=WINDOW))

    def note(self, seconds: float, number: int = 0) -> None:
        self._seconds.append(min(max(seconds, TICK), AGES))
        self.estimate, self.newest = median_low(self._seconds), number

    @property
    def count(self) -> int:
        return len(self._seconds)


_is_moment = number("the moment is not a finite number", "give what `now` returned")
_is_duration = number("the duration is not a finite number", "give seconds")


@final
@define(eq=False)
class CostMeter:
    """What this machine takes for a target pass over k new tokens, measured while decoding.

    `timed(target)` is the same predictor, its passes noted by how many tokens they had to read; what reads a prompt is
    not noted. An estimate is the lower median of the last few, so that a stall moves nothing; of a length that was
    timed once it is at most k passes over one token. Costs need not grow with k: each k stands for itself, and one that
    was never timed lies on the line between its neighbours.

    Threads may share a meter, and the predictors that it times: it knows the last few texts, so that decodes may take
    turns. A pass that had to wait for another thread took as long as it took. `DecodeError` where the clock tells no
    finite number; one that stands still or goes backwards makes everything quick.

    >>> meter = CostMeter()
    >>> for k, seconds in ((1, 2.0), (1, 9.0), (5, 4.0)):
    ...     meter.note(k, seconds)
    >>> meter.seconds(5)
    [2.0, 2.5, 3.0, 3.5, 4.0]
    """

    clock: Clock = field(default=perf_counter, validator=valid(calls("a clock", "give one, such as time.perf_counter")))
    _passes: int = field(init=False, default=0)
    _noted: dict[int, Durations] = field(init=False, factory=dict, repr=False)
    _lock: Lock = field(init=False, factory=Lock, repr=False)

    def timed(self, target: Predictor) -> Predictor:
        """`target`, timed. What it answers is its own."""
        calls("a predictor", "give one, such as a CachedPredictor")("target", target)
        read = _Read()

        def predict(tokens: Tokens, last: int) -> Tensor:
            shared, known = read.nearest(tokens)
            began = self.now()
            logits = target(tokens, last)
            seconds = self.since(began)
            goes_on = len(tokens) - shared <= last
            read.keep(_Known(tokens), known if goes_on else None)
            if goes_on:
                self.note(last, seconds)
            return logits

        return predict

    def timed_tree(self, target: TreePredictor) -> TreePredictor:
        """The same for a predictor of trees: a pass over n nodes reads n + 1 tokens."""
        calls("a predictor of trees", "give one, such as the read_tree of a CachedPredictor")("target", target)
        read = _Read()

        def predict(tokens: Tokens, nodes: Sequence[Node]) -> Tensor:
            shared, known = read.nearest(tokens)
            began = self.now()
            logits = target(tokens, nodes)
            seconds = self.since(began)
            goes_on = len(tokens) - shared <= known.nodes + 1
            read.keep(_Known(tokens, len(nodes)), known if goes_on else None)
            if goes_on:
                self.note(len(nodes) + 1, seconds)
            return logits

        return predict

    def now(self) -> float:
        """What the clock says."""
        seconds: object = self.clock()
        if not isinstance(seconds, int | float) or not isfinite(seconds):
            remedy = "give a function that returns seconds, such as time.perf_counter"
            raise DecodeError("clock", "the clock tells no finite number", shown(seconds), remedy)
        return seconds

    def since(self, began: float) -> float:
        """The seconds since then, from `TICK` to `AGES`."""
        _is_moment("began", began)
        return min(max(self.now() - began, TICK), AGES)

    def note(self, k: int, seconds: float) -> None:
        """A pass over k ≥ 1 tokens took `seconds`, a finite number; else `DecodeError`."""
        whole(1, "give the number of tokens that were read", MOST)("k", k)
        _is_duration("seconds", seconds)
        with self._lock:
            self._passes += 1
            self._noted.setdefault(int(k), Durations()).note(float(seconds), self._passes)

    @property
    def stale(self) -> bool:
        """Whether a pass over one token, which all others are weighed against, was not timed for some time."""
        with self._lock:
            return 1 not in self._noted or self._passes - self._noted[1].newest >= FRESH

    def seconds(self, most: int) -> list[float] | None:
        """What passes over 1 … `most` ≥ 1 tokens are expected to take, up to twice the longest that was timed.

        None until a single token was timed twice.
        """
        whole(1, "ask for one token or more")("most", most)
        with self._lock:
            single = self._noted.get(1)
            if single is None or single.count < 2 or self._passes - single.newest >= HORIZON:
                return None
            known = sorted(
                [
                    (k, min(each.estimate, k * single.estimate) if each.count == 1 else each.estimate)
                    for k, each in self._noted.items()
                    if self._passes - each.newest < HORIZON
                ]
            )
        costs, i = [], 0
        for k in range(1, min(int(most), 2 * known[-1][0]) + 1):
            if i + 1 < len(known) and known[i + 1][0] <= k:
                i += 1
            below, cost = known[i]
            if i + 1 < len(known):
                above, higher = known[i + 1]
                costs.append(cost + (higher - cost) * (k - below) / (above - below))
            else:
                costs.append(cost * (1 + SLOPE * (k - below)))
        return costs


class _Known(NamedTuple):
    """A text that was read, and how many nodes behind it."""

    tokens: Tokens = ()
    nodes: int = 0


@final
@define(eq=False)
class _Read:
    """The last few texts that a predictor was given, the newest first."""

    _known: tuple[_Known, ...] = ()

    def nearest(self, tokens: Tokens) -> tuple[int, _Known]:
        """The text that shares the most with these tokens, and how many it shares."""
        known = [(common_prefix(each.tokens, tokens), each) for each in self._known]
        return max(known, key=lambda found: found[0], default=(0, _Known()))

    def keep(self, text: _Known, before: _Known | None) -> None:
        """Remember a text, in place of the one that it grew from."""
        self._known = (text, *[each for each in self._known if each is not before])[:TEXTS]


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


def untold(choice: Choice) -> None:
    """Nobody listens."""


@final
@define(eq=False)
class _Drafting:
    """What drafts take: the first of a text (the drafter reads the prompt), the first of a step, and all others."""

    _meeting: Durations = field(factory=Durations)
    _first: Durations = field(factory=Durations)
    _other: Durations = field(factory=Durations)

    def note(self, position: int, met: bool, seconds: float) -> None:
        kind = self._other if position else self._first if met else self._meeting
        kind.note(seconds)

    @property
    def known(self) -> bool:
        return bool(self._first.count and self._other.count)

    @property
    def meeting(self) -> float:
        return self._meeting.estimate

    def seconds(self, drafts: int) -> float:
        """What a step's drafts take. What was never timed takes nothing, so that it soon is timed."""
        return self._first.estimate + (drafts - 1) * self._other.estimate if drafts > 0 else 0.0


@final
@define(eq=False)
class _Draft:
    """A draft in the making: what was pulled from the stream, up to `most`.

    The first `drawn` proposals have to be taken: the last of them was drawn from a spread law.
    """

    stream: Iterator[Proposal]
    most: int
    proposals: list[Proposal] = field(factory=list)
    drawn: int = 0
    seconds: float = 0.0
    asked: bool = False
    _ended: bool = False

    @property
    def goes_on(self) -> bool:
        return not self._ended and len(self.proposals) < self.most

    @property
    def offered(self) -> int:
        """How long the drafter's whole draft is; 0 while it is not known."""
        return 0 if self.goes_on else len(self.proposals)

    def pull(self) -> None:
        self.asked = True
        proposal = next(self.stream, None)
        if proposal is None:
            self._ended = True
            return
        a(Proposal, "have the drafter yield proposals")("drafter", proposal)
        self.proposals.append(proposal)
        if not isinstance(proposal.q, PointMass):
            self.drawn = len(self.proposals)

    def watched(self, start: int) -> _Watched | None:
        if not self.proposals:
            return None
        tokens = tuple([proposal.token for proposal in self.proposals])
        return _Watched(start, tokens, tuple([proposal.source for proposal in self.proposals]), self.offered)


@final
@frozen(eq=False)
class _Watched:
    """Drafts that the text is compared with as it comes, taken or not."""

    start: int
    tokens: Tokens
    sources: tuple[str, ...]
    offered: int
    learnt: int = 0


@final
@frozen(eq=False)
class _Text:
    """A text between two steps: the seconds lost to drafting, whether the drafter has met it, and what is watched."""

    lost: float = 0.0
    met: bool = False
    watched: _Watched | None = None


@final
@frozen(eq=False)
class _Taken:
    """What a step did, until the next one tells what came of it. Nothing is promised where the prompt is read."""

    step: int
    start: int
    gamma: int
    drafting: float
    promised: float | None
    watched: _Watched | None


@final
@define(eq=False)
class _Count:
    """How many drafts were judged and accepted, recent ones counting more."""

    accepted: float = 0.0
    judged: float = 0.0
    step: int = 0
    text: int = 0


@final
@define(eq=False)
class _Acceptance:
    """Acceptance by source, length of the draft, and position: counts that fade, each leaning on a coarser one.

    A source's drafts of one length lean on its drafts of any length, those on the position before, and the first
    position on `PRIOR`; what is leant on counts for `WEIGHT` drafts.
    """

    step: int = 0
    _text: int = 0
    _source: str = ""
    _counts: dict[tuple[str, int, int], _Count] = field(factory=dict)

    def begin(self) -> None:
        """A new text."""
        self._text += 1

    def chances(self, draft: _Draft, most: int) -> list[float]:
        """The acceptance at each position up to `most`. Drafts yet to come are thought to be of the last source."""
        sources = [proposal.source for proposal in draft.proposals]
        lengths = (0, draft.offered) if draft.offered else (0,)
        chance, chances = PRIOR, []
        for i in range(most):
            source = sources[i] if i < len(sources) else self._source
            for length in lengths:
                count = self._counts.get((source, length, i))
                if count is not None:
                    kept = self._kept(count)
                    chance = (kept * count.accepted + WEIGHT * chance) / (kept * count.judged + WEIGHT)
            chances.append(chance)
        return chances

    def learn(self, watched: _Watched, tokens: Tokens) -> _Watched | None:
        """What is left to be watched, once what the text tells about these drafts by now is learnt."""
        came = tokens[watched.start : watched.start + len(watched.tokens)]
        accepted = common_prefix(came, watched.tokens)
        refused = accepted < len(came)
        for i in range(watched.learnt, accepted + refused):
            for length in {0, watched.offered}:
                count = self._counts.setdefault((watched.sources[i], length, i), _Count())
                kept = self._kept(count)
                count.accepted = kept * count.accepted + (i < accepted)
                count.judged = kept * count.judged + 1
                count.step, count.text = self.step, self._text
        self._source = watched.sources[0]
        return None if refused or accepted == len(watched.tokens) else evolve(watched, learnt=accepted)

    def _kept(self, count: _Count) -> float:
        """How much of a count still counts."""
        faded = FADE ** (self.step - count.step)
        return faded if count.text == self._text else min(faded, OTHERS / max(count.judged, OTHERS))


STEPS: Final = count(1)
"""Numbers the steps of all policies, so that no two of them are one."""


def identity() -> int:
    """A number that no other policy has, in this process or where a state was pickled."""
    return randbits(62)


class CostAwarePace(NamedTuple):
    """What `CostAware` carries between steps: whose it is, its number, the seconds lost, if the drafter was asked."""

    policy: float
    step: float
    lost: float
    met: float


@final
@define(eq=False)
class CostAware:
    """The γ with the most expected tokens per second on this machine, from 0 to `most`.

    maximise (1 + Σ_{i ≤ γ} Π_{j ≤ i} a_j) / (t(γ + 1) + d(γ))

    t comes from `meter`, which has to be the one that times the target. d, the time that γ drafts take, is measured
    here. a_j, the acceptance of the j-th draft once those before it stand, is learnt from the texts, by source and by
    how many drafts it offered, recent ones counting more. Certain drafts that cost next to nothing are looked at before
    γ is chosen, and those not taken are still compared with the text that comes, so that γ = 0 learns as well.

    A text may lose `ADVANCE` passes to drafting and `LOSS` of a pass for each token. A γ that is likely to lose more,
    were its first draft refused, is not taken; so a drafter that is always wrong, or dear, costs little. Whether a
    draft is taken is decided before it is drawn, or it is certain: the text's law is the target's whatever the clock
    says. Under a seed the text itself is the same whatever the clock says where drafts are certain; where they are
    drawn and may be rejected, γ decides how many draws there are, so the clock does too, unless the step is a
    `seed_coupled_step`.

    `tell` hears of each choice. One policy serves one drafter, for many texts, and what it learnt stays with it; only
    one text at a time teaches it. Threads may share it: while one drafts, the others wait. A pace of another policy,
    another `CostAware` among them, is a fresh start: its seconds are another meter's. most ≥ 1, else `DecodeError`.
    Source: Leviathan et al. 2211.17192, section 3.3, where one α and one cost ratio c stand for what is measured here.
    """

    meter: CostMeter = field(validator=valid(a(CostMeter, "give the CostMeter that times the target")))
    most: int = field(default=16, validator=valid(drafts))
    tell: Callable[[Choice], object] = field(default=untold, validator=valid(calls("a listener", "give a function")))
    _identity: int = field(init=False, factory=identity, repr=False)
    _drafting: _Drafting = field(init=False, factory=_Drafting, repr=False)
    _acceptance: _Acceptance = field(init=False, factory=_Acceptance, repr=False)
    _taken: _Taken | None = field(init=False, default=None, repr=False)
    _lock: RLock = field(init=False, factory=RLock, repr=False)

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        with self._lock:
            return self._step(stream, state)

    def _step(self, stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
        costs = self.meter.seconds(int(self.most) + 1)
        pace = self._own(state.pace)
        text = self._settled(state, pace, costs)
        draft = _Draft(stream, min(self.most if costs is None else len(costs) - 1, state.room - 1))
        if costs is not None:
            gamma, tokens, seconds = self._chosen(draft, costs, text, state, begins=pace is None)
        else:  # nothing can be weighed yet, but while the prompt is read the drafter may read it too
            if pace is None:
                self._pull(draft, text)
            gamma, tokens, seconds = len(draft.proposals), (), ()
        step = next(STEPS)
        watched = text.watched or draft.watched(len(state.tokens))
        promised = seconds[gamma] if pace is not None and seconds else None
        self._taken = _Taken(step, len(state.tokens), gamma, draft.seconds, promised, watched)
        self.tell(Choice(len(state.tokens), len(draft.proposals), gamma, tokens, seconds, text.lost))
        after = CostAwarePace(self._identity, step, text.lost, text.met or draft.asked)
        return tuple(draft.proposals[:gamma]), after

    def _own(self, pace: Pace) -> CostAwarePace | None:
        """The pace, if it is one of this policy's."""
        match pace:
            case CostAwarePace(policy) if policy == self._identity and are_numbers(pace):
                return pace
        return None

    def _settled(self, state: DecodeState, pace: CostAwarePace | None, costs: Sequence[float] | None) -> _Text:
        """The text up to here, once what became of the last step is counted and learnt."""
        if pace is None:
            self._acceptance.begin()
            return _Text()
        lost = pace.lost
        self._acceptance.step += 1
        taken = self._taken
        if taken is None or taken.step != pace.step:  # another text came between, or this state is stepped again
            return _Text(lost, bool(pace.met))
        if costs is not None and taken.promised is not None:
            # A stall is nobody's loss: no step is charged with more than thrice what it promised to take.
            took = min(costs[min(taken.gamma, len(costs) - 1)] + taken.drafting, 3 * taken.promised)
            lost += took - costs[0] * (len(state.tokens) - taken.start)
        watched = None if taken.watched is None else self._acceptance.learn(taken.watched, state.tokens)
        self._taken = evolve(taken, watched=watched)  # should this step fail, it is not learnt twice
        return _Text(lost, bool(pace.met), watched)

    def _chosen(
        self, draft: _Draft, costs: Sequence[float], text: _Text, state: DecodeState, begins: bool
    ) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """γ, and what each γ promises in tokens and in seconds, with as many drafts pulled as it takes to tell."""
        credit = costs[0] * (ADVANCE + LOSS * len(state.output)) - text.lost
        free = self._drafting.known and self._drafting.seconds(draft.most) <= LOOK * costs[0]
        if not free and not text.met and not begins:
            credit -= self._drafting.meeting

        def best(tokens: Sequence[float], seconds: Sequence[float]) -> int:
            refused = max(DOUBT, 2 - tokens[1]) if len(tokens) > 1 else 1.0
            safe = [g for g in range(draft.drawn + 1, len(tokens)) if refused * (seconds[g] - costs[0]) <= credit]
            return max((draft.drawn, *safe), key=lambda gamma: tokens[gamma] / seconds[gamma])

        while draft.goes_on:
            looking = free and not draft.drawn
            if not looking and best(*self._promised(draft, costs)) <= len(draft.proposals):
                break
            self._pull(draft, text)
        tokens, seconds = self._promised(draft, costs)
        gamma = min(len(draft.proposals), best(tokens, seconds))
        if not draft.drawn and self.meter.stale and tokens[gamma] / seconds[gamma] < CLOSE / seconds[0]:
            gamma = 0
        return gamma, tokens, seconds

    def _promised(self, draft: _Draft, costs: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """For γ = 0, 1, …: the tokens that a step is expected to add, and the seconds it is expected to take."""
        pulled = len(draft.proposals)
        most = draft.most if draft.goes_on else pulled
        survival = accumulate(self._acceptance.chances(draft, most), mul)
        seconds = [costs[gamma] + self._drafting.seconds(max(gamma, pulled)) for gamma in range(most + 1)]
        return tuple(accumulate(survival, initial=1.0)), tuple(seconds)

    def _pull(self, draft: _Draft, text: _Text) -> None:
        """One more draft, or the stream's end, timed."""
        position, met = len(draft.proposals), text.met or draft.asked
        began = self.meter.now()
        draft.pull()
        seconds = self.meter.since(began)
        self._drafting.note(position, met, seconds)
        if met:
            draft.seconds += seconds
