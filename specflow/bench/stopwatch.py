"""Where the time of a text goes: into the target's passes, into drafting, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import TypeVar, final

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.asked import done_by
from specflow.policies.meter import Clock, place_of, runs_ahead
from specflow.state import Tokens

T = TypeVar("T")


def clock_for(model: Module) -> Clock:
    """A clock that first waits for the model's device, so that work is timed where it is asked for."""
    device, _ = place_of(model)
    if not runs_ahead(device):
        return perf_counter

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return perf_counter()

    return synchronised


@final
@frozen
class Pass:
    """One call of the target: how many tokens it was fed, and the seconds it took."""

    fed: int
    seconds: float


@final
@define(eq=False)
class Stopwatch:
    """Times a model's passes and a drafter's work, whoever calls them: our stages or transformers' `generate`.

    `passes` are the target's. `drafting` are the seconds inside a drafter, a drafting model included; passes of the
    target in there (a model that drafts for itself) count as drafting.
    """

    clock: Clock = perf_counter
    passes: list[Pass] = field(init=False, factory=list)
    drafting: float = field(init=False, default=0.0)
    _inside: bool = field(init=False, default=False)

    def watching(self, target: Module) -> AbstractContextManager[None]:
        """Every call of `target` within the block becomes a `Pass`. Afterwards the model is as it was."""
        return _each_call(target, self.clock, self.passed)

    def watching_assistant(self, assistant: Module) -> AbstractContextManager[None]:
        """Every call of `assistant` within the block is drafting: for decoders whose drafter cannot be wrapped."""
        return _each_call(assistant, self.clock, self._drafted)

    def timed(self, drafter: Callable[[Tokens], Iterator[T]]) -> Callable[[Tokens], Iterator[T]]:
        """The same drafter, of chains or of trees; the time inside it is added to `drafting`."""
        return done_by(self.while_drafting, drafter)

    def passed(self, fed: int, seconds: float) -> None:
        """A pass of the target, unless a drafter has asked for it."""
        if not self._inside:
            self.passes.append(Pass(fed, seconds))

    def while_drafting(self, work: Callable[[], T]) -> T:
        """What `work` returns; its time is added to `drafting`."""
        # Not a context manager: its own time, at each proposal, would count as specflow's.
        began, self._inside = self.clock(), True
        try:
            return work()
        finally:
            self._inside = False
            self.drafting += self.clock() - began

    def _drafted(self, fed: int, seconds: float) -> None:
        self.drafting += seconds


@contextmanager
def _each_call(module: Module, clock: Clock, note: Callable[[int, float], None]) -> Iterator[None]:
    began = 0.0

    def before(_module: Module, _arguments: tuple[object, ...]) -> None:
        nonlocal began
        began = clock()

    def after(_module: Module, arguments: tuple[object, ...], named: dict[str, object], _output: object) -> None:
        seconds = clock() - began
        ids = arguments[0] if arguments else named["input_ids"]
        assert isinstance(ids, Tensor)
        note(ids.shape[-1], seconds)

    hooks = module.register_forward_pre_hook(before), module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
