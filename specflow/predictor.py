"""A model as a pure function of tokens. Its KV cache is a memo: it saves work and never changes a result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import inf
from typing import Final, Protocol, TypeAlias, final

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig

from specflow.caching import LossyCache, Past, capacity, is_empty, is_plain, offloads
from specflow.errors import DecodeError
from specflow.feeding import AFRESH, ANY_PIECES, Feeding, Reader
from specflow.finite import arrived, finite, is_near, on_arrival
from specflow.kv_cache import KVCache
from specflow.prefix import begins, common_prefix, parting
from specflow.state import Node, Predictor, Tokens
from specflow.trees import path_along, path_by_path

Choose: TypeAlias = Callable[[Tensor, int], Tensor]
"""(logits [V], position) → the id [] of the token that shall stand there, on the device of the logits."""

REREAD: Final = 32
"""How many tokens may be read again with the next draft before they get a pass of their own."""


@final
@frozen
class Limits:
    """What a model can take: its vocabulary, and the most tokens it can read. None where the model does not tell."""

    vocab_size: int | None = None
    context: int | None = None


class Prunable(Protocol):
    """A provider that remembers what it read and can be told which text is still wanted."""

    def prune(self, tokens: Tokens, /) -> None:
        """Forget what is not a prefix of `tokens`. It never changes what the provider answers later."""
        ...


class ReadsAhead(Protocol):
    """A model that goes on by itself for a while, where it is, before anybody on the host looks at what it chose."""

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        ...

    def read_ahead(self, tokens: Tokens, most: int, choose: Choose, /) -> Tokens:
        """Up to `most` tokens that follow, each chosen from the logits behind those before it."""
        ...


def limits_of(model: Module) -> Limits:
    """The limits in a transformers config; a module without a config has none that we know of.

    >>> limits_of(torch.nn.Linear(2, 2))
    Limits(vocab_size=None, context=None)
    """
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config
    vocab_size = getattr(text, "vocab_size", None)
    context = getattr(text, "max_position_embeddings", None)
    return Limits(
        vocab_size if isinstance(vocab_size, int) and vocab_size > 0 else None,
        context if isinstance(context, int) and context > 0 else None,
    )


@final
@define(eq=False)
class CachedPredictor:
    """A model with a memo: it feeds the model only what its cache does not cover.

    `predict(tokens, last)` gives logits [last, V], on the model's device, of what follows each of the last `last`
    prefixes of `tokens`. The cache is kept from call to call; what differs from `tokens` is dropped, the rest is fed.
    Law: a memo never changes a result (exactly in exact arithmetic, within rounding in floats). A pass that fails or is
    interrupted leaves an empty memo, never a wrong one. The model, its config and its mode stay as they were.

    Where a cache cannot be cropped, it goes back to a mark, and what has been accepted since then is read again
    together with the next draft. How the model can be fed is found out at the first reading and kept as `feeding`; a
    model that can only be read from the beginning is read so each time.

    `make_cache` makes the cache to start from; by default the model makes its own. `DecodeError` where a text outgrows
    a cache of fixed size, where such a cache changes the logits and is no `LossyCache`, where it offloads from
    anything but CUDA, where the model gives no logits, or logits that are not finite, naming the position. On a device
    nothing is copied to look for those: they are noticed where a token that was chosen from them arrives
    (`specflow.finite`).
    """

    model: Module
    make_cache: Callable[[], object] | None = None
    _reader: Reader = field(init=False, repr=False)
    _make: Callable[[], object | None] = field(init=False, repr=False)
    feeding: Feeding | None = field(init=False, default=None)
    _tokens: list[int] = field(init=False, factory=list, repr=False)
    _tree: tuple[Node, ...] = field(init=False, default=(), repr=False)
    _past: Past | None = field(init=False, default=None, repr=False)
    _vocab_size: int | None = field(init=False, default=None, repr=False)
    _takes_trees: bool | None = field(init=False, default=None, repr=False)
    _goes_back: bool = field(init=False, default=False, repr=False)
    _is_far: bool = field(init=False, default=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._reader = Reader.of(self.model)
        self._make = self.make_cache or _none
        if self._reader.cache_name is None:
            self.feeding = AFRESH
            if self.make_cache is not None:
                name, remedy = type(self.model).__name__, "leave make_cache out"
                raise DecodeError("make_cache", "the model takes no cache", name, remedy)

    @property
    def limits(self) -> Limits:
        """What a text over this memo can take: the model's own limits, and the room in a cache of fixed size."""
        model = limits_of(self.model)
        sizes = [model.context, capacity(self._new_cache() if self._past is None else self._past.cache)]
        return Limits(model.vocab_size, min((size for size in sizes if size is not None), default=None))

    def __call__(self, tokens: Tokens, last: int, /) -> Tensor:
        """Logits [last, V] behind each of the last `last` prefixes of `tokens`."""
        rows = [self._predict(text, wanted) for text, wanted in self._reader.readings(tokens, last)]
        return _checked(rows[0] if len(rows) == 1 else torch.cat(rows), len(tokens))

    def read_ahead(self, tokens: Tokens, most: int, choose: Choose, /) -> Tokens:
        """`most` ≥ 1 tokens that follow, each chosen from the logits behind those before it, and copied all at once.

        Fewer where a cache of fixed size, or a "longrope" edge, does not let as many be read; and one where the model
        cannot be fed one token at a time over its cache. `DecodeError` as in a call.
        """
        row = self._predict(tokens, 1)[0]
        rows, ids = [row], [choose(row, len(tokens))]
        past, known = self._past, self._tokens
        self._past, self._tokens = None, []
        if past is not None and self.feeding is not None and self.feeding.least == 1:
            room, edge = capacity(past.cache), self._reader.edge
            ends = [end for end in (room, edge) if end is not None and end >= len(tokens)]
            for length in range(len(tokens) + 1, min([len(tokens) + most - 1, *ends]) + 1):
                if past.needs_marks and not past.is_marked:
                    past.mark()
                logits, cache = self._reader.read(ids[-1].reshape(1, 1), past.cache, past.length, 1)
                past.extend(cache, length)
                rows.append(logits[0, 0])
                ids.append(choose(rows[-1], length))
        sent: list[int] = on_arrival(torch.stack(ids), torch.stack(rows)).tolist()
        chosen = tuple(arrived(sent, len(tokens) - 1))
        if past is not None:
            self._past, self._tokens = past, known + list(chosen[:-1])
        return chosen

    def read_tree(self, tokens: Tokens, nodes: Sequence[Node], /) -> Tensor:
        """Logits [n + 1, V] behind `tokens`, and behind them and the path down to each of the n nodes.

        In one pass where the model can be told what each token sees, which is tried at the first reading; else, and
        over caches that are more than rows of keys and values, path by path. Its rows are those of a call.
        """
        if nodes and self.feeding is None and len(tokens) > 1:
            self._predict(tokens[:-1], 1)
        if not nodes or not self._reads_trees():
            rows = path_by_path(self)(tokens, nodes)
            self._reads_trees()  # tried now, with the prompt, and not in a pass that somebody times
            return rows
        self._settle(tokens)
        self._go_back(min(self._covers(tokens), len(tokens) - 1))
        if len(tokens) - len(self._tokens) > 1 + REREAD:
            self._read(tokens[:-1], 1)
        known, past = self._tokens, self._past
        assert past is not None
        self._past, self._tokens = None, []
        piece = tokens[past.length :]
        ids = self._reader.ids([piece + tuple([node.token for node in nodes])])
        parents = [*range(-1, len(piece) - 1), *[len(piece) + node.parent for node in nodes]]
        logits, cache = self._reader.read(ids, past.cache, past.length, len(nodes) + 1, parents)
        past.extend(cache, len(tokens) + len(nodes))
        self._past, self._tokens, self._tree = past, known + list(piece), tuple(nodes)
        return _checked(logits[0], len(tokens))

    def prune(self, tokens: Tokens, /) -> None:
        """Forget what is seen not to be a prefix of `tokens`, if that costs nothing.

        Only the end is looked at, where drafts were refused: the next reading compares the whole text.
        """
        self._settle(tokens)
        if self._past is None:
            return
        keep = parting(self._tokens, tokens)
        if self._past.needs_marks:
            self._past.thin(keep)
        else:
            self._go_back(keep)

    def _predict(self, tokens: Tokens, last: int) -> Tensor:
        if self.feeding == AFRESH:
            return self._read_afresh(tokens, last)
        self._settle(tokens)
        new = max(last, 1 if self.feeding is None else self.feeding.least)
        self._go_back(min(self._covers(tokens), len(tokens) - new))
        if self._goes_back and len(tokens) - len(self._tokens) > new + REREAD:
            self._read(tokens[:-new], 1)
        return self._read(tokens, last)

    def _reads_trees(self) -> bool:
        """Whether the cache, as it is now, can take a tree, and the model read it."""
        if self.feeding != ANY_PIECES or self._past is None or not self._past.holds_rows or self._vocab_size is None:
            return False
        if self._takes_trees is None:
            self._takes_trees = self._reader.reads_trees(self._vocab_size)
        return self._takes_trees

    def _settle(self, tokens: Tokens) -> None:
        """Of the tree that was read last, keep the path that `tokens` took. Whether they begin alike is seen later."""
        nodes, self._tree = self._tree, ()
        if not nodes or self._past is None:
            return
        past, known = self._past, self._tokens
        self._past, self._tokens = None, []
        path = path_along(nodes, tokens[len(known) :])
        past.keep(len(known), path)
        self._past, self._tokens = past, known + [nodes[i].token for i in path]

    def _covers(self, tokens: Tokens) -> int:
        """How many of the first of `tokens` the memo covers."""
        if self._reader.is_far(tokens) != self._is_far:
            return 0
        return len(self._tokens) if begins(self._tokens, tokens) else common_prefix(self._tokens, tokens)

    def _go_back(self, keep: int) -> None:
        """Take the memo back to at most `keep` tokens."""
        if self._past is None or keep == len(self._tokens):
            return
        past, known = self._past, self._tokens
        self._past, self._tokens, self._goes_back = None, [], past.needs_marks
        if past.go_back(keep):
            del known[past.length :]
            self._past, self._tokens = past, known

    def _read(self, tokens: Tokens, last: int) -> Tensor:
        """Read `tokens`, whose beginning the memo covers, in the pieces that the model can be fed."""
        feeding = ANY_PIECES if self.feeding is None else self.feeding
        ends = feeding.ends(len(self._tokens), len(tokens), last)
        rows = [self._read_on(tokens[:end], min(last, end - len(self._tokens))) for end in ends]
        return torch.cat(rows)[-last:] if len(rows) > 1 else rows[0]

    def _read_on(self, tokens: Tokens, last: int) -> Tensor:
        past = Past(self._new_cache(), 0) if self._past is None else self._past
        room = capacity(past.cache)
        if room is not None and len(tokens) > room:
            remedy = "make a larger cache, or start from `limits`"
            raise DecodeError("make_cache", f"the text outgrows a cache of {room} tokens", len(tokens), remedy)
        # Emptied first: an exception or Ctrl-C inside the model must not leave a cache that covers who knows what.
        known, self._past, self._tokens = self._tokens, None, []
        if past.length and past.needs_marks and (last > 1 or self._goes_back or not past.is_marked):
            past.mark()
        logits, cache = self._reader.read(self._reader.ids([tokens[past.length :]]), past.cache, past.length, last)
        if self.feeding is None:
            self._vocab_size = logits.shape[-1]
            self.feeding = self._found_out(cache, logits.shape[-1])
            if self.feeding == AFRESH:
                return self._read_afresh(tokens, last)
        if cache is not None:
            known += tokens[past.length :]
            past.extend(cache, len(tokens))
            self._past, self._tokens, self._is_far = past, known, self._reader.is_far(tokens)
        return logits[0]

    def _read_afresh(self, tokens: Tokens, last: int) -> Tensor:
        return self._reader.read_afresh(self._reader.ids([tokens]), last)[0]

    def _found_out(self, cache: object | None, vocab_size: int) -> Feeding:
        """How the model can be fed, now that it has read its first tokens into `cache`."""
        attends = isinstance(cache, KVCache) or (self._reader.is_of_transformers and is_plain(cache))
        if attends or isinstance(self.make_cache, LossyCache):
            return ANY_PIECES
        if self.make_cache is None:
            if cache is None:
                self._make = self._reader.default_cache  # a few models keep the cache that they make to themselves
            return self._reader.own_feeding(self._new_cache, vocab_size, self.limits.context or sys.maxsize)
        feeding = self._reader.feeding(self._new_cache, vocab_size, self.limits.context or sys.maxsize)
        if feeding == AFRESH:
            raise DecodeError(
                "make_cache",
                "the model's logits over this cache are not those of a fresh pass",
                type(cache).__name__,
                "let the model make its own cache, or name this one a LossyCache",
            )
        return feeding

    def _new_cache(self) -> object | None:
        cache = self._make()
        if not is_empty(cache):
            raise DecodeError(
                "make_cache", "a new cache is not empty", type(cache).__name__, "make another cache at each call"
            )
        if offloads(cache) and self._reader.device.type != "cuda":
            happened, remedy = "transformers offloads a cache only from CUDA", "make it without offloading"
            raise DecodeError("make_cache", happened, f"a model on {self._reader.device.type}", remedy)
        return cache


