"""How one model is called: what it takes, where it is, and what is refused before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import Lock, RLock
from typing import Final, NamedTuple, TypeAlias, TypeVar, cast, final
from weakref import WeakKeyDictionary

import numpy
import torch
from attrs import define, field
from torch import Tensor
from torch.nn import Embedding, Module, ModuleList
from transformers import PreTrainedConfig, PreTrainedModel

from specflow.caches import Past, lasting
from specflow.errors import DecodeError
from specflow.guards.checks import shown
from specflow.predictors.autocast import cast_to
from specflow.predictors.features import Features, Run, Taps, taps_of
from specflow.predictors.untracked import untracked
from specflow.predictors.watch import Watch
from specflow.protocols import Limits
from specflow.state import Tokens
from specflow.trees import depths, lineage

CACHE_NAMES: Final = ("cache", "past_key_values", "cache_params", "state")
"""What models call their cache, as argument and as output: transformers' name, its older ones, and RWKV's."""


T = TypeVar("T")

Guard: TypeAlias = AbstractContextManager[bool]
"""A lock that one thread may take several times."""

_GUARDS: Final[WeakKeyDictionary[Module, Guard]] = WeakKeyDictionary()
_GUARDING: Final = Lock()


class Pass(NamedTuple):
    """What a pass gives: `logits` [B, last, V], the `cache` that covers all that was read, None from a model that keeps
    it to itself, and the `features` [B, k, F] of what was read, where somebody wants them."""

    logits: Tensor
    cache: object | None
    features: Tensor | None


@final
@define(eq=False)
class Reader:
    """How one model is called: the name of its cache argument, and what else it can be told.

    `guard` is the model's own lock: one thread at a time puts it into evaluation mode and runs it. `DecodeError` for
    what is no model that reads ids alone: no module, a class, an encoder-decoder, weights that are nowhere.
    """

    model: Module = field(repr=False)
    cache_name: str | None
    takes_positions: bool
    takes_masks: bool
    """Whether it is one of transformers' models that are told so what each token sees, and where it stands."""
    takes_parents: bool
    keeps_logits: bool
    watch: Watch = field(repr=False)
    guard: Guard = field(repr=False)
    taps: Taps | None = field(default=None, repr=False)
    """What takes the features of each pass, where they are wanted."""
    limits: Limits = field(init=False)
    """How many ids the model both reads and writes, and the most tokens that it reads."""
    _place: torch.device | None = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.ask_again()

    def ask_again(self) -> None:
        """Ask for what may change with the weights or the adapters: the limits, and where accelerate runs the model."""
        self.limits = Limits(vocabulary_of(self.model), context_of(self.model))
        self._place = _place(self.model) if self.watch.has_offloaded_weights else None

    @classmethod
    def of(cls, model: Module, features: Features | None = None) -> Reader:
        """Reads the signature of the model's forward, or of the model that torch.compile or an adapter (PEFT) wraps."""
        given: object = model
        if not isinstance(given, Module):
            remedy = "load one, with specflow.models.load"
            raise DecodeError("model", "the model is no torch module", shown(given), remedy)
        refuse_weightless("model", model)
        whole = getattr(model, "_orig_mod", model)
        inner = cast(Module, getattr(whole, "get_base_model", lambda: whole)())
        names = inspect.signature(inner.forward).parameters
        if getattr(getattr(model, "config", None), "is_encoder_decoder", None) is True:
            happened, remedy = "the model is an encoder-decoder", "give a decoder-only model"
            raise DecodeError("model", happened, type(inner).__name__, remedy)
        with _GUARDING:
            guard = _GUARDS.setdefault(inner, RLock())
        return cls(
            model,
            next((name for name in CACHE_NAMES if name in names), None),
            "position_ids" in names,
            isinstance(whole, PreTrainedModel) and {"position_ids", "attention_mask"} <= set(names),
            "parents" in names,
            "logits_to_keep" in names,
            Watch(model),
            guard,
            None
            if features is None
            else taps_of(model if whole is not model else inner, features, layers_of(model), takes="features" in names),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the model's weights are in, and what it is given."""
        return self.watch.dtype

    @property
    def rounding(self) -> torch.dtype:
        """What the model rounds to: under autocast the coarser of what it casts to and what its weights are in."""
        cast = cast_to(self.device.type)
        if cast is None or self.dtype == torch.float64:  # which autocast leaves as it is
            return self.dtype
        return max(cast, self.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def device(self) -> torch.device:
        """Where the model wants its ids: where its first parameter is, for a dispatched model its embedding."""
        return self.watch.device if self._place is None else self._place

    def ids(self, tokens: Tokens | Sequence[Tokens]) -> Tensor:
        """A text as ids [k], or several as ids [B, k], where the model wants them."""
        return torch.from_numpy(numpy.array(tokens, numpy.int64)).to(self.device)  # a third of torch.tensor's time

    def refuse_strange(self, tokens: Sequence[int]) -> None:
        """`DecodeError` for ids that the model does not have."""
        if not {*map(type, tokens)} <= {int}:
            strange = next(token for token in tokens if type(token) is not int)
            raise DecodeError("tokens", "a token id is not an int", shown(strange), "give plain ints")
        known = self.limits.vocab_size
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if token < 0 or (known is not None and token >= known):
                size = "the vocabulary" if known is None else f"the vocabulary of {known}"
                remedy = "use the tokenizer that belongs to the model"
                raise DecodeError("tokens", f"a token id is outside {size}", token, remedy)

    def read(
        self,
        ids: Tensor,
        cache: object | None,
        covered: int,
        last: int,
        parents: Sequence[int] | None = None,
        *,
        told: bool = True,
    ) -> Pass:
        """Logits [B, last, V] of texts whose first `covered` tokens `cache` covers and which `ids` [B, k] end.

        With `parents` the ids are a tree after what is covered, and so is what the cache then covers. The model is
        `told` its positions, or counts them itself.
        """
        assert self.cache_name is not None
        arguments: dict[str, object] = {self.cache_name: cache, "use_cache": True}
        if parents is not None and self.takes_parents:
            arguments["parents"] = parents
        elif parents is not None:
            mask = torch.zeros(1, 1, len(parents), covered + len(parents), dtype=self.dtype, device=self.device)
            hidden = torch.from_numpy(~lineage(parents)).to(self.device)
            mask[..., covered:].masked_fill_(hidden, torch.finfo(mask.dtype).min)
            arguments["attention_mask"] = mask
            arguments["position_ids"] = covered + torch.tensor([depths(parents)], device=ids.device)
        elif self.takes_positions and covered and told:
            # As `generate` does. Most models count from what their cache covers, a few (Bamba) from 0.
            arguments["position_ids"] = torch.arange(covered, covered + ids.shape[1], device=ids.device)[None]
        output, features = self._run(ids, last, arguments)
        return Pass(_logits(output, last), self._left_by(output, cache), features)

    def _left_by(self, output: object, cache: object | None) -> object | None:
        """The cache after a pass, by the name that the model takes or another one; else the one that it was given."""
        names = (cast(str, self.cache_name), *CACHE_NAMES)
        return next((left for name in names if (left := getattr(output, name, None)) is not None), cache)

    def extend(
        self, past: Past, ids: Tensor, last: int, parents: Sequence[int] | None = None, *, told: bool = True
    ) -> Tensor:
        """Logits [last, V] of the text that `ids` [1, k] end and `past` begins, which covers them from then on."""
        logits, cache, features = self.read(ids, past.cache, past.length, last, parents, told=told)
        past.extend(cache, past.length + ids.shape[1], None if features is None else features[0])
        return logits[0]

    def read_rows(
        self, ids: Tensor, cache: object, last: int, positions: Tensor, masks: Tensor | dict[str, Tensor]
    ) -> Pass:
        """Logits [B, last, V] of ids [B, k] at `positions` [B, k], under masks that are given whole."""
        assert self.cache_name is not None
        told = {"use_cache": True, "position_ids": positions, "attention_mask": masks}
        output, features = self._run(ids, last, {self.cache_name: cache, **told})
        return Pass(_logits(output, last), cache, features)

    def read_afresh(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] of a whole text, read in one pass."""
        return self._afresh(tokens, last).logits[0]

    def features_afresh(self, tokens: Tokens, last: int) -> Tensor:
        """Features [last, F] of a whole text, read in one pass."""
        features = self._afresh(tokens, 1).features
        assert features is not None
        return features[0, -last:]

    def tapped(self, run: Run[T], tokens: torch.Size) -> tuple[T, Tensor | None]:
        """What a pass over ids of shape `tokens` returns, and their features where they are wanted."""
        return (run(()), None) if self.taps is None else self.taps(run, tokens)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Nobody else runs the model in the block; it evaluates, without gradients, and what it keeps lasts."""
        with self.guard, lasting(), torch.no_grad():
            training = self.watch.training  # looked at under the guard: another thread may have had it evaluate
            try:
                for module in training:  # dropout would make a model a random function
                    module.training = False
                yield
            finally:  # an interrupt may come between two of them
                for module in training:
                    module.training = True

    def _afresh(self, tokens: Tokens, last: int) -> Pass:
        arguments: dict[str, object] = {} if self.cache_name is None else {"use_cache": False}
        output, features = self._run(self.ids([tokens]), last, arguments)
        return Pass(_logits(output, last), None, features)

    def _run(self, ids: Tensor, last: int, arguments: dict[str, object]) -> tuple[object, Tensor | None]:
        """One call of the model, and the features of the ids where they are wanted."""
        if self.keeps_logits:
            arguments["logits_to_keep"] = last

        def run(features: tuple[int, ...]) -> object:
            if features:
                arguments["features"] = features
            with untracked(ids, self.watch.has_plain_weights):
                return self.model(ids, **arguments)

        with self.at_rest():
            try:
                return self.tapped(run, ids.shape)
            except IndexError as error:
                happened = f"the model has no embedding for one of {ids.shape[-1]} tokens or their positions ({error})"
                received, remedy = f"ids up to {int(ids.max())}", "shorten the text, or use the model's own tokenizer"
                raise DecodeError("model", happened, received, remedy) from error


def vocabulary_of(model: Module) -> int | None:
    """How many ids a model both reads and writes, by its embeddings, or else its config; None where neither tells.

    >>> vocabulary_of(torch.nn.Linear(2, 2))
    """
    size = embedded_of(model) or getattr(config_of(model), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def config_of(model: Module) -> object:
    """The config of a model, or of the part of it that reads text; None where it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config


STATIC_ROTARY: Final = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
"""The kinds of rotary embeddings that turn a position alike however long the text is."""


def ropes_of(model: Module) -> list[Mapping[str, object]]:
    """What a config says of rotary positions: of all layers together, and of each kind of layer by itself.

    >>> ropes_of(torch.nn.Linear(2, 2))
    []
    """
    said = getattr(config_of(model), "rope_parameters", None)
    return [said, *[part for part in said.values() if isinstance(part, dict)]] if isinstance(said, dict) else []


def layers_of(model: Module) -> int | None:
    """How many layers a model has, as its config tells; None where it does not."""
    layers = getattr(config_of(model), "num_hidden_layers", None)
    return layers if isinstance(layers, int) and layers > 0 else None


def embedded_of(model: Module) -> int | None:
    """How many ids the embeddings of a model both read and write; None where it does not show them."""
    sizes = []
    for table, size in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        with suppress(AttributeError, NotImplementedError):
            sizes.append(getattr(getattr(model, table)(), size, None))
    return min([size for size in sizes if isinstance(size, int) and size > 0], default=None)


def context_of(model: Module) -> int | None:
    """The most tokens that a model reads, as its config has it; None where that does not tell.

    Where positions are counted from after a padding row of their table (RoBERTa), that many fewer, and so after a soft
    prompt.
    """
    context = getattr(config_of(model), "max_position_embeddings", None)
    if not isinstance(context, int) or context <= 0:
        return None
    context = min(context, _positions_in(model) or context)
    before = soft_prompt_of(model)
    # One that a soft prompt takes up is none: rotary positions go on after it, and the end of a table is an error.
    return context - before if not before or context - before > 1 else None


def _positions_in(module: Module, name: str = "") -> int | None:
    """How many positions a table with a row for padding has; it lies beside the layers, whose lists are passed over."""
    if isinstance(module, Embedding) and "position" in name and module.padding_idx is not None:
        return module.num_embeddings - module.padding_idx - 1
    inner = [(f"{name}.{each}", child) for each, child in module.named_children() if not isinstance(child, ModuleList)]
    return next((size for each, child in inner if (size := _positions_in(child, each))), None)


def soft_prompt_of(model: Module) -> int:
    """How many tokens of its own an adapter (PEFT) puts before each text: to the model the text is longer by those.

    >>> soft_prompt_of(torch.nn.Linear(2, 2))
    0
    """
    size = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None)
    is_on = getattr(model, "has_active_enabled_adapter", True)
    return size if isinstance(size, int) and is_on else 0


def refuse_weightless(name: str, model: Module) -> None:
    """`DecodeError` for a model whose weights are nowhere; those that accelerate keeps on the CPU or on a disk are."""
    if any(parameter.is_meta for parameter in model.parameters()) and _place(model) is None:
        remedy = "load it with its weights, or offload it by accelerate"
        raise DecodeError(name, f"the {name} has no weights", "parameters on the meta device", remedy)


def _place(model: Module) -> torch.device | None:
    """Where accelerate runs a model of which some weights are offloaded; None where it does not."""
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for each in (hook, *getattr(hook, "hooks", ())):
            place = getattr(each, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return None


def _logits(output: object, last: int) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        remedy = "give a model with a language-model head, such as AutoModelForCausalLM loads"
        raise DecodeError("model", "the model's call returned no logits", type(output).__name__, remedy)
    if logits.dim() != 3 or logits.shape[1] < last or not logits.is_floating_point():
        received = f"{list(logits.shape)} of {logits.dtype}"
        raise DecodeError("model", "the model's logits are not [batch, tokens, V]", received, "give a language model")
    return logits if logits.shape[1] == last else logits[:, -last:]
