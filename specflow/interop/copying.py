"""Copies of the state of a processor, and refusals where a copy would share that state with the original.

A copy shares what is merely held and what cannot change: modules, tokenizers, functions without a state, classes. All
else is copied. Where state can be that no copy reaches (what a closure rebinds or holds, attributes of functions and
classes, mutable defaults, globals, generators, locks), there is no copy but an error that names the place.
"""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from enum import Enum
from functools import cache, cached_property, partial
from logging import Logger
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    UnionType,
    WrapperDescriptorType,
)
from typing import Final, TypeAlias, TypeVar, cast, final

import numpy as np
import tokenizers
import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from specflow.errors import DecodeError

T = TypeVar("T")

Seen: TypeAlias = dict[str, object]

ATOMS: Final = frozenset(
    {
        *map(type, (None, ..., NotImplemented, True, 0, 0.0, 0j, "", b"", range(0), slice(0))),
        *(torch.dtype, torch.device, torch.Size, torch.layout, re.Pattern, GenericAlias, UnionType, TypeVar),
        *(MemberDescriptorType, GetSetDescriptorType, MethodDescriptorType, WrapperDescriptorType),
    }
)
"""Types whose values cannot change."""

HELD: Final = (ModuleType, PreTrainedTokenizerBase, tokenizers.Tokenizer, Logger, Enum, np.generic)
"""What is shared, and not looked into."""

SHARED: Final = (*HELD, FunctionType, BuiltinFunctionType, type, Module, MappingProxyType)
"""What is shared, and refused where it keeps a state."""

_Memoised: Final = type(cache(lambda: 0))

LIBRARIES: Final = sys.stdlib_module_names | {
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "attr",
    "attrs",
    "specflow",
}
"""Packages whose functions and classes are taken to keep no state of a text."""

MADE: Final = frozenset(
    f"__{name}__"
    for name in "init post_init new repr eq ne hash lt le gt ge replace init_subclass del".split()  # noqa: SIM905
)
"""Methods that processing does not call; attrs and dataclasses write some of them."""


@final
@frozen(eq=False)
class Common:
    """What copies share with their originals, and must stay as it is."""

    _watched: tuple[tuple[Callable[[], Seen], Seen], ...] = field(repr=False)

    def refuse_changes(self, happened: str, remedy: str) -> None:
        """`DecodeError` if something is not as it was when they were made: an attribute of a class, of a function, …"""
        for look, before in self._watched:
            now = look()
            for name in (*before, *now):
                if name not in before or name not in now or not _is_same(before[name], now[name]):
                    raise DecodeError("processors", happened, name, remedy)


def copies_of(values: Iterable[T], is_shared: Callable[[object], bool], remedy: str) -> tuple[tuple[T, ...], Common]:
    """Copies of the values, made at once, so that they share what the originals share; and what they have in common.

    Values that `is_shared` stand for themselves. `DecodeError` for one of which there is no sound copy, by name.
    """
    copier = _Copier(is_shared, remedy)
    copied = tuple([copier.whole(value) for value in values])
    return cast("tuple[T, ...]", copied), Common(tuple(copier.watched))


def name_of(processor: object) -> str:
    """What a processor is called in an error: its type, or the function that it is."""
    inner = getattr(processor, "processor", processor)  # of `Stateless`, and of a processor in a row
    return getattr(inner, "__qualname__", type(inner).__qualname__)


def is_fixed(value: object) -> bool:
    """Whether a value, such as a function, is found to keep no state.

    >>> is_fixed(lambda x: x), is_fixed([])
    (True, False)
    """
    try:
        _Copier(lambda value: False, "").fixed(value, "it")
    except DecodeError:
        return False
    return True