@final
@frozen(eq=False)
class UncachedPredictor:
    """A model without a memo: it reads the whole text each time. The same function as `CachedPredictor`, slower."""

    model: Module
    _reader: Reader = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_reader", Reader.of(self.model))

    def __call__(self, tokens: Tokens, last: int, /) -> Tensor:
        """Logits [last, V] behind each of the last `last` prefixes of `tokens`."""
        readings = self._reader.readings(tokens, last)
        rows = [self._reader.read_afresh(self._reader.ids([text]), wanted)[0] for text, wanted in readings]
        return _checked(rows[0] if len(rows) == 1 else torch.cat(rows), len(tokens))

    def read_tree(self, tokens: Tokens, nodes: Sequence[Node], /) -> Tensor:
        """Logits [n + 1, V] behind `tokens` and behind each node, path by path."""
        return path_by_path(self)(tokens, nodes)

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing is remembered, so there is nothing to forget."""


def fitted(predictor: Predictor, vocab_size: int) -> Predictor:
    """The predictor over a vocabulary of `vocab_size`: padding is cut off, and what is missing gets the logit -∞.

    Models of one tokenizer pad their vocabularies differently. Both laws stay laws over the target's vocabulary, so
    verification stays exact.

    >>> fitted(lambda tokens, last: torch.zeros(last, 3), 4)((1, 2), 1)
    tensor([[0., 0., 0., -inf]])
    """

    return lambda tokens, last: fit(predictor(tokens, last), vocab_size)


def fit(logits: Tensor, vocab_size: int) -> Tensor:
    """`logits` [..., V] over a vocabulary of `vocab_size`."""
    return F.pad(logits[..., :vocab_size], (0, max(0, vocab_size - logits.shape[-1])), value=-inf)


def _checked(logits: Tensor, end: int) -> Tensor:
    return finite(logits, end) if is_near(logits) else logits


def _none() -> None:
    """No cache: the model makes its own."""
