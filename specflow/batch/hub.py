"""A batch is many decodes that wait for the same model: each runs as a greenlet, and one pass answers all who wait.

A decode is ordinary code: where it asks a predictor that can read several texts at once, it waits, and goes on with its
rows. No stage, drafter or policy knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from inspect import GEN_RUNNING, GEN_SUSPENDED, getgeneratorstate
from threading import Thread, current_thread
from types import TracebackType
from typing import Final, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, cast, final
from weakref import ref

from attrs import define, field, frozen
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from typing_extensions import override

from specflow.batch.modes import Modes, modes_now, within
from specflow.errors import DecodeError
from specflow.guards.checks import calls, named, shown, valid, whole
from specflow.predictors.memo import nobody
from specflow.state import Proposal, Tokens

T = TypeVar("T")

PATIENCE: Final = 8
"""For how many passes over other models a decode waits at most, though more decodes wait for those."""


@final
@frozen(eq=False)
class Asked:
    """What one predictor is asked: a text, and drafts after it. `by()` is who asks; None where that is not known."""

    tokens: Tokens
    drafts: Sequence[Proposal]
    by: Callable[[], object] = field(
        default=nobody, validator=valid(calls("what tells who asks", "give a function of nothing"))
    )


Reply: TypeAlias = Tensor | Exception | None
"""Logits [n + 1, V], what went wrong with this text, or None: not yet, ask again."""


class Reads(Protocol):
    """Reads several texts in one pass, each as if it were alone."""

    def __call__(self, asked: Sequence[Asked], /) -> Sequence[Reply]:
        """The reply to each."""
        ...


@final
@frozen
class Failed:
    """A decode that raised `error`. The others of its batch went on."""

    error: Exception


class _Wait(NamedTuple):
    """What a decode waits for, since which pass."""

    read: Reads
    asked: Asked
    modes: Modes
    since: int


@final
class _Decode(greenlet):
    """A decode of a batch. greenlet's own way to tell one's own greenlets from others, hence the inheritance."""

    hub: _Hub
    by: Callable[[], object]
    is_closing: bool = False


@final
@define(eq=False)
class _Hub:
    """Where decodes wait: the thread and the modes in which they began, and how many passes were made."""

    thread: Thread = field(init=False)
    modes: Modes = field(init=False)
    passes: int = 0
    tasks: dict[int, _Decode] = field(factory=dict)
    waiting: dict[int, _Wait] = field(factory=dict)
    unfinished: dict[Reads, Modes] = field(factory=dict)
    """In which modes a reader has begun what it has not read to the end."""


@final
@frozen(eq=False)
class Shared:
    """A predictor whose passes are shared: in `together` a call waits for all others who wait for the same `read`, and
    one pass answers them. Elsewhere it reads at once.

    >>> import torch
    >>> def read(asked):
    ...     return [torch.tensor([[float(len(each.tokens))]]) for each in asked]
    >>> Shared(read)((5, 6), ())
    tensor([[2.]])
    """

    read: Reads = field(validator=valid(calls("what reads several texts", "give a function of a list of Asked")))

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each draft."""
        here = getcurrent()
        if isinstance(here, _Decode) and not here.is_closing and here.parent is not None:
            hub, parent = here.hub, here.parent
            wait = _Wait(self.read, Asked(tokens, drafts, here.by), modes_now(), hub.passes)
            del here  # a greenlet that holds itself while it waits is never let go
            with within(hub.modes):
                reply = parent.switch(wait)
        else:
            asked, reply = [Asked(tokens, drafts)], None
            while reply is None:
                (reply,) = _replies(self.read, asked)
        if isinstance(reply, Exception):
            raise reply
        return cast(Tensor, reply)


