"""Short passes of a llama, captured once as graphs of kernels and repeated without Python between them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from threading import Lock
from typing import Final, TypeAlias, final
from weakref import ref

import torch
from attrs import define, field
from torch import Tensor
from torch.nn import Embedding, Module
from typing_extensions import override

from specflow.accelerate.llama import (
    Llama,
    Output,
    Segment,
    Sight,
    Weights,
    embedded,
    hiding,
    logits_of,
    read,
    refusing_as,
)
from specflow.batch.texts import Text
from specflow.caches import KVCache, lasting
from specflow.predictors.autocast import uncast
from specflow.trees import depths, lineage

Work: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
"""Some work on tensors that stay where they are, and what comes out: logits and features."""

Capture: TypeAlias = Callable[[Work], Work]
"""What captures the work and returns what repeats it: the same kernels, from and to the same memory.

It may do the work once or more, with the data that are there when it is asked."""

PASSES: Final = (1, 2, 4, 8, 16, 32)
"""The lengths of captured passes: a pass is filled up to the next of them, and longer ones are not captured."""

MOST: Final = 256
"""Of how many tokens a captured pass over several texts is at most: more of them keep a device busy by themselves."""


@final
class Captured(Module):
    """A llama whose passes over up to 32 tokens a text are captured, for a device that waits for Python meanwhile.

    A captured pass repeats the same kernels over the same memory, so everything that changes is data: the ids, the
    position and the shape of a tree are tensors (a text is a tree without branches), and each query sees the whole
    buffer through a mask. What a pass computes for the tokens it is filled up with lies after the text and is
    forgotten, as after a rollback. A graph belongs to the buffers it was captured over; when a text is given up, the
    next one that fits takes over its buffer, and the graphs. So a batch stays in fixed slots: a pass over several texts
    is filled up with the texts that stand beside them, too. Threads take turns, as a graph's memory is there once; so
    each model, and each copy of one, has a `Capture` of its own. While there are hooks on its `ends` nothing is
    captured, as a graph does not call them.

    Source: CUDA graphs as torch offers them. Not yet measured on a device: the tests run it on a CPU, over a tape that
    repeats recorded operations in place as a graph does.
    """

    def __init__(self, eager: Llama, capturing: Callable[[], Capture]) -> None:
        super().__init__()
        self.config = eager.config
        self.eager = eager
        self._capturing = capturing
        self._capture = capturing()
        self._tracks: list[_Track] = []
        self._passes: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Work] = {}
        """By the length of the pass, the numbers of its tracks, and the features that it shows."""
        self._turn = Lock()
        self.eval()

    def get_input_embeddings(self) -> Embedding:
        """The table of the ids, by transformers' name for it."""
        return self.eager.embedding

    @override
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: KVCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        parents: Sequence[int] | None = None,
        texts: Sequence[Text] = (),
        features: Sequence[int] = (),
    ) -> Output:
        """As `Llama`; in a short pass over caches the logits are computed for all tokens."""
        if not texts and input_ids is not None and cache is not None and len(input_ids) == 1:
            texts = (Text(input_ids[0], cache, parents, logits_to_keep),)
        size = None if self._is_watched else _size(texts)
        with torch.no_grad(), self._turn, uncast(self.eager.weights.before_head.device.type):
            if size is not None:
                logits, held = self._read(texts, size, tuple(features))
                return Output(logits[None], texts[0].cache if use_cache else None, held[None] if features else None)
            output: Output = self.eager(input_ids, cache, use_cache, logits_to_keep, parents, texts, features)
            return output

    def new_cache(self) -> KVCache:
        """As `Llama`."""
        return self.eager.new_cache()

    def ends(self) -> tuple[Module, Module]:
        """As `Llama`."""
        return self.eager.ends()

    def without_layers(self, skip: frozenset[int], /) -> Captured:
        """As `Llama`."""
        return refusing_as(self, Captured(self.eager.without_layers(skip), self._capturing))

    def __deepcopy__(self, memo: dict[int, object]) -> Captured:
        # Graphs cannot be copied: captured anew.
        return refusing_as(self, Captured(deepcopy(self.eager, memo), self._capturing))

    @property
    def _is_watched(self) -> bool:
        entering, leaving = self.eager.ends()
        return bool(
            entering._forward_pre_hooks
            or entering._forward_hooks
            or leaving._forward_pre_hooks
            or leaving._forward_hooks
        )

    def _read(self, texts: Sequence[Text], size: int, features: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Logits and features of the texts, one after the other, by a captured pass over `size` tokens of each."""
        numbers = [self._track(self.eager.own(text.cache), text.cache.length + size) for text in texts]
        for number, text in zip(numbers, texts, strict=True):
            self._tracks[number].set(text.ids, text.cache.length, text.parents)
        running = self._beside(numbers, size)
        key = size, running, features
        if key not in self._passes:
            tracks = [self._tracks[number] for number in running]
            with lasting(), torch.no_grad():
                self._passes[key] = self._capture(lambda: _pass(self.eager.weights, tracks, size, features))
        rows, seen = (torch.split(out, size) for out in self._passes[key]())
        wanted, held = [], []
        for number, text in zip(numbers, texts, strict=True):
            text.cache.length += len(text.ids)
            at = running.index(number)
            wanted.append(rows[at][: len(text.ids)][-text.last :])
            held.append(seen[at][: len(text.ids)])
        return torch.cat(wanted), torch.cat(held)

    def _beside(self, numbers: Sequence[int], size: int) -> tuple[int, ...]:
        """The tracks of a pass: that of the one text, or of several texts the first 2, 4, 8, …, so that there are few
        such passes. A track without room stands aside."""
        if len(numbers) == 1:
            return (numbers[0],)
        first = 1 << max(numbers).bit_length()
        others = [i for i in range(min(first, len(self._tracks))) if i not in numbers and self._tracks[i].rest(size)]
        return tuple(sorted([*numbers, *others]))

    def _track(self, cache: KVCache, length: int) -> int:
        """The track of this cache, which then has room for `length` tokens: its own, a free one, or a new one."""
        cache.reserve(length)
        numbered = [*enumerate(self._tracks)]
        own = next((i for i, track in numbered if track.is_of(cache)), None)
        if own is not None:
            return own
        free = next((i for i, track in numbered if track.is_free and track.room >= cache.buffer.shape[3]), None)
        if free is None:
            free = len(self._tracks)
            self._tracks.append(_Track(self.eager, cache.buffer))
        self._tracks[free].take(cache)
        return free


@final
@define(eq=False)
class _Track:
    """A buffer for one text, and what of a pass over it is data."""

    model: Llama
    buffer: Tensor
    _owner: Callable[[], KVCache | None] = field(default=lambda: None, init=False)
    _ids: Tensor = field(init=False)
    _start: Tensor = field(init=False)
    _parents: list[int] = field(factory=list, init=False)
    _depths: Tensor = field(init=False)
    _hidden: Tensor = field(init=False)
    _angles: tuple[Tensor, Tensor] = field(init=False)

    def __attrs_post_init__(self) -> None:
        with lasting(), torch.no_grad():
            self._ids = torch.zeros(max(PASSES), dtype=torch.long, device=self.buffer.device)
            self._depths = torch.zeros_like(self._ids)
            self._hidden = torch.zeros(max(PASSES), max(PASSES), dtype=torch.bool, device=self.buffer.device)
            self._start = torch.zeros((), dtype=torch.long, device=self.buffer.device)
        self._angles = self.model.angles.between(0, self.room)

    @property
    def room(self) -> int:
        """How many tokens the buffer takes."""
        return self.buffer.shape[3]

    @property
    def is_free(self) -> bool:
        """Whether no text needs the buffer: the one that was here is gone, or has moved on."""
        owner = self._owner()
        return owner is None or owner.buffer is not self.buffer

    def is_of(self, cache: KVCache) -> bool:
        """Whether this is where the cache is."""
        return self._owner() is cache and cache.buffer is self.buffer

    def take(self, cache: KVCache) -> None:
        """Move a text here."""
        if cache.buffer is not self.buffer:
            self.buffer[:, :, :, : cache.length] = cache.buffer[:, :, :, : cache.length]
        cache.buffer, self._owner = self.buffer, ref(cache)

    def set(self, ids: Tensor, start: int, parents: Sequence[int] | None) -> None:
        """Let the next pass read ids [k] after `start` tokens."""
        self._ids[: len(ids)] = ids
        self._start.fill_(start)
        self._arrange(range(-1, len(ids) - 1) if parents is None else parents)

    def rest(self, size: int) -> bool:
        """Let the next pass over `size` tokens write after the text that is here, if any; whether there is room."""
        owner = self._owner()
        start = 0 if owner is None or self.is_free else owner.length
        self._start.fill_(start)
        return start + size <= self.room

    def segment(self, size: int) -> Segment:
        """Its part of a pass over `size` tokens."""
        weights, device = self.model.weights, self.buffer.device
        positions = self._start + self._depths[:size]
        slots = self._start + torch.arange(size, device=device)
        seen = torch.arange(self.room, device=device).index_copy(0, slots, positions)
        beside = torch.zeros(size, self.room, dtype=torch.bool, device=device)
        beside.index_copy_(1, slots, self._hidden[:size, :size])
        cos, sin = self._angles
        rows = self.buffer.flatten(1, 2).transpose(1, 2).unbind()
        sights, multiple = {}, self.model.shapes.rows
        for window in weights.windows:
            sights[window] = Sight.of(self.buffer, hiding(positions, seen, window) | beside, weights, size, multiple)
        angles = cos[positions], sin[positions]
        return Segment(size, angles, lambda i, new: rows[i].index_copy_(0, slots, new), sights)

    def ids(self, size: int) -> Tensor:
        """The ids [size] of a pass."""
        return self._ids[:size]

    def _arrange(self, parents: Sequence[int]) -> None:
        """Take the shape of a tree, with the tokens that a pass is filled up with in a row after its last."""
        whole = [*parents, *range(len(parents) - 1, max(PASSES) - 1)]
        if whole != self._parents:
            self._parents = whole
            self._depths.copy_(torch.tensor(depths(whole), device="cpu"))
            self._hidden.copy_(torch.from_numpy(~lineage(whole)))


def _size(texts: Sequence[Text]) -> int | None:
    """The length of a captured pass over these texts; None where it would be too long."""
    lengths = [len(text.ids) for text in texts]
    if not lengths or 0 in lengths:
        return None
    return next((size for size in PASSES if size >= max(lengths) and size * len(lengths) <= MOST), None)


def _pass(weights: Weights, tracks: Sequence[_Track], size: int, features: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits [tracks · size, V] and features [tracks · size, F] of one pass over all of them."""
    ids = torch.cat([track.ids(size) for track in tracks])
    hidden, seen = read(weights, embedded(weights, ids), [track.segment(size) for track in tracks], features)
    return logits_of(weights, hidden), seen


_CAPTURING: Final = Lock()
"""One capture at a time in a process, as torch asks."""


@final
@define(eq=False)
class CudaGraphs:
    """Captures work as CUDA graphs, once it has run on a stream of its own, as torch asks.

    On the device of the model, whichever the thread's current one is: what is launched on another is not captured, and
    nothing says so. What the graphs need in between lies in one pool of memory, as they run one after the other and
    what comes out of one is copied before the next.

    Other threads may allocate and launch meanwhile. After a capture that fails the next one begins in another pool.
    """

    device: torch.device
    _place: tuple[torch.cuda._POOL_HANDLE, torch.cuda.Stream] | None = field(init=False, default=None)
    """A pool of memory is for captures on one stream, torch says."""

    def __call__(self, work: Work) -> Work:
        with _CAPTURING, torch.cuda.device(self.device):
            if self._place is None:
                stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # of torch
                self._place = torch.cuda.graph_pool_handle(), stream
            try:
                graph, output = _graph_of(work, *self._place)
            except BaseException:
                # A capture that could not end goes on taking what is allocated, where torch does not see to that.
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._place[0])
                self._place = None
                raise

        def repeat() -> tuple[Tensor, Tensor]:
            with torch.cuda.device(self.device):
                graph.replay()
            return output

        return repeat


def _graph_of(
    work: Work, pool: torch.cuda._POOL_HANDLE, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """The work as a graph, captured on the stream, and what comes out of it."""
    before = torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        work()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # In the "global" mode whatever another thread allocates meanwhile ends the capture.
    capturing = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    # torch leaves the stream of a capture the current one where the capture cannot begin or end.
    with torch.cuda.stream(before), _uncollected(), _own_workspaces(), capturing:
        output = work()
    return graph, output


@contextmanager
def _uncollected() -> Iterator[None]:
    """No cycles are collected in the block: another graph among them, freed here, would end the capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """In the block cuBLAS allocates its workspaces anew, so from the graph's pool, which lives as long as the graph.

    Those from before it anybody may free, torch.compile does, and the graph would go on writing there.
    Source: `clear_cublas_manager` of torch/_inductor/cudagraph_trees.py.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
