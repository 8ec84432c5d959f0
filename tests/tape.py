"""A tape that repeats recorded operations in place, on a CPU: what a CUDA graph does, and all that it does.

Whatever Python decided at the recording is on the tape for good: a length that became a number, a tensor that was
made anew. A read of a value, which a graph cannot hold, is refused.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, final

import pytest
import torch
from attrs import define, field
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from specflow.accelerate.captured import Work


@final
@define(eq=False)
class Tape:
    """The operations of some work, each with the tensors that it reads and those that it wrote."""

    steps: list[Callable[[], None]] = field(factory=list)

    def replay(self) -> None:
        """Every operation again, from and to the same memory."""
        for step in self.steps:
            step()


@final
class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call] # of torch
    """While it is entered, all operations go on the tape, too."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # of torch
        self.tape = tape

    @override
    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for a value"
        named = dict(kwargs or {})
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # without autograd these arrive whole; what they are made of goes on the tape
                return func.decompose(*args, **named)
        made: object = func(*args, **named)
        if func.is_view:
            return made  # of memory that stays where it is
        in_place = func._schema.is_mutable

        def again() -> None:
            now: object = func(*args, **named)
            for old, new in () if in_place else zip(_tensors(made), _tensors(now), strict=True):
                old.copy_(new)

        self.tape.steps.append(again)
        return made


def on_tape(work: Work) -> Work:
    """A `Capture` for the CPU."""
    tape = Tape()
    with Recording(tape):
        output = work()

    def repeat() -> tuple[Tensor, Tensor]:
        tape.replay()
        return output

    return repeat


def _tensors(made: object) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, tuple | list):
        for part in made:
            yield from _tensors(part)


@final
@define(eq=False)
class Graph:
    """`torch.cuda.CUDAGraph`, for a tape: what was captured, on which device, in which pool of memory."""

    tape: Tape = field(factory=Tape)
    device: torch.device | None = None
    pool: object = None

    def replay(self) -> None:
        """As the tape does."""
        self.tape.replay()


@final
class FakeStream:
    """A stream on which work is merely done."""

    def wait_stream(self, other: FakeStream) -> None:
        """There is only one."""


@final
@define(eq=False)
class FakeCuda:
    """What CUDA was asked for, in order, and what it is left as."""

    graphs: list[Graph]
    asked: list[object] = field(factory=list)
    """Streams that work ran or was captured on, and that the workspaces were cleared."""
    stream: FakeStream = field(factory=FakeStream)
    taking: list[object] = field(factory=list)
    """The pools that what is allocated goes to."""
    breaks: bool = False
    """Whether captures cannot end."""


CLEARED: Final = "the workspaces are cleared"


def on_fake_cuda(patch: pytest.MonkeyPatch, made: list[Graph]) -> FakeCuda:
    """Let CUDA's graphs be tapes; those that are captured are added to `made`."""
    cuda = FakeCuda(made)
    local = threading.local()  # a thread's current device is any, until it is chosen

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        before, local.device = getattr(local, "device", torch.device("meta")), device
        yield
        local.device = before

    @contextmanager
    def on_stream(stream: FakeStream) -> Iterator[None]:
        before, cuda.stream = cuda.stream, stream
        cuda.asked.append(stream)
        try:
            yield
        finally:
            cuda.stream = before

    @contextmanager
    def capturing(graph: Graph, pool: object, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        """What is done within is recorded. (A graph would not do it.) As torch does, a failure leaves all as it is."""
        assert capture_error_mode == "thread_local", "another thread's allocation would end the capture"
        assert not gc.isenabled(), "a graph that is freed would end the capture"
        assert not cuda.taking, "captures do not run beside one another"
        graph.device, graph.pool = local.device, pool
        made.append(graph)
        before, cuda.stream = cuda.stream, stream
        cuda.asked.append(stream)
        cuda.taking.append(pool)
        with Recording(graph.tape):
            yield
        if cuda.breaks:
            raise RuntimeError("the capture was invalidated")
        cuda.taking.remove(pool)
        cuda.stream = before

    def end(device: int, pool: object) -> None:
        if pool not in cuda.taking:
            raise RuntimeError("not currently recording to mempool_id")
        cuda.taking.remove(pool)

    patch.setattr(torch.cuda, "Stream", FakeStream)
    patch.setattr(torch.cuda, "current_stream", lambda: cuda.stream)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "stream", on_stream)
    patch.setattr(torch.cuda, "device", on_device)
    patch.setattr(torch.cuda, "graph_pool_handle", object)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", capturing)
    patch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: cuda.asked.append(CLEARED), raising=False)
    return cuda
