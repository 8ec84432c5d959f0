"""A model as a pure function of tokens. Its KV cache is a memo: it saves work and never changes a result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Final, Protocol, final

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig

from specflow.caching import Checkpoint, checkpoint, common_prefix, cropped, is_append_only, restored
from specflow.errors import DecodeError
from specflow.state import Predictor, Tokens

CHECKPOINTS: Final = 16
"""How many checkpoints a memo keeps of a cache that cannot be cropped: enough for the drafts of one step."""

REREAD: Final = 32
"""How many tokens may be read again with the next draft before a checkpoint is moved up in a pass of its own."""


CACHE_NAMES: Final = ("cache", "past_key_values", "cache_params", "state")
"""What models call their cache, as argument and as output: transformers' name, its older ones, and RWKV's."""


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

    `make_cache` builds the cache to start from, for a static or quantized one; by default the model makes its own.
    A model that takes no cache is read from the beginning each time.

    `DecodeError` where the model gives no logits, or logits that are not finite, naming the position.
    """

    model: Module
    make_cache: Callable[[], object] | None = None
    _reader: _Reader = field(init=False)
    _tokens: Tokens = field(init=False, default=(), repr=False)
    _cache: object | None = field(init=False, default=None, repr=False)
    _checkpoints: list[Checkpoint] = field(init=False, factory=list, repr=False)
    _goes_back: bool = field(init=False, default=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._reader = _Reader.of(self.model)

    def __call__(self, tokens: Tokens, last: int, /) -> Tensor:
        """Logits [last, V] behind each of the last `last` prefixes of `tokens`."""
        self._keep(tokens, len(tokens) - last)
        if last > 1 and len(tokens) - len(self._tokens) > last + REREAD and self._checkpoints:
            self._read(tokens[: len(tokens) - last], 1)
        return finite(self._read(tokens, last), len(tokens))

    def prune(self, tokens: Tokens, /) -> None:
        """Forget what is not a prefix of `tokens`, if that costs nothing."""
        if self._cache is not None and is_append_only(self._cache):
            self._keep(tokens, len(tokens))

    def _keep(self, tokens: Tokens, most: int) -> None:
        """Roll the memo back to a prefix of `tokens` that is no longer than `most`."""
        covered = len(self._tokens)
        keep = min(common_prefix(self._tokens, tokens), most)
        if self._cache is None or keep == covered:
            return
        if is_append_only(self._cache):
            self._cache, self._tokens = cropped(self._cache, covered - keep), self._tokens[:keep]
            return
        self._goes_back = True
        while self._checkpoints and self._checkpoints[-1].length > keep:
            self._checkpoints.pop()
        if self._checkpoints:
            back = self._checkpoints.pop()
            self._cache, self._tokens = restored(self._cache, covered, back), self._tokens[: back.length]
        else:
            self._cache, self._tokens = None, ()

    def _read(self, tokens: Tokens, last: int) -> Tensor:
        cache, covered, checkpoints = self._cache, len(self._tokens), self._checkpoints
        # Emptied first: an exception or Ctrl-C inside the model must not leave a cache that covers who knows what.
        self._cache, self._tokens, self._checkpoints = None, (), []
        if cache is None and self.make_cache is not None:
            cache = self.make_cache()
        if covered and (last > 1 or self._goes_back) and not is_append_only(cache):
            checkpoints = [*checkpoints, checkpoint(cache, covered)][-CHECKPOINTS:]
        logits, cache = self._reader.read(tokens[covered:], cache, last)
        if cache is not None:
            self._cache, self._tokens, self._checkpoints = cache, tokens, checkpoints
        return logits


@final
@frozen(eq=False)
class UncachedPredictor:
    """A model without a memo: it reads the whole text each time. The same function as `CachedPredictor`, slower."""

    model: Module
    _reader: _Reader = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_reader", _Reader.of(self.model))

    def __call__(self, tokens: Tokens, last: int, /) -> Tensor:
        """Logits [last, V] behind each of the last `last` prefixes of `tokens`."""
        return finite(self._reader.read_afresh(tokens, last), len(tokens))

    def prune(self, tokens: Tokens, /) -> None:
        """Nothing is remembered, so there is nothing to forget."""


def fitted(predictor: Predictor, vocab_size: int) -> Predictor:
    """The predictor over a vocabulary of `vocab_size`: padding is cut off, and what is missing gets the logit -∞.

    Models of one tokenizer pad their vocabularies differently. Both laws stay laws over the target's vocabulary, so
    verification stays exact.

    >>> fitted(lambda tokens, last: torch.zeros(last, 3), 4)((1, 2), 1)
    tensor([[0., 0., 0., -inf]])
    """

    def fit(tokens: Tokens, last: int) -> Tensor:
        logits = predictor(tokens, last)
        return F.pad(logits[:, :vocab_size], (0, max(0, vocab_size - logits.shape[-1])), value=-inf)

    return fit


def finite(logits: Tensor, end: int) -> Tensor:
    """`logits` [k, V] themselves; `DecodeError` where a row holds a NaN or +∞ or nothing but -∞.

    `end` is the length of the text that the last row follows.
    """
    good = logits.amax(dim=-1).isfinite()
    if not good.all():
        position = end - len(logits) + int(good.logical_not().nonzero()[0])
        raise DecodeError(
            "model",
            "the model's logits are not finite",
            f"NaN or infinity behind the token at position {position}",
            "check the weights and the dtype",
        )
    return logits


class _Call(Protocol):
    """What a model is to us: something that is called with ids [1, k]."""

    def __call__(self, input_ids: Tensor, /, **kwargs: object) -> object: ...


@final
@frozen(eq=False)
class _Reader:
    """How one model is called: the name of its cache argument, and whether it can leave logits out."""

    model: Module
    call: _Call
    cache_name: str | None
    keeps_logits: bool

    @classmethod
    def of(cls, model: Module) -> _Reader:
        names = inspect.signature(model.forward).parameters
        cache_name = next((name for name in CACHE_NAMES if name in names), None)
        return cls(model, model, cache_name, "logits_to_keep" in names)

    def read(self, tokens: Tokens, cache: object | None, last: int) -> tuple[Tensor, object | None]:
        """Logits [last, V] of a text whose beginning `cache` covers and whose rest is `tokens`, and the new cache."""
        if self.cache_name is None:
            return self.read_afresh(tokens, last), None
        output = self._run(tokens, last, {self.cache_name: cache, "use_cache": True})
        return self._logits(output, last), getattr(output, self.cache_name, None)

    def read_afresh(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] of a whole text."""
        return self._logits(self._run(tokens, last, {} if self.cache_name is None else {"use_cache": False}), last)

    def _run(self, tokens: Tokens, last: int, arguments: dict[str, object]) -> object:
        if self.keeps_logits:
            arguments["logits_to_keep"] = last
        with torch.no_grad(), _evaluating(self.model):
            return self.call(torch.tensor([tokens], device=_device(self.model)), **arguments)

    def _logits(self, output: object, last: int) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise DecodeError(
                "model",
                "the model's call returned no logits",
                type(output).__name__,
                "give a model with a language-model head, such as AutoModelForCausalLM loads",
            )
        return logits[0, -last:]


def _device(model: Module) -> torch.device:
    """Where the model wants its ids: where its first parameter is, which for a dispatched model is its embedding."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    """The model in evaluation mode, as dropout would make it a random function; its modes are put back afterwards."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
