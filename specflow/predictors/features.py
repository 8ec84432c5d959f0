"""Features: what layers of a model held at each token of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Protocol, TypeAlias, TypeVar, final

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Module, ModuleList

from specflow.errors import DecodeError
from specflow.guards.checks import is_whole, shown

Features: TypeAlias = tuple[int, ...] | Callable[[Module], Sequence[Module]]
"""Which of them: k is what leaves the k-th layer, as transformers counts `hidden_states` (0: the embeddings, the last:
behind the final norm). Or a function of the model that returns modules: what these return."""

T = TypeVar("T")

Run: TypeAlias = Callable[[tuple[int, ...]], T]
"""Runs one pass, the model told these numbers of layers, if any, and returns the model's output."""


class Taps(Protocol):
    """Lets a pass run and takes its features on the way."""

    def __call__(self, run: Run[T], tokens: torch.Size, /) -> tuple[T, Tensor]:
        """The model's output, and the features [B, k, F] of ids of shape `tokens`, [B, k]."""
        ...


@final
@frozen(eq=False)
class Told:
    """Features of a model that takes their numbers itself, as `features`, and returns them beside its logits."""

    numbers: tuple[int, ...]

    def __call__(self, run: Run[T], tokens: torch.Size, /) -> tuple[T, Tensor]:
        """The model's output, and its own features."""
        output = run(self.numbers)
        return output, _fitting(getattr(output, "features", None), tokens, "the model")


@final
@frozen(eq=False)
class Hooked:
    """Features of any model: hooks on some of its modules, there for the time of a pass.

    Of the modules `before` what they are given is taken, of those `after` what they return, in the order of `places`.
    """

    places: tuple[tuple[Module, bool], ...]
    """Each module, and whether it is what goes into it that is taken."""

    def __call__(self, run: Run[T], tokens: torch.Size, /) -> tuple[T, Tensor]:
        """The model's output, and what the hooks saw."""
        with self._hooks() as seen:
            output = run(())
        return output, torch.cat([_fitting(seen.get(i), tokens, _name(m)) for i, (m, _) in enumerate(self.places)], -1)

    @contextmanager
    def _hooks(self) -> Iterator[dict[int, object]]:
        """What was seen at each place, while these hooks are there; a place that is passed twice has no one answer."""
        seen: dict[int, object] = {}
        mine, handles = get_ident(), []

        def note(place: int, value: object) -> None:
            if get_ident() == mine:  # other threads may call the model, too, past its lock
                seen[place] = None if place in seen else value

        def before(place: int) -> Callable[..., None]:
            return lambda module, given, named: note(place, given[0] if given else named.get("hidden_states"))

        def after(place: int) -> Callable[..., None]:
            return lambda module, given, output: note(place, _tensor_in(output))

        try:
            for place, (module, is_input) in enumerate(self.places):
                handles.append(
                    module.register_forward_pre_hook(before(place), with_kwargs=True)
                    if is_input
                    else module.register_forward_hook(after(place))
                )
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def taps_of(model: Module, features: object, layers: int | None, *, takes: bool) -> Taps:
    """What takes the features of a model, which has so many `layers` and `takes` their numbers itself, or does not.

    `DecodeError` for numbers that are no layers', for modules that are not the model's, where the layers of a model
    cannot be found, and for a compiled model.
    """
    if isinstance(getattr(model, "_orig_mod", None), Module):
        remedy = "give the model that was compiled"
        raise DecodeError("features", "a compiled model does not show its layers", type(model).__name__, remedy)
    if callable(features) and not isinstance(features, type | list | Module):
        modules: object = features(model)
        own = set(model.modules())
        if not isinstance(modules, Sequence) or not modules or not all(module in own for module in modules):
            remedy = "return some of its modules, such as [model.model.layers[5]]"
            raise DecodeError("features", "features are not modules of the model", shown(modules), remedy)
        return Hooked(tuple([(module, False) for module in modules]))
    if not isinstance(features, tuple) or not features or not all(is_whole(k) and k >= 0 for k in features):
        remedy = "give numbers of layers such as (2, 14, 25), or a function of the model that returns modules"
        raise DecodeError("features", "features are no layers", shown(features), remedy)
    if layers is not None and max(features) > layers:
        remedy = f"give numbers from 0, the embeddings, to {layers}"
        raise DecodeError("features", f"the model has {layers} layers", max(features), remedy)
    return Told(features) if takes else Hooked(tuple([_place(model, k, layers) for k in features]))


def _place(model: Module, k: int, layers: int | None) -> tuple[Module, bool]:
    """Where what leaves the k-th layer can be seen: going into the next one, or, of the last, leaving the decoder."""
    owner, found = stack_of(model, layers, "features", "give a function of the model that returns the modules")
    return (owner, False) if k == layers else (found[k], True)


def stack_of(model: Module, layers: int | None, parameter: str, remedy: str) -> tuple[Module, ModuleList]:
    """The list of a model's layers, so many, and whose it is; `DecodeError` where it is not found."""
    for owner, lists in _outer_lists(_decoder_of(model)):
        for found in lists:
            if layers is not None and len(found) == layers:
                return owner, found
    raise DecodeError(parameter, "the layers of the model were not found", type(model).__name__, remedy)


def _outer_lists(module: Module) -> Iterator[tuple[Module, list[ModuleList]]]:
    """Modules, and the lists that they hold: not those within other lists, such as the experts of a layer."""
    yield module, [child for child in module.children() if isinstance(child, ModuleList)]
    for child in module.children():
        if not isinstance(child, ModuleList):
            yield from _outer_lists(child)


def _decoder_of(model: Module) -> Module:
    """The part of a model that reads text: transformers' name for it, where it has one."""
    get = getattr(model, "get_decoder", None)
    found = get() if callable(get) else None
    return found if isinstance(found, Module) else model


def _tensor_in(output: object) -> object:
    """The hidden states in what a module returns: the tensor itself, or the first of several."""
    if isinstance(output, tuple):
        return output[0] if output else None
    return output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)


def _fitting(seen: object, tokens: torch.Size, place: str) -> Tensor:
    """[B, k, n], one row for each token; `DecodeError` for anything else."""
    if not isinstance(seen, Tensor) or seen.dim() < 3 or seen.shape[:2] != tokens:
        received = f"a tensor of shape {list(seen.shape)}" if isinstance(seen, Tensor) else shown(seen)
        happened = f"{place} did not show one row for each of the tokens {list(tokens)}"
        raise DecodeError("features", happened, received, "give other layers, or a function that returns modules")
    return seen.detach().flatten(2)


def _name(module: Module) -> str:
    return type(module).__name__