def together(decodes: Iterable[Callable[[], T]], slots: int = 8) -> Generator[tuple[int, T | Failed]]:
    """Run decodes, at most `slots` at a time, and yield each one's number and what it returned, as they end.

    Where decodes ask a `BatchPredictor` they wait, until all that run wait; then one pass answers all who asked the
    same model. Of several models the one with the most askers goes first, and none waits for more than a few passes
    over others. Where a decode ends the next one begins, so `decodes` may be endless; it is asked for no more than can
    run. It is asked again after each pass: an iterator that has no more for now (`StopIteration`) may have some later.

    What a decode raises ends that one alone: it is yielded as `Failed`. Anything else that is raised (Ctrl-C, or what
    `decodes` raises) ends all of them, and so does closing the iterator: those that run are unwound, `GreenletExit`
    being raised where they wait, and give their rows back. A state is a value: whatever a decode kept can be gone on
    with.

    Each decode keeps its own context variables, and torch's modes as it sets them (gradients, inference mode,
    autocast); all begin with those of the caller at the first step. Those who wait in other modes get another pass.
    A decode may itself run `together`. What a decode runs in greenlets or threads of its own reads alone.

    A batch stays in the thread that asks for its first text. Another thread is refused with a `DecodeError`, and the
    batch can still be gone on with, or closed, in its own. What is left in another thread is unwound in its own, too,
    when that one next runs a greenlet, which may leave it with torch's modes in which the batch began. Once its thread
    has ended a batch can be closed in any: nothing is left to unwind it in.

    >>> from specflow import GreedyProcessor, Dice, along_paths, autoregressive_step, run, start
    >>> import torch
    >>> step = autoregressive_step(along_paths(lambda text: torch.eye(9)[text[-1] + 1]), GreedyProcessor(), Dice())
    >>> decodes = [lambda i=i: run(step, start([i], 3).unwrap()) for i in range(3)]
    >>> sorted((number, end.state.output) for number, end in together(decodes, slots=2))
    [(0, (1, 2, 3)), (1, (2, 3, 4)), (2, (3, 4, 5))]
    """
    whole(1, "run one decode at a time at least")("slots", slots)
    several: object = decodes
    if not isinstance(several, Iterable) or isinstance(several, Tensor | str | bytes):
        raise DecodeError("decodes", "decodes are not several", shown(several), "give functions that take nothing")
    return _Ends(iter(decodes), int(slots))


@final
class _Ends(Generator[tuple[int, T | Failed], None, None]):
    """The ends of decodes, in one thread. A generator alone would end where it refuses another thread."""

    def __init__(self, source: Iterator[Callable[[], T]], slots: int) -> None:
        self._hub = _Hub()
        self._ends = _running(self._hub, source, slots)

    @override
    def send(self, value: None, /) -> tuple[int, T | Failed]:
        self._check()
        return self._ends.send(value)

    @override
    def throw(
        self, typ: type[BaseException] | BaseException, val: object = None, tb: TracebackType | None = None, /
    ) -> tuple[int, T | Failed]:
        self._check()
        return self._ends.throw(val if isinstance(val, BaseException) else typ)

    @override
    def close(self) -> None:
        if self._is_elsewhere and not self._hub.thread.is_alive():
            self._ends.close()
        else:
            super().close()

    def _check(self) -> None:
        if self._is_elsewhere:
            remedy = "go on with it in the thread that began it"
            if not self._hub.thread.is_alive():
                remedy = "close it, as the thread that began it has ended"
            raise DecodeError("decodes", "a batch is gone on with in another thread", current_thread().name, remedy)

    @property
    def _is_elsewhere(self) -> bool:
        has_begun = getgeneratorstate(self._ends) in {GEN_RUNNING, GEN_SUSPENDED}
        return has_begun and self._hub.thread is not current_thread()


def _running(hub: _Hub, source: Iterator[Callable[[], T]], slots: int) -> Generator[tuple[int, T | Failed]]:
    numbered = enumerate(source)
    hub.thread, hub.modes = current_thread(), modes_now()
    with ExitStack() as unwinding:
        unwinding.callback(_unwind, hub)
        while True:
            while len(hub.tasks) < slots and (new := next(numbered, None)) is not None:
                number, decode = new
                task = hub.tasks[number] = _Decode(_caught(decode))
                task.hub, task.by, task.gr_context = hub, partial(_living, ref(task)), copy_context()
                yield from _resumed(hub, number)
            if not hub.waiting:
                return
            for number, reply in _pass(hub):
                yield from _resumed(hub, number, reply)


