"""The cost meter: what this machine takes for a target pass, measured while decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median_low
from threading import Lock
from time import perf_counter
from typing import Final, TypeAlias, final
from weakref import WeakKeyDictionary

import torch
from attrs import define, field, frozen, setters
from numpy import interp
from torch import Tensor
from torch.nn import Module

from specflow.guards.checks import MOST, a, calls, number, valid, whole
from specflow.guards.finite import is_near
from specflow.prefix import TEXTS, common_prefix
from specflow.state import Predictor, Proposal, Tokens

Clock: TypeAlias = Callable[[], float]
"""Seconds since some moment. What a meter times has arrived by then: it waits for the device that computes it."""

TICK: Final = 1e-9  # nothing takes less, whatever a coarse clock says, or one that goes backwards
AGES: Final = 1e9  # nothing takes longer: about thirty years
WINDOW: Final = 9  # how many recent durations an estimate looks at
HORIZON: Final = 256  # how many passes a length is remembered that is not timed again: what was slow is tried again
FRESH: Final = 16  # how many passes the duration of one over one token is taken for granted where little depends on it
CHANGED: Final = 1.1  # how many times as quick as it a longer pass must be to tell that it has changed
RISK: Final = 0.5  # what a token may add to such a pass, in passes over one, as far as is known
SLOPE: Final = 0.01  # what a token is thought to add to a pass that was never timed: little, so that it soon is timed


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


_tells_time = number("the clock tells no finite number", "give a function of seconds, such as time.perf_counter")
_is_moment = number("the moment is not a finite number", "give what `now` returned")
_is_length = whole(1, "give the number of tokens that were read", MOST)
_is_duration = number("the duration is not a finite number", "give seconds")


@final
@define(eq=False)
class CostMeter:
    """What this machine takes for a target pass over k new tokens, measured while decoding.

    `timed(target)` is the same predictor, its passes noted by how many tokens they had to read; what reads a prompt is
    not noted. An estimate is the lower median of the last few, so that a stall moves nothing; a length k that was timed
    only once counts as at most k passes over one token. Costs need not grow with k: one that was never timed lies on
    the line between its neighbours. What was not timed for 256 passes is forgotten, and so is a pass over one token
    once longer ones have become quicker than it was: the text is shorter now, or the machine is less busy.

    Threads may share a meter, and the predictors that it times, and decodes may take turns. `DecodeError` where the
    clock tells no finite number; one that stands still or goes backwards makes everything quick.

    >>> meter = CostMeter()
    >>> for k, seconds in ((1, 2.0), (1, 9.0), (5, 4.0)):
    ...     meter.note(k, seconds)
    >>> meter.seconds(5)
    [2.0, 2.5, 3.0, 3.5, 4.0]
    """

    clock: Clock = field(default=perf_counter, validator=valid(calls("a clock", "give one, such as time.perf_counter")))
    _passes: int = field(init=False, default=0, on_setattr=setters.NO_OP)
    _noted: dict[int, Durations] = field(init=False, factory=dict, repr=False)
    _lock: Lock = field(init=False, factory=Lock, repr=False)

    def timed(self, target: Predictor) -> Predictor:
        """`target`, timed. What it answers is its own."""
        calls("a predictor", "give one, such as a CachedPredictor")("target", target)
        kept: tuple[tuple[Tokens, int], ...] = ()  # the last few texts and how many drafts followed each, newest first

        def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
            nonlocal kept
            shares = [common_prefix(text, tokens) for text, _ in kept]
            shared = max(shares, default=0)
            nearest = kept[shares.index(shared)] if kept else ((), 0)
            began = self.now()
            logits = target(tokens, drafts)
            wait_for(logits)
            seconds = self.since(began)
            goes_on = len(tokens) - shared <= nearest[1] + 1
            kept = ((tokens, len(drafts)), *[text for text in kept if not (goes_on and text is nearest)])[:TEXTS]
            if goes_on:
                self.note(len(drafts) + 1, seconds)
            return logits

        return predict

    def now(self) -> float:
        """What the clock says."""
        seconds = self.clock()
        _tells_time("clock", seconds)
        return float(seconds)

    def since(self, began: float) -> float:
        """The seconds since then, from `TICK` to `AGES`."""
        _is_moment("began", began)
        return min(max(self.now() - began, TICK), AGES)

    def note(self, k: int, seconds: float) -> None:
        """A pass over k ≥ 1 tokens took `seconds`, a finite number; else `DecodeError`."""
        _is_length("k", k)
        _is_duration("seconds", seconds)
        with self._lock:
            single = self._single()
            if single is None:
                self._noted.pop(1, None)
            known = self._noted.get(k)
            if known is None or self._passes - known.newest >= HORIZON:
                known = self._noted[int(k)] = Durations()
            self._passes += 1
            known.note(float(seconds), self._passes)

    @property
    def stale(self) -> bool:
        """Whether a pass over one token, which all others are weighed against, was not timed for some time."""
        with self._lock:
            return 1 not in self._noted or self._passes - self._noted[1].newest >= FRESH

    def _single(self) -> Durations | None:
        """What a pass over one token takes; None where that is not known, or no longer."""
        single = self._noted.get(1)
        if single is None or self._passes - single.newest >= HORIZON:
            return None
        if self._passes - single.newest < FRESH:
            return single
        since = [each.estimate for each in self._noted.values() if each.count > 1 and each.newest > single.newest]
        return None if min(since, default=AGES) * CHANGED < single.estimate else single

    def seconds(self, most: int) -> list[float] | None:
        """What passes over 1 … `most` ≥ 1 tokens are expected to take, up to twice the longest that was timed.

        None until a single token was timed twice.
        """
        costs = self.costs(most)
        return None if costs is None else list(costs.expected)

    def costs(self, most: int) -> Costs | None:
        """The same, and what they take at worst, as far as is known.

        At worst a length that was timed once takes what it took then, and one beyond those that were timed half a pass
        more for each token, or what each took up to there where that is more; but no more than as many single passes.
        """
        whole(1, "ask for one token or more")("most", most)
        with self._lock:
            single = self._single()
            if single is None or single.count < 2:
                return None
            known = sorted(
                [(k, each) for k, each in self._noted.items() if self._passes - each.newest < HORIZON],
                key=lambda pair: pair[0],
            )
            one, lengths = single.estimate, [k for k, _ in known]
            worst = [each.estimate for _, each in known]
            once = [each.count == 1 for _, each in known]
        expected = [
            min(seconds, k * one) if few else seconds for k, seconds, few in zip(lengths, worst, once, strict=True)
        ]
        last, further = lengths[-1], lengths[-1]  # as many tokens more as there were
        slope = max(RISK * one, (worst[-1] - one) / max(1, last - 1))
        lengths.append(last + further)
        expected.append(expected[-1] * (1 + SLOPE * last))
        worst.append(max(worst[-1], min(worst[-1] + slope * further, lengths[-1] * one)))
        ks = range(1, min(int(most), lengths[-1]) + 1)
        return Costs(tuple(interp(ks, lengths, expected).tolist()), tuple(interp(ks, lengths, worst).tolist()))


@final
@frozen
class Costs:
    """What passes over 1, 2, … tokens are expected to take, and what they may take at worst, in seconds.

    By the former drafts are chosen, so that what was never timed soon is; by the latter it is told whether a text can
    afford that.
    """

    expected: tuple[float, ...]
    worst: tuple[float, ...]


Kind: TypeAlias = tuple[int, int, torch.device, torch.dtype]
"""How many texts a pass is over, on how many threads, and where and in what the model computes."""

_METERS: Final[WeakKeyDictionary[Module, dict[Kind, CostMeter]]] = WeakKeyDictionary()
_METERING: Final = Lock()


def meter_of(model: Module, slots: int = 1) -> CostMeter:
    """The meter that is shared by all who read this model object with as many threads, so that it is measured once.

    Passes over up to `slots` texts at a time have a meter of their own, and so has a model that was moved or converted.
    The meter goes with the model. `DecodeError` for what is no module.

    >>> model = torch.nn.Linear(2, 2)
    >>> meter_of(model) is meter_of(model), meter_of(model) is meter_of(model, slots=8)
    (True, False)
    """
    a(Module, "load a model, with specflow.models.load")("model", model)
    whole(1, "read one text at least")("slots", slots)
    with _METERING:
        known, key = _METERS.setdefault(model, {}), (int(slots), torch.get_num_threads(), *place_of(model))
        if key not in known:
            known[key] = CostMeter()
        return known[key]


def place_of(model: Module) -> tuple[torch.device, torch.dtype]:
    """Where the first of a model's parameters is, and what it is."""
    parameter = next(model.parameters(), torch.empty(0, dtype=torch.float32))
    return parameter.device, parameter.dtype


def wait_for(rows: object) -> None:
    """Wait until rows are computed, if there are any: on a device a pass returns as soon as it is asked for.

    On CUDA for the current stream alone, on which they are: what other threads and models compute is no part of the
    pass, and the whole device may not be waited for while a graph is captured there.
    """
    if not isinstance(rows, Tensor) or is_near(rows):
        return
    if rows.is_cuda:
        torch.cuda.current_stream(rows.device).synchronize()
    elif runs_ahead(rows.device):
        torch.accelerator.synchronize(rows.device)


def runs_ahead(device: torch.device) -> bool:
    """Whether what is asked of a device is still being computed when the call has returned."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and device.type == accelerator.type
