"""What a value may be. A check refuses anything else with a `DecodeError` that names the parameter, never otherwise.

Values of numpy's number types are taken for what they plainly mean; bools and tensors are not numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite
from numbers import Integral, Real
from typing import Final, TypeAlias, TypeGuard, TypeVar, cast

import numpy
from attrs import Attribute
from torch import Tensor
from torch.nn import Module

from specflow.errors import DecodeError

T = TypeVar("T")

Check: TypeAlias = Callable[[str, object], None]
"""(the parameter's name, the value) → nothing, or a `DecodeError`."""


def shown(value: object) -> str:
    """A value in an error's sentence: on one line, and not endless.

    >>> shown("a" * 200)[-5:], shown(None)
    ('aa...', 'None')
    """
    try:
        line = " ".join(repr(value).split())
    except Exception:  # a value that cannot even be shown, such as an int of 5000 digits
        line = f"a {type(value).__name__}"
    return line if len(line) <= 80 else line[:77] + "..."


def described(value: object) -> str:
    """A tensor by its dtype, shape and device; anything else as it is `shown`."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)} on {value.device.type}"
    return shown(value)


def named(part: object) -> str:
    """What a user calls a part: a function's own name, else that of its type.

    >>> named(shown), named(3)
    ('shown', 'int')
    """
    name = getattr(part, "__qualname__", None)
    return name if isinstance(name, str) else type(part).__name__


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; bools and tensors are not.

    >>> is_whole(-3), is_whole(True), is_whole(3.0)
    (True, False, False)
    """
    kind = type(value)
    return kind is int or (kind is not bool and isinstance(value, Integral))


def is_id(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of 0 or more, as a token id is.

    >>> is_id(3), is_id(-1), is_id(True), is_id(3.0)
    (True, False, False, False)
    """
    return is_whole(value) and value >= 0


def is_floats(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of floats that has numbers."""
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta


def own(value: T) -> T:
    """A number or a flag of numpy's as Python's own, which does not wrap around; anything else as it is.

    >>> own(numpy.uint8(200)) + 100, own(numpy.float32(0.5)), own("a")
    (300, 0.5, 'a')
    """
    return cast(T, value.item()) if isinstance(value, numpy.generic) else value


def valid(check: Check) -> Callable[[object, Attribute[T], T], None]:
    """A check as a validator of attrs. A number or a flag of numpy's is then held as Python's own.

    >>> from attrs import field, frozen
    >>> @frozen
    ... class Draft:
    ...     gamma: int = field(validator=valid(whole(1, "draft at least one token")))
    >>> Draft(0)
    Traceback (most recent call last):
    specflow.errors.DecodeError: gamma is below 1: received 0; draft at least one token.
    """

    def validate(instance: object, attribute: Attribute[T], value: T) -> None:
        check(attribute.alias or attribute.name, value)
        if isinstance(value, numpy.generic):
            object.__setattr__(instance, attribute.name, own(value))

    return validate


def whole(least: int, remedy: str, most: int | None = None) -> Check:
    """A whole number from `least` on, up to `most` where that is given.

    >>> whole(1, "draft at least one token")("gamma", 2.5)
    Traceback (most recent call last):
    specflow.errors.DecodeError: gamma is not a whole number: received 2.5; draft at least one token.
    """

    def check(name: str, value: object) -> None:
        if not is_whole(value):
            happened = "not a whole number"
        elif value < least:
            happened = f"below {least}"
        elif most is not None and value > most:
            happened = f"above {most}"
        else:
            return
        raise DecodeError(name, f"{name} is {happened}", shown(value), remedy)

    return check


MOST: Final = 2**31 - 1
"""More tokens than any text has."""


def drafts(name: str, value: object) -> None:
    """How many tokens are drafted: a whole number from 1 to `MOST`."""
    whole(1, "draft at least one token")(name, value)
    whole(1, "give what a text has room for", MOST)(name, value)


def number(happened: str, remedy: str, holds: Callable[[float], bool] = isfinite) -> Check:
    """A number for which `holds` is true; `happened` says of any other value what it is not."""

    def check(name: str, value: object) -> None:
        try:
            # Most are floats, and to tell a number of any other kind takes ten times as long.
            good = type(value) is not bool and isinstance(value, (float, Real)) and holds(float(value))
        except OverflowError:  # an int beyond floats
            good = False
        if not good:
            raise DecodeError(name, happened, shown(value), remedy)

    return check


def temperature(name: str, value: object) -> None:
    """A temperature that logits can be divided by: from 1e-30 to 1e30. What is nearer to 0 is greedy."""
    remedy = "use GreedyProcessor() for a temperature of 0"
    number(f"{name} is not a positive number", remedy, lambda t: 0 < t < inf)(name, value)
    number(f"{name} is too near to 0", remedy, lambda t: t >= 1e-30)(name, value)
    number(f"{name} is beyond 1e30", "use a smaller one", lambda t: t <= 1e30)(name, value)


def calls(what: str, remedy: str) -> Check:
    """Something that can be called, such as "a drafter". A model or a list, transformers' too, is called otherwise."""

    def check(name: str, value: object) -> None:
        if not callable(value) or isinstance(value, type | list | Module):
            raise DecodeError(name, f"{name} cannot be called as {what} is", shown(value), remedy)

    return check


def does(what: str, remedy: str, *methods: str) -> Check:
    """Something that has these methods; bytes, which can `decode` and more, are nothing of the kind."""

    def check(name: str, value: object) -> None:
        can = all(callable(getattr(value, method, None)) for method in methods)
        if not can or isinstance(value, type | bytes | bytearray):
            raise DecodeError(name, f"{name} is not {what}", f"a {type(value).__name__}", remedy)

    return check


def flag(name: str, value: object) -> None:
    """True or False, numpy's too.

    >>> flag("debug", 1)
    Traceback (most recent call last):
    specflow.errors.DecodeError: debug is not a bool: received 1; say True or False.
    """
    if not isinstance(value, bool | numpy.bool_):
        raise DecodeError(name, f"{name} is not a bool", shown(value), "say True or False")


def a(kind: type, remedy: str) -> Check:
    """A value of this kind.

    >>> a(str, "give a text")("source", 3)
    Traceback (most recent call last):
    specflow.errors.DecodeError: source is not a str: received 3; give a text.
    """

    def check(name: str, value: object) -> None:
        if not isinstance(value, kind):
            raise DecodeError(name, f"{name} is not a {kind.__name__}", shown(value), remedy)

    return check


def each(check: Check) -> Check:
    """A tuple or a list whose every value passes the check."""

    def check_all(name: str, value: object) -> None:
        if not isinstance(value, tuple | list):
            raise DecodeError(name, f"{name} is not a tuple or a list", shown(value), "give several in a tuple")
        for one in value:
            check(name, one)

    return check_all


def or_none(check: Check) -> Check:
    """None, or what passes the check."""

    def check_some(name: str, value: object) -> None:
        if value is not None:
            check(name, value)

    return check_some


def are_facts(name: str, facts: object) -> None:
    """What a reader is told of a decode, by name: a mapping of texts to texts."""
    remedy = 'give some such as {"drafter": "suffix"}'
    a(Mapping, remedy)(name, facts)
    assert isinstance(facts, Mapping)
    for pair in facts.items():
        if not all(isinstance(text, str) for text in pair):
            raise DecodeError(name, "a fact is not a text", shown(pair), remedy)