@define(eq=False)
class _Copier:
    """One walk over what some values hold."""

    is_shared: Callable[[object], bool]
    remedy: str
    watched: list[tuple[Callable[[], Seen], Seen]] = field(factory=list)
    _name: str = ""
    _memo: dict[int, object] = field(factory=dict)
    _kept: list[object] = field(factory=list)
    _fixed: dict[int, object] = field(factory=dict)

    def whole(self, value: object) -> object:
        """The copy of one processor."""
        if self.is_shared(value):
            return value
        self._name = name_of(value)
        if isinstance(value, Module):
            raise self._refusal("it is a module itself")
        return self.copied(value, "it")

    def copied(self, value: object, where: str) -> object:
        """A value that nobody else has, equal to this one; the value itself where it cannot change."""
        if type(value) in ATOMS:
            return value
        if id(value) not in self._memo:
            self._kept.append(value)  # an id is one only as long as its value lives
            self._memo[id(value)] = self._copy(value, where)
        return self._memo[id(value)]

    def _copy(self, value: object, where: str) -> object:
        if isinstance(value, SHARED) or self.is_shared(value):
            self.fixed(value, where)
            return value
        if isinstance(value, MethodType):
            self.fixed(value.__func__, where)
            return MethodType(value.__func__, self.copied(value.__self__, where))
        if isinstance(value, Tensor | np.ndarray):
            return self._tried(lambda: deepcopy(value, self._memo), where)
        if isinstance(value, torch.Generator):
            return self._tried(value.clone_state, where)
        if type(value) in (list, dict, tuple, set, frozenset):
            return self._container(value, where)
        self.fixed(type(value), where)
        hook = getattr(value, "__deepcopy__", None)
        return self._rebuilt(value, where) if hook is None else self._tried(lambda: hook(self._memo), where)

    def _container(self, value: object, where: str) -> object:
        if isinstance(value, list):
            self._memo[id(value)] = items = list[object]()  # before what is in it, which may hold it
            items += [self.copied(one, where) for one in value]
            return items
        if isinstance(value, dict):
            self._memo[id(value)] = table = dict[object, object]()
            table |= {self.copied(key, where): self.copied(one, where) for key, one in value.items()}
            return table
        assert isinstance(value, tuple | set | frozenset)
        return type(value)([self.copied(one, where) for one in value])

    def _rebuilt(self, value: object, where: str) -> object:
        """By the protocol of pickling, as `deepcopy` does it."""
        recipe = self._tried(lambda: value.__reduce_ex__(4), where)
        if isinstance(recipe, str):
            return value  # the name of a global
        make, arguments, state, items, pairs = (*recipe, *(None,) * 3)[:5]
        self.copied(make, where)
        given = [self.copied(argument, where) for argument in arguments]
        self._memo[id(value)] = new = self._tried(lambda: make(*given), where)
        where = "" if where == "it" else f"{where}."
        if state is not None and hasattr(new, "__setstate__"):
            new.__setstate__(self.copied(state, f"{where}its state"))
        elif state is not None:
            named, slots = state if isinstance(state, tuple) else (state, None)
            for name, one in {**(named or {}), **(slots or {})}.items():
                object.__setattr__(new, name, self.copied(one, f"{where}{name}"))
        for one in items or ():
            new.append(self.copied(one, where))
        for key, one in pairs or ():
            new[self.copied(key, where)] = self.copied(one, where)
        return new

    def fixed(self, value: object, where: str) -> None:
        """Refuse a value that is shared with the original and can change."""
        if type(value) in ATOMS or id(value) in self._fixed or self.is_shared(value):
            return
        self._fixed[id(value)] = value
        inside = _inside(value)
        for one in inside or ():
            self.fixed(one, where)
        if isinstance(value, FunctionType):
            self._function(value, where)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, Module):
            for module in value.modules():
                self._watch(partial(_of_module, module))
        elif inside is None and not (isinstance(value, HELD) or type(value).__module__ == "typing"):
            raise self._refusal(f"{where} is a {type(value).__name__}, which can change")

    def _function(self, function: FunctionType, where: str) -> None:
        if _is_of_library(function.__module__):
            return
        name = function.__qualname__.rpartition("<locals>.")[2]
        rebound, stored, loaded = _facts(function.__code__)
        for variable in sorted(rebound):
            raise self._refusal(f"the function {name} rebinds {variable}, which its closure shares")
        for variable in sorted(stored):
            raise self._refusal(f"the function {name} rebinds the global {variable}")
        for attribute, value in function.__dict__.items():
            if not _is_reserved(attribute):
                raise self._refusal(f"the function {name} has an attribute {attribute}")
            self.fixed(value, f"{attribute} of {name}")
        self._watch(lambda: {f"{name}.{attribute}": value for attribute, value in vars(function).items()})
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if variable != "__class__":
                self.fixed(_held_by(cell), f"{variable} in the closure of {name}")
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.fixed(value, f"a default of {name}")
        world = function.__globals__
        names = [variable for variable in loaded if variable in world]
        for variable in names:
            self.fixed(world[variable], f"the global {variable} of {name}")
        self._watch(lambda: {f"the global {variable}": world.get(variable) for variable in names})

    def _class(self, kind: type) -> None:
        if issubclass(kind, Enum):
            return
        for one in kind.__mro__:
            if _is_of_library(one.__module__):
                continue
            for name, value in list(vars(one).items()):
                is_code = isinstance(value, FunctionType | staticmethod | classmethod | property | cached_property)
                if name in MADE or (_is_reserved(name) and not is_code):
                    continue
                self.fixed(value, f"{one.__name__}.{name}")
            self._watch(partial(_of_class, one))

    def _watch(self, look: Callable[[], Seen]) -> None:
        self.watched.append((look, look()))

    def _tried(self, make: Callable[[], T], where: str) -> T:
        try:
            return make()
        except DecodeError:
            raise
        except Exception as error:
            raise self._refusal(f"{where} cannot be copied: {error}") from error

    def _refusal(self, why: str) -> DecodeError:
        happened = f"a processor with a state cannot be copied soundly ({why})"
        return DecodeError("processors", happened, self._name, self.remedy)


