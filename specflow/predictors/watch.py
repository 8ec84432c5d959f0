"""Noticing that a model is no longer what it was when its cache was filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from operator import attrgetter, getitem, is_
from types import MethodType
from typing import Final, Generic, TypeAlias, TypeVar, final
from weakref import WeakKeyDictionary, WeakMethod, ref

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module, Parameter

from specflow.predictors.autocast import casts

Kinds: TypeAlias = tuple[object, ...]
"""What tells apart what is found out about one model: dtypes, devices and the kind of a look, among others."""

_version: Final[Callable[[Tensor], int]] = attrgetter("_version")


@final
@frozen(eq=False)
class Look:
    """What a model was at one moment: its modules, its tensors and their versions, its adapters and its settings."""

    held: tuple[object, ...]
    counted: tuple[tuple[int, ...], tuple[int, ...]]
    """How often each tensor was written to and where it lies; and the hooks."""
    kind: tuple[object, ...]

    def same(self, other: Look) -> bool:
        """Whether nothing that is looked at has changed."""
        return self.kind == other.kind and self.of_same_weights(other)

    def of_same_weights(self, other: Look) -> bool:
        """Whether at most the kind has changed: adapters, autocast, the implementation of attention."""
        return self.counted == other.counted and (self.held is other.held or _identical(self.held, other.held))

    def of_same_parts(self, other: Look) -> bool:
        """Whether the modules are the same ones, and each tensor is of the same kind: other weights are no other parts.

        Quantization replaces modules, or the kind of their weights.
        """
        return self.held is other.held or _identical(_parts(self.held), _parts(other.held))


T = TypeVar("T")


@final
@define(eq=False)
class _Known(Generic[T]):
    """What was found out about a model as it was at its last look."""

    look: Look
    found: dict[Kinds, T] = field(factory=dict)


@final
@define(eq=False)
class Findings(Generic[T]):
    """What is found out about models by trying them: once for each model object and kind.

    It is forgotten when modules were replaced, or weights by some of another kind; when only their numbers have
    changed, what `holds` with any numbers stays.
    """

    holds: Callable[[T], bool]
    _known: WeakKeyDictionary[Module, _Known[T]] = field(init=False, factory=WeakKeyDictionary)

    def of(self, model: Module, kinds: Kinds, now: Look, find: Callable[[], T]) -> T:
        """What is known of these kinds of the model, which looks as it does `now`, or else what `find` finds."""
        known = self._known.setdefault(model, _Known(now))
        if not known.look.of_same_weights(now):
            is_same = known.look.of_same_parts(now)
            known.found = {each: one for each, one in known.found.items() if is_same and self.holds(one)}
        known.look = now  # an older one would hold weights that were replaced
        found = known.found  # which another thread may replace while this one looks
        if kinds not in found:
            found[kinds] = find()
        return found[kinds]


@final
@define(eq=False)
class Watch:
    """Looks at a model between its passes, for some 100 µs where there are 400 modules and 270 tensors.

    Noticed: weights that were written to (an optimizer's step, `load_state_dict`), that were replaced, moved or cast;
    modules and weights that were added or replaced; adapters that were switched, merged or scaled; hooks that were
    added or removed; another implementation of attention; autocast. Not noticed: what is written through `.data` or
    from outside of torch, what is written to tensors that were made in inference mode, what modules keep beside their
    parameters and persistent buffers, weights that are offloaded.

    >>> model = torch.nn.Linear(2, 2)
    >>> watch = Watch(model)
    >>> before = watch.look()
    >>> with torch.no_grad():
    ...     _ = model.weight.mul_(2)
    >>> before.same(watch.look()), watch.look().same(watch.look())
    (False, True)
    """

    model: Module
    modules: tuple[Module, ...] = field(init=False)
    has_plain_weights: bool = field(init=False)
    """Whether no parameter is sharded, quantized or of another kind of its own."""
    has_offloaded_weights: bool = field(init=False)
    _families: tuple[list[dict[str, Module | None]], list[dict[str, Module | None]]] = field(init=False)
    """The children of each module, where it keeps them, and what they were: a module equals itself alone."""
    _bare: list[Mapping[str, Tensor | None]] = field(init=False)
    """Where modules would keep tensors, and have none."""
    _stores: list[Mapping[str, Tensor | None]] = field(init=False)
    """Where they keep some: they are asked at each look, as they may hold others."""
    _sizes: list[int] = field(init=False)
    _slots: tuple[list[Mapping[str, Tensor | None]], list[str]] = field(init=False)
    _kept: tuple[Tensor | None, ...] = field(init=False)
    """What the slots held."""
    _held: tuple[object, ...] = field(init=False)
    _tensors: tuple[Tensor, ...] = field(init=False)
    _counting: tuple[Tensor, ...] = field(init=False)
    """Those that count how often they were written to: not what was made in inference mode."""
    _placed: tuple[Tensor, ...] = field(init=False)
    """Those that lie at one place: not all kinds of tensors do."""
    _hooks: tuple[Mapping[int, object], ...] = field(init=False)
    _tuners: tuple[Module, ...] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._walk()

    def look(self) -> Look:
        """What the model is now."""
        if not self._holds_the_same():
            self._walk()
        hooks = tuple(chain.from_iterable(filter(None, self._hooks)))  # most modules have none
        return Look(self._held, (self._written(), hooks), self._kind())

    @property
    def training(self) -> list[Module]:
        """The modules that are in training mode, whatever the mode of those that hold them."""
        return [module for module in self.modules if module.training]

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in, but for autocast; its logits may come in a finer dtype."""
        return next((tensor.dtype for tensor in self._tensors if tensor.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the first of the model's tensors is, a parameter where it has any."""
        return self._tensors[0].device if self._tensors else torch.device("cpu")

    def _walk(self) -> None:
        modules = self.modules = tuple(self.model.modules())
        families = [module._modules for module in modules]
        self._families = families, [dict(family) for family in families]
        stores = [store for module in modules for store in (module._parameters, module._buffers)]
        self._bare, self._stores = [store for store in stores if not store], [store for store in stores if store]
        self._sizes = [*map(len, self._stores)]
        weights: list[tuple[Mapping[str, Tensor | None], str]] = [
            (module._parameters, name) for module in modules for name in module._parameters
        ]
        weights += [
            (module._buffers, name)
            for module in modules
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        ]
        kinds = {type(weight) for module in modules for weight in module._parameters.values() if weight is not None}
        self.has_plain_weights = kinds <= {Parameter}
        # What is offloaded comes and goes with each pass.
        slots = [(store, name) for store, name in weights if not getattr(store[name], "is_meta", False)]
        self.has_offloaded_weights = len(slots) < len(weights)
        self._slots = [store for store, _ in slots], [name for _, name in slots]
        self._kept = tuple(map(getitem, *self._slots))
        self._held = (*chain.from_iterable(family.values() for family in families), *self._kept)
        self._tensors = tuple([held for held in self._kept if isinstance(held, Tensor)])
        self._sort()
        self._hooks = tuple([hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)])
        self._tuners = tuple([module for module in modules if "_active_adapter" in vars(module)])

    def _holds_the_same(self) -> bool:
        children, known = self._families
        try:
            return (
                children == known
                and not any(self._bare)
                and [*map(len, self._stores)] == self._sizes
                and all(map(is_, map(getitem, *self._slots), self._kept))
            )
        except KeyError:  # something is gone, and something else there
            return False

    def _written(self) -> tuple[int, ...]:
        """How often each tensor was written to, and where it lies, as far as it tells."""
        try:
            return (*map(_version, self._counting), *map(Tensor.data_ptr, self._placed))
        except (RuntimeError, NotImplementedError):  # a tensor became one of another kind, as by `to` in inference mode
            self._sort()
            return (*map(_version, self._counting), *map(Tensor.data_ptr, self._placed))

    def _sort(self) -> None:
        self._counting = tuple([tensor for tensor in self._tensors if _tells(_version, tensor)])
        self._placed = tuple([tensor for tensor in self._tensors if _tells(Tensor.data_ptr, tensor)])

    def _kind(self) -> tuple[object, ...]:
        """The implementation of attention, the adapters, autocast: what other passes may be made of."""
        own = vars(self.model)
        return (
            getattr(own.get("config"), "_attn_implementation", None),
            _stands_for(own.get("forward")),  # what PEFT replaces where it disables prompts, and accelerate
            str(own.get("active_adapter")),
            tuple([_adapted(tuner) for tuner in self._tuners]),
            casts(),
        )


def _stands_for(forward: object) -> object:
    """What is the same of the same callable, as long as there is one, and keeps neither it nor the model behind it."""
    if forward is None:  # as most often: an exception takes longer than the rest
        return None
    try:
        return WeakMethod(forward) if isinstance(forward, MethodType) else ref(forward)
    except TypeError:  # one that cannot be held so
        return forward


def _tells(number: Callable[[Tensor], int], tensor: Tensor) -> bool:
    try:
        number(tensor)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _identical(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _parts(held: tuple[object, ...]) -> tuple[object, ...]:
    return tuple([type(each) if isinstance(each, Tensor) else each for each in held])


def _adapted(tuner: Module) -> tuple[object, ...]:
    """Which adapters a layer applies, which are merged into its weights, and how strongly."""
    state = vars(tuner)
    scaling = state.get("scaling")
    return (
        str(state.get("_active_adapter")),
        state.get("_disable_adapters"),
        str(state.get("merged_adapters")),
        tuple(scaling.values()) if isinstance(scaling, dict) else None,
    )
