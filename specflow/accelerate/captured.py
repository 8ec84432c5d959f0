"""Short passes of a llama, captured once as graphs of kernels and repeated without Python between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from threading import Lock
from typing import Final, TypeAlias, final
from weakref import ref

import torch
from attrs import define, field
from torch import Tensor
from torch.nn import Embedding, Module
from typing_extensions import override

from specflow.accelerate.llama import Llama, Output, Segment, Sight, hiding, logits_of, read
from specflow.batch.texts import Text
from specflow.caches import KVCache
from specflow.trees import depths, lineage

Work: TypeAlias = Callable[[], Tensor]
"""Some work on tensors that stay where they are, and what comes out."""

Capture: TypeAlias = Callable[[Work], Work]
"""What captures the work and returns what repeats it: the same kernels, from and to the same memory.

It may do the work once or more, with the data that are there when it is asked."""

PASSES: Final = (1, 2, 4, 8, 16, 32)
"""The lengths of captured passes: a pass is filled up to the next of them, and longer ones are not captured."""


@final
class Captured(Module):
    """A llama whose passes over up to 32 tokens are captured, for a device that waits for Python between kernels.

    A captured pass repeats the same kernels over the same memory, so everything that changes is data: the ids, the
    position and the shape of a tree are tensors (a text is a tree without branches), and each query sees the whole
    buffer through a mask. What a pass computes for the tokens it is filled up with lies after the text and is
    forgotten, as after a rollback. A graph belongs to the buffer it was captured over; when a text is given up, the
    next one that fits takes over its buffer, and the graphs. Threads take turns, as a graph's memory is there once.

    Source: CUDA graphs as torch offers them. Not yet measured on a device: the tests run it on a CPU, over a tape that
    repeats recorded operations in place as a graph does.
    """

    def __init__(self, eager: Llama, capture: Capture) -> None:
        super().__init__()
        self.config = eager.config
        self.eager = eager
        self._capture = capture
        self._tracks: list[_Track] = []
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
    ) -> Output:
        """As `Llama`; in a short pass over a cache the logits are computed for all tokens. Of several texts no pass is
        captured."""
        k = 0 if input_ids is None else input_ids.shape[-1]
        size = next((size for size in PASSES if size >= k), None)
        if texts or input_ids is None or cache is None or size is None or len(input_ids) != 1 or k == 0:
            output: Output = self.eager(input_ids, cache, use_cache, logits_to_keep, parents, texts)
            return output
        with torch.no_grad(), self._turn:
            logits = self._track(cache, cache.length + size).run(input_ids[0], cache.length, size, parents)
        cache.length += k
        return Output(logits[None, -logits_to_keep:], cache if use_cache else None)

    def new_cache(self) -> KVCache:
        """As `Llama`."""
        return self.eager.new_cache()

    def __deepcopy__(self, memo: dict[int, object]) -> Captured:
        return Captured(deepcopy(self.eager, memo), self._capture)  # graphs cannot be copied: captured anew

    def _track(self, cache: KVCache, length: int) -> _Track:
        """The track of this cache, which then has room for `length` tokens: its own, a free one, or a new one."""
        cache.reserve(length)
        own = next((track for track in self._tracks if track.is_of(cache)), None)
        if own is not None:
            return own
        free = next((track for track in self._tracks if track.is_free and track.room >= cache.buffer.shape[3]), None)
        if free is None:
            free = _Track(self.eager, self._capture, cache.buffer)
            self._tracks.append(free)
        free.take(cache)
        return free


@final
@define(eq=False)
class _Track:
    """A buffer for one text, and the passes that were captured over it."""

    model: Llama
    capture: Capture
    buffer: Tensor
    _owner: Callable[[], KVCache | None] = field(default=lambda: None, init=False)
    _ids: Tensor = field(init=False)
    _start: Tensor = field(init=False)
    _parents: list[int] = field(factory=list, init=False)
    _depths: Tensor = field(init=False)
    _hidden: Tensor = field(init=False)
    _angles: tuple[Tensor, Tensor] = field(init=False)
    _passes: dict[int, Work] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
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

    def run(self, ids: Tensor, start: int, size: int, parents: Sequence[int] | None) -> Tensor:
        """Logits [k, V] of ids [k] after `start` tokens, in a captured pass over `size` tokens."""
        self._ids[: len(ids)] = ids
        self._start.fill_(start)
        self._arrange(range(-1, len(ids) - 1) if parents is None else parents)
        if size not in self._passes:
            self._passes[size] = self.capture(lambda: self._pass(size))
        return self._passes[size]()[: len(ids)].clone()

    def _arrange(self, parents: Sequence[int]) -> None:
        """Take the shape of a tree, with the tokens that a pass is filled up with in a row after its last."""
        whole = [*parents, *range(len(parents) - 1, max(PASSES) - 1)]
        if whole != self._parents:
            self._parents = whole
            self._depths.copy_(torch.tensor(depths(whole)))
            self._hidden.copy_(torch.from_numpy(~lineage(whole)))

    def _pass(self, size: int) -> Tensor:
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
        segment = Segment(size, angles, lambda i, new: rows[i].index_copy_(0, slots, new), sights)
        return logits_of(weights, read(weights, self._ids[:size], [segment]))


def cuda_graph(work: Work) -> Work:
    """Capture work as a CUDA graph, once it has run on a stream of its own, as torch asks."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # of torch
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()

    def repeat() -> Tensor:
        graph.replay()
        return output

    return repeat
