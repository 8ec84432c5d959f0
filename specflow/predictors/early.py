"""Self-speculation: the first layers of a model draft, and the model goes on from what they computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Protocol, final, runtime_checkable

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from specflow.caches import Past
from specflow.errors import DecodeError
from specflow.guards.checks import a, valid, whole
from specflow.guards.ids import text_of
from specflow.paths import last_rows
from specflow.predictors.cached import CachedPredictor, asked_for, limits_of
from specflow.predictors.features import stack_of
from specflow.predictors.memo import Memos, Tree
from specflow.predictors.reader import Guard, Reader, layers_of
from specflow.predictors.skip import layer_skip
from specflow.predictors.trial import ANY_PIECES, FEEDINGS, LENGTH, Caches, Regime, Trials, error_bound, error_of
from specflow.protocols import Limits
from specflow.state import Proposal, Tokens
from specflow.trees import is_chain

REMEDY: Final = "let CachedPredictor(layer_skip(model, …)) draft for CachedPredictor(model)"


@runtime_checkable
class ShowsEnds(Protocol):
    """A model that lets what goes into its layers, and what leaves them, pass through two modules."""

    # A method, as from Python 3.12 on `isinstance` does not see the submodules that torch keeps in a table of its own.
    def ends(self) -> tuple[Module, Module]:
        """What goes into the layers passes through the first of them, and what leaves them through the second."""
        ...


def early_exit(model: Module, layers: int, memos: int = 4) -> CachedPredictor:
    """What the first `layers` layers of a model and its head say, over the same weights: it drafts for `Resumed`.

    It keeps what leaves the last of these layers at each token, one row of the hidden size, and shows it:
    `early_exit(model, 10).features(tokens, last)`. Drafts are seldom right where a model was not trained for it.

    `DecodeError` unless 1 ≤ layers ≤ the number that there are, and as `layer_skip`.
    Source: Elhoushi et al. 2404.16710 (LayerSkip), section 4.2, without their training.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    >>> early_exit(model, layers=1)((5, 6), ()).shape
    torch.Size([1, 32])
    """
    a(Module, "give a model, such as specflow.models.load gives")("model", model)
    found = layers_of(model)
    whole(1, "keep one layer at least, and at most as many as there are", found)("layers", layers)
    return CachedPredictor(layer_skip(model, range(layers, found or layers)), memos=memos, features=_leaving)


@final
@define(eq=False)
class Resumed:
    """A model that goes on from what its first layers have computed: the target that `early_exit` drafts for.

    `predict(text, drafts)` gives the whole model's logits [n + 1, V], as `CachedPredictor(model)` does. But the first
    layers are read through `early`, which has read most of a chain of drafts when it drafted them, and this remembers
    only the layers above. So drafts of `early` are read by each layer once, the last of them for a row of the head.

    Law: neither memo ever changes a result (exactly in exact arithmetic, within rounding in floats). Whether the layers
    above make of `early`'s hidden states what the model says is tried before the first text, on a random one, and again
    when the model has changed. A tree of drafts, and a text beyond a horizon of the model where it is read otherwise,
    are read by a `CachedPredictor` of the whole model.

    Up to `memos` texts are kept, and threads may share it. `DecodeError` where `early` is not made of the first layers
    of this model as it is now, for a model whose layers are not found, or that cannot be resumed there (recurrent
    layers, some that share keys and values), and as `CachedPredictor`.
    Source: Elhoushi et al. 2404.16710 (LayerSkip), section 4.3.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    >>> target = Resumed(model, early_exit(model, layers=1))
    >>> torch.allclose(target((5, 6), ()), CachedPredictor(model)((5, 6), ()), atol=1e-6)
    True
    """

    model: Module
    early: CachedPredictor = field(validator=valid(a(CachedPredictor, "give early_exit(model, layers)")))
    memos: int = field(default=4, validator=valid(whole(1, "keep what was read of one text at least")))
    _layers: int = field(init=False, repr=False)
    _guard: Guard = field(init=False, repr=False)
    _trials: Trials = field(init=False, repr=False)
    _rest: Rest = field(init=False, repr=False)
    _faults: dict[int, str] = field(init=False, factory=dict, repr=False)
    """By where a regime begins: why its texts cannot be read in halves; empty where they can."""
    _memos: Memos = field(init=False, repr=False)
    _whole: CachedPredictor = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        reader = Reader.of(self.model)
        asked_for(self.early.shown)
        own, layers = layers_of(self.model), layers_of(self.early.model)
        if own is None or layers is None or layers >= own:
            happened = f"it has to be fewer layers than the {own} of the model"
            raise DecodeError("early", happened, f"{layers} layers", "give early_exit(model, layers)")
        self._layers, self._guard = layers, reader.guard
        self._trials = Trials(Caches(reader), FEEDINGS)
        self._memos = Memos(int(self.memos))
        with self._guard:
            self._meet()

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        return limits_of(self.model)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        tokens, (drafted, parents) = text_of(tokens), Tree.of(drafts)
        with self._guard:
            self._meet()
            if not is_chain(parents):
                return self._whole(tokens, drafts)
            return self._trials.in_parts(tokens + drafted, len(drafted) + 1, self._rows)

    def prune(self, tokens: Tokens, /) -> None:
        """Forget what is seen not to be a prefix of `tokens`, in all layers, if that costs nothing."""
        tokens = text_of(tokens)
        with self._guard:
            self._memos.prune(tokens)
        self.early.prune(tokens)
        self._whole.prune(tokens)

    def forget(self) -> None:
        """Forget all that was read, in all layers, after a change of the model that cannot be noticed."""
        with self._guard:
            self._trials.forget()
        self.early.forget()
        self._whole.forget()

    def _meet(self) -> None:
        """Forget what was read of another model than this now is, and take its layers as they are now."""
        try:
            if self._trials.meet():
                self._memos.clear()
                self._faults.clear()
                if self._trials.renewed:  # it may never look again, and holds the older weights
                    self._whole = CachedPredictor(self.model, memos=self.memos)
                self._rest = Rest.of(self.model, self._layers)
        except BaseException:  # or the next call would go on with the older layers
            self._trials.forget()
            raise

    def _rows(self, tokens: Tokens, last: int) -> Tensor:
        """Logits [last, V] of rows that lie in one region of the model."""
        if not self._goes_on(len(tokens)):
            return last_rows(self._whole, tokens, last)
        return self._through_halves(self._memos, tokens, last)

    def _through_halves(self, memos: Memos, tokens: Tokens, last: int) -> Tensor:
        with memos.of(tokens, 0, last) as memo:
            piece = tokens[len(memo.tokens) :]
            states = self.early.features(tokens, len(piece))
            rows = self._rest.extend(memo.past, piece, states, last)
            memo.tokens += piece
            memo.ahead = last - 1
        return rows

    def _goes_on(self, length: int) -> bool:
        """Whether a text of `length` tokens is read in halves. `DecodeError` where not even a short one is."""
        regime = self._trials.regime(length)
        if regime.over not in self._faults:
            self._faults[regime.over] = self._fault(regime)
        fault = self._faults[regime.over]
        if fault and regime.over == 0:
            happened = f"the model cannot be resumed after layer {self._layers}: {fault}"
            raise DecodeError("early", happened, type(self.model).__name__, REMEDY)
        return not fault

    def _fault(self, regime: Regime) -> str:
        """Why texts of a regime cannot be read in halves: found out on a random one, in pieces, with a wrong turn."""
        over, trials, memos = regime.over, self._trials, Memos(1)
        if regime.feeding != ANY_PIECES or trials.region(over + 1).over:
            return f"it is fed {regime.feeding.name}"
        early, rest, whole = map(_weights_in, (self.early.model, self._rest.reader.model, self.model))
        if not early <= whole <= early | rest:
            return "its first layers are not over the weights that it has now"
        further = [horizon for horizon in trials.horizons if horizon > over]
        total = min([over + LENGTH, trials.room, *further])
        text, rows = trials.text(total), []
        truth = trials.read_afresh(text, total - over)
        *cuts, start = over, *[cut for cut in (total - 10, total - 9, total - 5) if cut > over]
        try:
            for begin, end in pairwise((*cuts, start)):
                rows.append(self._through_halves(memos, text[:end], end - begin))
            self._through_halves(memos, text[:start] + text[start:][::-1], total - start)
            rows.append(self._through_halves(memos, text, total - start))
        except torch.OutOfMemoryError:
            raise
        except DecodeError as error:
            return error.happened
        except Exception as error:  # whatever a model raises here says that it cannot be read so
            return str(error).strip().partition("\n")[0] or type(error).__name__
        with memos.of(text, 0, 0) as memo:
            if memo.past.needs_marks:
                return "the layers above keep more than keys and values"
        wrong = error_of(torch.cat(rows), truth) > error_bound(trials.reader.rounding)
        return "what the layers above make of it is not what the model says" if wrong else ""


@final
@frozen(eq=False)
class Rest:
    """The layers of a model after the first, and its head: they read hidden states in place of ids."""

    reader: Reader
    hands: Hands

    @classmethod
    def of(cls, model: Module, layers: int) -> Rest:
        """All but the first `layers` layers of a model."""
        rest, hands = layer_skip(model, range(layers)), Hands()
        first = rest.ends()[0] if isinstance(rest, ShowsEnds) else _layers_in(rest)[0]
        first.register_forward_pre_hook(hands, with_kwargs=True)
        return cls(Reader.of(rest), hands)

    def extend(self, past: Past, piece: Tokens, states: Tensor, last: int) -> Tensor:
        """Logits [last, V] of the text that `past` begins and `piece` ends, whose hidden states [k, H] are given."""
        self.hands.states = states[None]
        try:
            return self.reader.extend(past, self.reader.ids([piece]), last)
        finally:
            self.hands.states = None


@final
@define(eq=False)
class Hands:
    """Hands a layer the `states` [1, k, H] in place of what the model made of the ids."""

    states: Tensor | None = None

    def __call__(
        self, layer: Module, given: tuple[object, ...], named: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        made = given[0] if given else named.get("hidden_states")
        if self.states is None or not isinstance(made, Tensor) or made.shape != self.states.shape:
            happened = "what leaves its layers in `early` does not fit into the next layer"
            raise DecodeError("early", happened, type(layer).__name__, REMEDY)
        if given:
            return (self.states, *given[1:]), named
        return given, {**named, "hidden_states": self.states}


def _weights_in(model: Module) -> set[int]:
    """What tells weights apart: where they lie, as accelerated models show theirs in parameters of their own."""
    return {weight.data_ptr() if type(weight) is Parameter else id(weight) for weight in model.parameters()}


def _leaving(model: Module) -> Sequence[Module]:
    """What returns the hidden states that leave a model's layers."""
    return [model.ends()[1] if isinstance(model, ShowsEnds) else _layers_in(model)[-1]]


def _layers_in(model: Module) -> ModuleList:
    return stack_of(model, layers_of(model), "model", REMEDY)[1]