def _living(decode: ref[_Decode]) -> _Decode | None:
    """A decode that has not ended."""
    found = decode()
    return None if found is None or found.dead else found


def _caught(decode: Callable[[], T]) -> Callable[[], _Ended[T]]:
    def run() -> _Ended[T]:
        try:
            calls("a decode", "give functions that take nothing")("decodes", decode)
            return _Ended(decode())
        except Exception as error:  # whatever it is, it is this decode's
            return _Ended(Failed(error))

    return run


@final
@frozen
class _Ended(Generic[T]):
    outcome: T | Failed


def _resumed(hub: _Hub, number: int, *reply: Reply) -> Iterator[tuple[int, T | Failed]]:
    """Let a decode go on until it waits again, or has ended."""
    task = hub.tasks[number]
    task.parent = getcurrent()  # whoever goes on with this iterator is where a decode waits
    with within(hub.modes):
        said = task.switch(*reply)
    if isinstance(said, _Wait):
        hub.waiting[number] = said
    else:
        del hub.tasks[number]
        yield number, cast("_Ended[T]", said).outcome


def _pass(hub: _Hub) -> list[tuple[int, Reply]]:
    """One pass for those who wait for the same, and the reply to each that has one."""
    groups: dict[tuple[Reads, Modes], list[int]] = {}
    for number, wait in hub.waiting.items():
        groups.setdefault((wait.read, wait.modes), []).append(number)
    oldest = min(hub.waiting.values(), key=lambda wait: wait.since)
    if hub.passes - oldest.since >= PATIENCE:
        chosen = oldest.read, oldest.modes
    else:
        chosen = max(groups, key=lambda group: len(groups[group]))
    # Where there is no room for all, those who ask the same in other modes would take the place of what was read.
    begun = chosen[0], hub.unfinished.get(chosen[0], chosen[1])
    read, modes = chosen = begun if begun in groups else chosen
    numbers = groups[chosen]
    hub.passes += 1
    with within(modes):
        replies = _replies(read, [hub.waiting[number].asked for number in numbers])
    if any(reply is None for reply in replies):
        hub.unfinished[read] = modes
    else:
        hub.unfinished.pop(read, None)
    ready: list[tuple[int, Reply]] = []
    for number, reply in zip(numbers, replies, strict=True):
        wait = hub.waiting.pop(number)
        if reply is None:
            hub.waiting[number] = wait._replace(since=hub.passes)
        else:
            ready.append((number, reply))
    return ready


def _replies(read: Reads, asked: Sequence[Asked]) -> Sequence[Reply]:
    """What `read` replies to each; the same error to all where it raises or replies something else."""
    try:
        replies: object = read(asked)
        right = isinstance(replies, list | tuple) and all(
            isinstance(reply, Tensor | Exception | None) for reply in replies
        )
        if not right or len(cast(Sequence[object], replies)) != len(asked):
            remedy = "return logits, an error or None for each"
            raise DecodeError("read", f"{named(read)} does not reply to each", shown(replies), remedy)  # noqa: TRY301
    except Exception as error:  # whatever it is, it is what each of them gets
        return [error] * len(asked)
    return cast(Sequence[Reply], replies)


def _unwind(hub: _Hub) -> None:
    """End all that run, each where it waits, whatever the others raise on the way.

    Where nobody has the batch any more another thread may come by: greenlet then ends them, in their own.
    """
    for task in hub.tasks.values():
        task.is_closing = True
    if hub.thread is not current_thread():
        hub.tasks.clear()
    with ExitStack() as stack:
        for task in hub.tasks.values():
            stack.callback(_closed, task)


def _closed(task: _Decode) -> None:
    if task:  # it has begun and not ended
        task.parent = getcurrent()
        with within(task.hub.modes):
            said = task.throw(GreenletExit)
        if isinstance(said, _Ended) and isinstance(said.outcome, Failed):
            raise said.outcome.error
