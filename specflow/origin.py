"""What texts come of: the model that says them and the law they are drawn from, so that no file mixes two."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Final

import numpy
import torch
from torch import Tensor
from torch.nn import Module

from specflow.errors import DecodeError
from specflow.guards.checks import a, own, shown
from specflow.processors import LogitsProcessor

SEEN: Final = 1024
"""How many values of a tensor of weights are looked at, evenly spaced."""

LETTERS: Final = 16
"""How many of a digest's letters are kept."""


def short(content: bytes) -> str:
    """A name for a content.

    >>> short(b"Why is the sky blue?")
    '09ea26793343ba6c'
    """
    return sha256(content).hexdigest()[:LETTERS]


def weights_of(model: Module) -> str:
    """A name for what a model computes: by its modules, as they print, and the shape, dtype and values of its weights.

    Of a tensor `SEEN` values are looked at, so that it takes no time; of one that has none here, as where llama.cpp
    holds the weights, or that cannot be cut, shape and dtype alone. An accelerated model has another name than the
    given one, which says how it computes. Name a model before its weights are taken. `DecodeError` for what is no
    model.

    >>> linear = torch.nn.Linear(2, 2)
    >>> before = weights_of(linear)
    >>> _ = torch.nn.init.zeros_(linear.weight)
    >>> before.startswith("Linear "), weights_of(linear) == before
    (True, False)
    """
    a(Module, "give a model")("model", model)
    digest = sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}({module.extra_repr()})\n".encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):  # modules may keep other things there
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_some(tensor))
    return f"{type(model).__name__} {digest.hexdigest()[:LETTERS]}"


def _some(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    with suppress(RuntimeError, NotImplementedError):  # quantized tensors of other libraries
        values = tensor.flatten()
        return _bytes(values[:: max(1, len(values) // SEEN)])
    return b""


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().to("cpu", torch.float64).numpy().tobytes()


def law_of(processor: LogitsProcessor) -> str:
    """A name for a law: the processor's kind, and all that it holds.

    Tensors and arrays are named by their values, all else as it prints. What prints where it lies in memory, as
    functions do, has another name in each process, so that no file of it is gone on with: give it a `__repr__` that
    says what it is.

    >>> from specflow import MultinomialProcessor
    >>> law_of(MultinomialProcessor(0.8))
    'MultinomialProcessor(temperature=0.8)'
    """
    a(LogitsProcessor, "give one, such as GreedyProcessor()")("processor", processor)
    # What a class with slots holds is not in its `vars`.
    slots = [name for kind in type(processor).__mro__ for name in vars(kind).get("__slots__", ())]
    held = {name: getattr(processor, name, None) for name in slots if not name.startswith("__")} | vars(processor)
    return f"{type(processor).__qualname__}({', '.join([f'{name}={_told(held[name])}' for name in sorted(held)])})"


def _told(value: object) -> str:
    match own(value):
        case LogitsProcessor() as inner:
            return law_of(inner)
        case Tensor() | numpy.ndarray() as numbers:
            content = _bytes(numbers) if isinstance(numbers, Tensor) else numbers.tobytes()
            return f"{numbers.dtype} {list(numbers.shape)} {short(content)}"
        case tuple() | list() as several:
            return f"[{', '.join(map(_told, several))}]"
        case set() | frozenset() as several:
            return f"{{{', '.join(sorted(map(_told, several)))}}}"
        case dict() as pairs:
            return f"{{{', '.join([f'{_told(key)}: {_told(pairs[key])}' for key in pairs])}}}"
        case plain:
            return repr(plain)


def refuse_other(parameter: str, there: Mapping[str, str], now: Mapping[str, str], remedy: str) -> None:
    """`DecodeError` for the first thing that what is `there` does not come of as what comes `now` does.

    >>> refuse_other("out", {"dtype": "float32"}, {"dtype": "bfloat16"}, "name another file")
    Traceback (most recent call last):
    specflow.errors.DecodeError: what is there comes of another dtype: received 'bfloat16' and there 'float32'; name \
another file.
    """
    for name in (*now, *[name for name in there if name not in now]):
        if name not in there:
            raise DecodeError(parameter, f"what is there does not say its {name}", shown(now[name]), remedy)
        if there[name] != now.get(name):
            received = f"{shown(now.get(name))} and there {shown(there[name])}"
            raise DecodeError(parameter, f"what is there comes of another {name}", received, remedy)