def _inside(value: object) -> Iterable[object] | None:  # noqa: PLR0911 - one for each kind
    """What else must not change for a value not to; None where that is not all that there is to know."""
    match value:
        case tuple() | frozenset():
            return value
        case MappingProxyType():
            return value.values()
        case MethodType():
            return (value.__self__, value.__func__)
        case BuiltinFunctionType():
            return () if value.__self__ is None else (value.__self__,)
        case staticmethod() | classmethod():
            return (value.__func__,)
        case property():
            return (value.fget, value.fset)
        case cached_property():
            return (value.func,)
    return (value.__wrapped__,) if isinstance(value, _Memoised) else None


def _held_by(cell: CellType) -> object:
    """What a closure holds under one name; None while it holds nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


@cache
def _facts(code: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Which names of its closure a function rebinds, which globals it rebinds, and which it reads, those in it too."""
    lines = list(dis.get_instructions(code))
    rebound = {line.argval for line in lines if line.opname in ("STORE_DEREF", "DELETE_DEREF")}
    rebound &= set(code.co_freevars)
    stored = {line.argval for line in lines if line.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    loaded = {line.argval for line in lines if line.opname == "LOAD_GLOBAL"}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            inside, also_stored, also_loaded = _facts(inner)
            rebound |= inside & set(code.co_freevars)
            stored |= also_stored
            loaded |= also_loaded
    return frozenset(rebound), frozenset(stored), frozenset(loaded)


def _of_module(module: Module) -> Seen:
    """What a module keeps beside its parameters, and how often its buffers were written to."""
    name = type(module).__name__
    parts = {f"{name}.{key}": value for key, value in vars(module).items()}
    return parts | {
        f"{name}.{key}, written to": buffer._version for key, buffer in module._buffers.items() if buffer is not None
    }


def _of_class(kind: type) -> Seen:
    return {f"{kind.__name__}.{name}": value for name, value in vars(kind).items() if not _is_reserved(name)}


def _is_reserved(name: str) -> bool:
    return name == "_abc_impl" or (name.startswith("__") and name.endswith("__"))


def _is_same(before: object, now: object) -> bool:
    return before is now or (type(before) is type(now) and type(now) in ATOMS and before == now)


def _is_of_library(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] in LIBRARIES
