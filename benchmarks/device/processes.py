"""Each part in a process of its own, within its share of the time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from time import perf_counter
from typing import Final, final

import torch
from attrs import frozen
from transformers.utils import logging

from benchmarks.device.attention import without_cudnn
from benchmarks.device.found import Failure, Result, Table
from benchmarks.device.models import Setup
from benchmarks.device.parts import PARTS, Part
from specflow.errors import said


@final
@frozen
class Begun:
    """A part's process is there, and has imported what it needs."""


@final
@frozen
class Note:
    """A warning."""

    text: str


@final
@frozen
class Ended:
    """A part came to its end, or to an error."""

    error: str | None


UNENDED: Final = "it has not ended"
"""The error of a part that is still running, so that a page which is written meanwhile does not claim all of it."""


def _within_process(part: Part, setup: Setup, out: Connection) -> None:
    """Send all that comes of a part."""
    logging.set_verbosity_error()
    if setup.tiny and setup.device.type == "cpu":
        torch.set_num_threads(1)  # tiny passes spend their time waiting for threads
    out.send(Begun())
    error, noted = None, set[str]()

    def note(message: Warning | str, category: type[Warning]) -> None:
        text = f"{category.__name__}: {' '.join(str(message).split())}"
        if text not in noted:
            noted.add(text)
            out.send(Note(text))

    with warnings.catch_warnings(), torch.no_grad(), without_cudnn():
        warnings.simplefilter("always")
        for ignored in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", ignored)
        warnings.showwarning = lambda message, category, *_: note(message, category)
        try:
            for table in part(setup):
                out.send(table)
        except Exception as failure:  # whatever it is, the other parts may tell something
            error = said(failure)
    out.send(Ended(error))


def carried_out(setup: Setup, budget: float, parts: Sequence[tuple[str, Part, float]] = PARTS) -> Iterator[Result]:
    """Each part within its share of what was given, and none beyond the whole of it: what is known after each table.

    Each runs in a process of its own: an illegal access leaves a process no device to go on with, and what hangs in a
    driver hears no signal.
    """
    end = perf_counter() + budget
    processes = processes_for(setup.device)
    for name, part, share in parts:
        began = perf_counter()
        if began >= end:
            yield Result(name, 0.0, (), (), "no time was left for it", ended=True)
            continue
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=_within_process, args=(part, setup, theirs))
        process.start()
        theirs.close()
        try:
            yield from _received(name, process, ours, share * budget, end)
        finally:
            process.kill()
            process.join(PATIENCE)
            ours.close()


def processes_for(device: torch.device) -> ForkServerContext | SpawnContext:
    """Where processes come from: a server forks them that has imported everything, so they wait for the device only.

    Where a forked one does not reach the device, as when an import has asked the driver for it, each imports all by
    itself, which takes some of the budget.
    """
    forked = get_context("forkserver")
    forked.set_forkserver_preload(["benchmarks.device.parts"])
    process = forked.Process(target=_reach, args=(device,))
    process.start()
    process.join(9 * PATIENCE)
    reached = process.exitcode == 0
    process.kill()
    return forked if reached else get_context("spawn")


def _reach(device: torch.device) -> None:
    torch.zeros(1, device=device)


PATIENCE: Final = 10.0
"""Seconds in which a process ends that was told to."""


def _received(name: str, process: BaseProcess, source: Connection, share: float, end: float) -> Iterator[Result]:
    """What a part's process sends, until it ends, or `share` seconds after it began, or at `end`."""
    began, tables, notes, failures = perf_counter(), list[Table](), list[str](), list[str]()
    stop = end

    def result(error: str | None) -> Result:
        errors = "; ".join([*failures, *([] if error is None else [error])])
        return Result(name, perf_counter() - began, tuple(tables), tuple(notes), errors or None, error != UNENDED)

    while source.poll(max(0.0, stop - perf_counter())):
        try:
            message = source.recv()
        except EOFError:
            process.join(PATIENCE)
            yield result(f"its process ended with {process.exitcode}")
            return
        match message:
            case Begun():
                began = perf_counter()
                stop = min(began + share, end)
            case Table():
                tables.append(message)
                yield result(UNENDED)
            case Failure():
                failures.append(str(message))
                yield result(UNENDED)
            case Note(text):
                notes.append(text)
                yield result(UNENDED)
            case Ended(error):
                yield result(error)
                return
    yield result(f"it was ended after {perf_counter() - began:.0f} s")
