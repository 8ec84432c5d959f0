"""How one model is called, and in what pieces it reads a text rightly: found out by trying, never by its name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from math import inf
from random import Random
from typing import Final, Protocol, final
from weakref import WeakKeyDictionary

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from specflow.caching import Past
from specflow.errors import DecodeError
from specflow.state import TEXT, Node, Tokens
from specflow.trees import depths, lineage, path_to
from specflow.untracked import Untracked, untracked

CACHE_NAMES: Final = ("cache", "past_key_values", "cache_params", "state")
"""What models call their cache, as argument and as output: transformers' name, its older ones, and RWKV's."""


@final
@frozen
class Feeding:
    """What a model reads rightly over a cache: pieces of `least` to `most` tokens; with `most` = 0, nothing.

    `trial` is how a text is cut to try it; a shorter text is cut like the end of a longer one.

    >>> list(ONE_BY_ONE.ends(covered=4, total=7, last=2)), list(ANY_PIECES.ends(covered=4, total=7, last=2))
    ([5, 6, 7], [7])
    """

    name: str
    least: int = field(default=1, repr=False)
    most: int = field(default=sys.maxsize, repr=False)
    trial: tuple[int, ...] = field(default=(), repr=False)

    def ends(self, covered: int, total: int, last: int) -> Iterator[int]:
        """Where the pieces end in which a text of `total` tokens is read over a cache that covers some of it.

        An empty cache takes all but the last rows in one piece, whatever the model.
        """
        if covered == 0 and self.most < total:
            covered = total - last + 1
            yield covered
        while covered < total:
            covered = min(covered + self.most, total)
            yield covered

    def pieces(self, total: int) -> list[int]:
        """The trial for a text of `total` tokens.

        >>> TWO_OR_MORE.pieces(14)
        [2, 2, 5, 5]
        """
        before = accumulate((*self.trial[::-1], total), initial=0)
        sizes = [min(size, total - end) for size, end in zip(self.trial[::-1], before, strict=False)]
        return [size for size in sizes[::-1] if size > 0]


ANY_PIECES: Final = Feeding("any pieces", trial=(7, *[1] * 10, 4, *[1] * 10, 5))
"""What every model should be able to read, and attention models do."""

ONE_BY_ONE: Final = Feeding("one token at a time", most=1, trial=(20, *[1] * 16))
"""Longer pieces ignore the state that they start from (transformers' Mamba, Jamba, Zamba)."""

TWO_OR_MORE: Final = Feeding("two tokens or more", least=2, trial=(7, 2, 4, 8, 3, 2, 5, 5))
"""For one token alone the model computes something else (transformers' Zamba 2 and Nemotron-H)."""

AFRESH: Final = Feeding("the whole text afresh", most=0)
"""No pieces: a model without a cache, or one that goes wrong over it."""


SHORTEST: Final = 8
"""How many tokens a text has at least on which faults can be told."""

_FOUND: Final[WeakKeyDictionary[Module, dict[tuple[torch.dtype, str], Feeding]]] = WeakKeyDictionary()

_TREES: Final[WeakKeyDictionary[Module, dict[tuple[torch.dtype, str], bool]]] = WeakKeyDictionary()


class Call(Protocol):
    """What a model is to us: something that is called with ids [1, k]."""

    def __call__(self, input_ids: Tensor, /, **kwargs: object) -> object: ...


@final
@frozen(eq=False)
class Reader:
    """How one model is called: the name of its cache argument, and what else it can be told."""

    model: Module = field(repr=False)
    _call: Call = field(repr=False)
    cache_name: str | None
    takes_positions: bool
    takes_masks: bool
    """Whether it is one of transformers' models that are told so what each token sees, and where it stands."""
    takes_parents: bool
    keeps_logits: bool
    is_of_transformers: bool
    edge: int | None
    """The longest text that is read with the short frequencies of a "longrope"; longer ones are read otherwise."""
    _first: Parameter | None = field(repr=False)
    _untracked: Untracked = field(repr=False)

    @classmethod
    def of(cls, model: Module) -> Reader:
        """Reads the signature of the model's forward, or of the model that torch.compile or an adapter (PEFT) wraps."""
        whole = getattr(model, "_orig_mod", model)
        inner = getattr(whole, "get_base_model", lambda: whole)()
        names = inspect.signature(inner.forward).parameters
        return cls(
            model,
            model,
            next((name for name in CACHE_NAMES if name in names), None),
            "position_ids" in names,
            isinstance(whole, PreTrainedModel) and {"position_ids", "attention_mask"} <= set(names),
            "parents" in names,
            "logits_to_keep" in names,
            isinstance(whole, PreTrainedModel),
            _edge(model),
            next(model.parameters(), None),
            untracked(model),
        )

    def is_far(self, tokens: Tokens) -> bool:
        """Whether a text is beyond the edge. What was read on one side is of no use on the other."""
        return self.edge is not None and len(tokens) > self.edge

    def readings(self, tokens: Tokens, last: int) -> list[tuple[Tokens, int]]:
        """The texts and rows to read for the last `last` rows of `tokens`: two where the rows lie across the edge."""
        before = 0 if self.edge is None else self.edge - (len(tokens) - last)
        return [(tokens[: self.edge], before), (tokens, last - before)] if 0 < before < last else [(tokens, last)]

    def ids(self, tokens: Sequence[Tokens]) -> Tensor:
        """The texts as ids [B, k], where the model wants them."""
        return torch.tensor(tokens, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the model wants its ids: where its first parameter is, for a dispatched model its embedding."""
        return torch.device("cpu") if self._first is None else self._first.device

    def read(
        self, ids: Tensor, cache: object | None, covered: int, last: int, parents: Sequence[int] | None = None
    ) -> tuple[Tensor, object | None]:
        """Logits [B, last, V] of texts whose first `covered` tokens `cache` covers and which `ids` [B, k] end.

        And the cache that covers all of them; None from a model that keeps it to itself. With `parents` the ids are a
        tree behind what is covered, and so is what the cache then covers.
        """
        assert self.cache_name is not None
        arguments: dict[str, object] = {self.cache_name: cache, "use_cache": True}
        if parents is not None and self.takes_parents:
            arguments["parents"] = parents
        elif parents is not None:
            arguments["position_ids"] = covered + torch.tensor([depths(parents)], device=ids.device)
            arguments["attention_mask"] = self._mask(covered, parents)
        elif self.takes_positions and covered:
            # As `generate` does. Most models count from what their cache covers, a few (Bamba) from 0.
            arguments["position_ids"] = torch.arange(covered, covered + ids.shape[1], device=ids.device)[None]
        output = self._run(ids, last, arguments)
        return self._logits(output, last), getattr(output, self.cache_name, cache)

    def read_afresh(self, ids: Tensor, last: int) -> Tensor:
        """Logits [B, last, V] of whole texts."""
        return self._logits(self._run(ids, last, {} if self.cache_name is None else {"use_cache": False}), last)

    def default_cache(self) -> object | None:
        """transformers' own cache for this model; None where there is no config to make it from."""
        config = getattr(self.model, "config", None)
        return DynamicCache(config=config) if isinstance(config, PreTrainedConfig) else None

    def own_feeding(self, make_cache: Callable[[], object | None], vocab_size: int, room: int) -> Feeding:
        """`feeding` over the model's own caches. A model is tried once for each dtype and kind of device."""
        found, place = _FOUND.setdefault(self.model, {}), (_dtype(self.model), self.device.type)
        if place not in found:
            found[place] = self.feeding(make_cache, vocab_size, room)
        return found[place]

    def feeding(self, make_cache: Callable[[], object | None], vocab_size: int, room: int = sys.maxsize) -> Feeding:
        """How the model can be fed over the caches that `make_cache` makes, which take texts of up to `room` tokens.

        A random text is read afresh, and again in the pieces of each feeding's trial, with a wrong turn and a way back
        among them. Errors are differences of logits, relative to the largest logit. A feeding is right whose error is
        of the order of rounding (8 ε of the dtype, or of fp32), or at most ten times that of the best of them; the
        first such is taken. None is right where all errors are above 1e-4, or in fp16 and bf16 above 3 % and 10 %.
        A fault that these 36 tokens do not bring out is not found. Where there is room for fewer than 8, none is right.
        """
        if room < SHORTEST:
            return AFRESH
        ids = self.ids([tuple(Random(0).choices(range(vocab_size), k=min(room, sum(ANY_PIECES.trial))))])
        truth = self.read_afresh(ids, ids.shape[1])
        dtype = _dtype(self.model)
        rounding = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        errors: dict[Feeding, float] = {}
        for feeding in (ANY_PIECES, ONE_BY_ONE, TWO_OR_MORE):
            try:
                logits = self._read_in_pieces(ids, feeding.pieces(ids.shape[1]), Past(make_cache(), 0))
            except Exception:  # whatever a model raises here says that it cannot be fed so
                continue
            errors[feeding] = _error(logits, truth)
            if errors.get(ANY_PIECES, inf) <= rounding:
                break
        best = min(errors.values(), default=inf)
        if best > _bound(dtype):
            return AFRESH
        return next(feeding for feeding, error in errors.items() if error <= max(rounding, 10 * best))

    def _read_in_pieces(self, ids: Tensor, pieces: list[int], past: Past) -> Tensor:
        """Logits [B, k, V] of `ids` [B, k], with a wrong piece read and taken back before the last one."""

        def extend(piece: Tensor) -> Tensor:
            logits, cache = self.read(piece, past.cache, past.length, piece.shape[1])
            past.extend(cache, past.length + piece.shape[1])
            return logits

        *before, last = torch.split(ids, pieces, dim=1)
        rows = [extend(piece) for piece in before]
        past.mark()
        covered = past.length
        extend(last.flip(1))
        assert past.go_back(covered)
        return torch.cat([*rows, extend(last)], dim=1)

    def reads_trees(self, vocab_size: int) -> bool:
        """Whether the model reads a tree in one pass as it reads the paths of it: tried once for each dtype and device.

        A text of 7 tokens and a tree of 9 behind it, then a token behind one of its paths, which the cache keeps. The
        logits are compared with those of fresh passes, within the bounds of `feeding`.
        """
        if self.edge is not None or not (self.takes_parents or self.takes_masks):
            return False
        found, place = _TREES.setdefault(self.model, {}), (_dtype(self.model), self.device.type)
        if place not in found:
            found[place] = self._try_trees(vocab_size)
        return found[place]

    def _try_trees(self, vocab_size: int) -> bool:
        parents, kept = (TEXT, TEXT, 0, 1, 1, 3, 2, 5, TEXT), (1, 3, 5)
        tokens = Random(1).choices(range(vocab_size), k=17)
        text, drafted, behind = tuple(tokens[:7]), tokens[7:16], tokens[16]
        nodes = [Node(token, parent) for token, parent in zip(drafted, parents, strict=True)]
        try:
            _, cache = self.read(self.ids([text]), None, 0, 1)
            past = Past(None, 0)
            past.extend(cache, len(text))
            logits, cache = self.read(self.ids([tuple(drafted)]), past.cache, len(text), len(nodes), parents)
            past.extend(cache, len(text) + len(nodes))
            past.keep(len(text), kept)
            row, _ = self.read(self.ids([(behind,)]), past.cache, past.length, 1)
        except Exception:  # whatever a model raises here says that it cannot read trees
            return False
        paths = [*[path_to(nodes, i) for i in range(len(nodes))], [*kept, 9]]
        texts = [text + tuple([tokens[7 + i] for i in path]) for path in paths]
        truth = torch.cat([self.read_afresh(self.ids([path]), 1)[0] for path in texts])
        return _error(torch.cat([logits[0], row[0]]), truth) <= _bound(_dtype(self.model))

    def _mask(self, covered: int, parents: Sequence[int]) -> Tensor:
        """What each token of a tree must not see, as the smallest number [1, 1, k, covered + k], 0 elsewhere."""
        dtype, k = _dtype(self.model), len(parents)
        mask = torch.zeros(1, 1, k, covered + k, dtype=dtype, device=self.device)
        hidden = torch.from_numpy(~lineage(parents)).to(self.device)
        mask[..., covered:].masked_fill_(hidden, torch.finfo(dtype).min)
        return mask

    def _run(self, ids: Tensor, last: int, arguments: dict[str, object]) -> object:
        if self.keeps_logits:
            arguments["logits_to_keep"] = last
        with torch.no_grad(), self._untracked(ids.shape[-1]), _evaluating(self.model):
            return self._call(ids, **arguments)

    def _logits(self, output: object, last: int) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise DecodeError(
                "model",
                "the model's call returned no logits",
                type(output).__name__,
                "give a model with a language-model head, such as AutoModelForCausalLM loads",
            )
        return logits if logits.shape[1] == last else logits[:, -last:]


def _error(logits: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest logit. Equal infinities differ by nothing, NaN by ∞."""
    apart = torch.where(logits == truth, 0.0, (logits - truth).abs()).nan_to_num(nan=inf, posinf=inf)
    return float(apart.max() / truth[truth.isfinite()].abs().max())


def _bound(dtype: torch.dtype) -> float:
    """The largest error of a model that reads rightly."""
    return {torch.float16: 0.03, torch.bfloat16: 0.1}.get(dtype, 1e-4)


def _edge(model: Module) -> int | None:
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [rope, *[part for part in rope.values() if isinstance(part, dict)]]
    edges = [part["original_max_position_embeddings"] for part in parts if part.get("rope_type") == "longrope"]
    return min(edges, default=None)


def _dtype(model: Module) -> torch.dtype:
    """What the model computes in; its logits may come in a finer dtype."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


def _evaluating(model: Module) -> AbstractContextManager[None]:
    """The model in evaluation mode, as dropout would make it a random function; its modes are put back afterwards."""
    return _not_training([module for module in model.modules() if module.training]) if model.training else nullcontext()


@contextmanager
def _not_training(training: Sequence[Module]) -> Iterator[None]:
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
