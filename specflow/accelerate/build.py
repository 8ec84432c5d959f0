"""Accelerated models: how they are made, and what happens where they cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from enum import Enum
from functools import partial
from itertools import pairwise
from operator import is_
from typing import Final, cast, final
from warnings import warn
from weakref import ref

import torch
from torch.nn import Module, Parameter
from torch.nn.modules import module as everywhere
from transformers import PreTrainedModel

from specflow.accelerate.any_model import Replaced, with_linears
from specflow.accelerate.captured import Captured, CudaGraphs
from specflow.accelerate.check import arbitrary_text, check
from specflow.accelerate.family import MODELS, strangeness, weights_of
from specflow.accelerate.linear import (
    MakeLinear,
    Plain,
    computing,
    fast_linear,
    has_layers,
    int4_linear,
    int8_linear,
    steady_linear,
)
from specflow.accelerate.llama import Llama, Shapes
from specflow.caches import BLOCK
from specflow.errors import DecodeError
from specflow.guards.checks import a
from specflow.paths import last_rows
from specflow.predictors import CachedPredictor, UncachedPredictor, limits_of
from specflow.predictors.autocast import uncast
from specflow.predictors.copying import copy_sharing_weights
from specflow.predictors.reader import vocabulary_of
from specflow.predictors.trial import error_of

FREE: Final = Shapes(rows=1, keys=1)
"""Nothing is padded: the last bits of what a pass computes depend on how many tokens it reads."""

DEVICE: Final = Shapes(rows=1, keys=1, tokens=2048)
"""The same for a device, which reads all weights again for each piece of a prompt. Not yet measured on one."""

FIXED: Final = Shapes(rows=8, keys=BLOCK)
"""Padding with which torch's attention adds alike for one token and for many."""

TOLERANCES: Final = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
"""How far the logits of an accelerated model may be from the given one's, relative to the largest.

In half precision only gross faults can be told from rounding."""

LOSSY: Final = dict.fromkeys(TOLERANCES, 0.25)
"""The same for a model in lower precision: enough to tell a coarse copy from a wrong one."""

LOSSIEST: Final = dict.fromkeys(TOLERANCES, 1.0)
"""The same for weights of 4 bits, with which tiny random models are off by two thirds of the largest logit."""


class Given(Enum):
    """What becomes of the model that is given."""

    KEPT = "it stays as it is; its weights are then in memory twice"
    TAKEN = "once copied, its weights are freed, and calling it is refused"


@final
class NotAccelerated(UserWarning):
    """The note that a model is returned as it was given, and why."""


def fast(model: Module, given: Given = Given.KEPT) -> Module:
    """A model that computes what `model` computes, in less time.

    It is called as `model` is, wherever specflow takes a model. The llama family (`family.MODELS`) gets a forward pass
    of its own, which keeps each text in a `KVCache`; on CUDA its short passes are captured as graphs (`Captured`; not
    yet measured). Other models get faster linear layers, on a CPU.

    Logits differ by rounding (docs/acceleration.md has the numbers). It is a copy of `model` as it is now, in
    evaluation mode; a llama computes in its own dtype, under `torch.autocast` too. Where the weights of `model` are
    updated, replaced, moved or converted afterwards, the next call is a `DecodeError`.

    Made once and compared with `model` on a text that goes past its windows. Where that fails or differs, or on another
    device, the answer is `model` itself, untouched, and a `NotAccelerated` warning that says why: nothing is left to
    fail in a decode. `DecodeError` for what is no model.
    """
    _checked(model, given)
    device = "cuda" if _devices(model) == ["cuda"] else "cpu"
    made = _made(model, lambda: _fast(model, given), TOLERANCES, device)
    return _settled(model, made, given) if isinstance(made, Module) else _as_given(model, made, 3)


def bit_for_bit(model: Module, given: Given = Given.KEPT) -> Module:
    """A model of the llama family whose logits are equal bit for bit however a text is cut into passes.

    A pass over k tokens, k passes over one, and passes after a rollback give the same bits, in fp32, bf16 and fp16,
    the prompt included, as long as `torch.get_num_threads()` stays. So greedy speculation with any drafter is greedy
    decoding token for token, in bf16 too, and so is sampling by seed. A little slower than `fast`.

    `DecodeError` for models outside the family, for other dtypes and devices, and where a short `check` finds a
    difference on this machine: nothing is returned that does not keep the promise. A copy, as `fast` makes.
    """
    _checked(model, given)
    made = _made(model, lambda: _steady(model), TOLERANCES)
    if isinstance(made, str):
        remedy = "use accelerate.fast, in fp32 where texts must be equal"
        raise DecodeError("model", "passes over the model cannot be made equal bit for bit", made, remedy)
    return _settled(model, made, given)


def lossy_bf16(model: Module) -> Module:
    """A `fast` copy of `model` in bf16, to draft for `model`. Its law is not the model's: no target.

    It stays what it is, whatever becomes of `model`: its drafts are then rejected more often.
    """
    return _lossy(model, fast_linear, LOSSY)


def lossy_int8(model: Module) -> Module:
    """`lossy_bf16` with linear weights of 8 bits: faster still, and further from the model's law."""
    return _lossy(model, int8_linear, LOSSY)


def lossy_int4(model: Module) -> Module:
    """`lossy_bf16` with linear weights of 4 bits: half of what `lossy_int8` reads, and the furthest from the law."""
    return _lossy(model, int4_linear, LOSSIEST)


def _fast(model: Module, given: Given) -> Module | str:
    dtype, strange = _dtype(model), strangeness(model)
    if _devices(model) == ["cuda"]:
        if strange is not None:
            return f"on CUDA only the llama family is accelerated ({strange})"
        place = next(model.parameters()).device
        return Captured(_llama(model, dtype, dtype, Plain, DEVICE), partial(CudaGraphs, place))
    if strange is None:
        return _llama(model, dtype, computing(dtype), fast_linear, FREE)
    if not has_layers(dtype):
        return f"there are no faster linear layers in {dtype} here"
    made = with_linears(model, fast_linear)
    if given is Given.TAKEN:
        for module in made.modules():
            if isinstance(module, Replaced):
                module.weight = None
    return made


def _steady(model: Module) -> Module | str:
    dtype, strange = _dtype(model), strangeness(model)
    if strange is not None or not has_layers(dtype):
        return strange or f"there are no such layers in {dtype} here"
    made = _llama(model, dtype, computing(dtype), steady_linear, FIXED)
    report = check(made, lengths=(min(40, (limits_of(model).context or 48) - 8),), passes=(2, 3, 8))
    return made if report.equal else str(report)


def _lossy(model: Module, make: MakeLinear, tolerances: Mapping[torch.dtype, float]) -> Module:
    _checked(model, Given.KEPT)
    made = _made(model, lambda: _in_bf16(model, make), tolerances)
    return made if isinstance(made, Module) else _as_given(model, made, 4)


def _in_bf16(model: Module, make: MakeLinear) -> Module:
    if strangeness(model) is None:
        return _llama(model, torch.bfloat16, computing(torch.bfloat16), make, FREE)
    return with_linears(deepcopy(model).to(torch.bfloat16), make)


def _llama(model: Module, rounded: torch.dtype, computed: torch.dtype, make: MakeLinear, shapes: Shapes) -> Llama:
    return Llama(cast(PreTrainedModel, model).config, weights_of(model, rounded, computed, make), shapes)


def _made(
    model: Module, make: Callable[[], Module | str], tolerances: Mapping[torch.dtype, float], device: str = "cpu"
) -> Module | str:
    """What `make` makes, if it computes what the model does; else why there is nothing."""
    reason = _beyond_reach(model, device)
    if reason is not None:
        return reason
    try:
        with uncast(device):  # of which an accelerated model makes nothing
            made = make()
            return made if isinstance(made, str) else _disagreement(model, made, tolerances) or made
    except DecodeError as error:
        return str(error).removesuffix(".")
    except Exception as error:  # of a model we do not know, anything; the given one still works
        return f"{type(error).__name__}: {error}"


def _as_given(model: Module, reason: str, stacklevel: int) -> Module:
    """The model, once a warning says why it is no other. `stacklevel` is how far up the user's call is."""
    warn(NotAccelerated(f"{type(model).__name__} is not accelerated: {reason}"), stacklevel=stacklevel)
    return model


def _beyond_reach(model: Module, device: str) -> str | None:
    """Why nothing can be made of the model on this device, whatever it is."""
    if any(isinstance(module, Llama | Replaced) for module in model.modules()):
        return "it is accelerated already"
    devices = _devices(model)
    if devices != [device]:
        return f"its weights are on {', '.join(devices) or 'no device'}, not on the {device.upper()}"
    if _dtype(model) not in TOLERANCES:
        return f"its weights are in {_dtype(model)}"
    if any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    ) or (everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks):
        return "it has hooks, which see or change what its layers do"
    return None


def _devices(model: Module) -> list[str]:
    return sorted({parameter.device.type for parameter in model.parameters()})


def _dtype(model: Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _disagreement(model: Module, made: Module, tolerances: Mapping[torch.dtype, float]) -> str | None:
    """How the logits of the two differ on a short text, read in passes of several lengths; None if they do not.

    It goes past the model's windows, where they are short. The given model is read afresh, and by a copy, as it may
    keep something from what it reads.
    """
    limits, windows = limits_of(model), []
    if strangeness(model) is None:
        windows = MODELS[type(model).__name__](cast(PreTrainedModel, model).config)
    further = [window + 16 for window in windows if window is not None and window <= BLOCK]
    length = min(max([24, *further]), limits.context or sys.maxsize)
    text = arbitrary_text(length, vocabulary_of(model))
    cuts = sorted({cut for cut in (length // 2, length - 4, length - 1, length) if cut > 0})
    given = copy_sharing_weights(model)
    expected, predict = last_rows(UncachedPredictor(given), text, length).double(), CachedPredictor(made)
    got = torch.cat([last_rows(predict, text[:end], end - start) for start, end in pairwise((0, *cuts))]).double()
    off = error_of(got, expected)
    return None if off <= tolerances[_dtype(model)] else f"its logits would differ by {off:.2g} of the largest"


def _settled(model: Module, made: Module, given: Given) -> Module:
    """What was made, once the given model is what was agreed."""
    if given is Given.KEPT:
        made.register_forward_pre_hook(_refusing_changes_of(model))
        return made
    for module in model.modules():
        for name in module._parameters:
            module._parameters[name] = Parameter(torch.empty(0), requires_grad=False)
    vars(model)["forward"] = _taken
    return made


def _refusing_changes_of(model: Module) -> Callable[[Module, object], None]:
    """A hook that raises `DecodeError` where the weights of a model, which is not kept alive, are not what they were.

    It tells by their versions, which everything counts but writing through `.data`, by where they lie, and, while the
    model lives, by whether its modules do and hold the same ones. A module that was taken out of it and is kept, as an
    adapter keeps what it wraps, is as good as there. Those made in inference mode have no versions; what is gone with
    the model has not changed.
    """
    whole, modules = ref(model), [module for module in model.modules() if module._parameters]
    places, held = [*map(ref, modules)], [*map(ref, _held_by(modules))]
    weights = [(ref(each), each._version, each.data_ptr()) for each in model.parameters() if not each.is_inference()]

    def refuse(module: Module, arguments: object, /) -> None:
        given, received = whole(), None
        if given is not None:
            living = [owner for place in places if (owner := place()) is not None]
            now = _held_by(living)
            if len(living) < len(places):
                received = "other modules"
            elif len(now) != len(held) or not all(map(is_, now, [weight() for weight in held])):
                received = "other tensors"
        for weight, version, place in weights:
            each = weight()
            if each is not None and (each._version != version or each.data_ptr() != place):
                received = f"weights of shape {list(each.shape)}"
        if received is not None:
            happened = "the given model's weights have changed since it was accelerated"
            raise DecodeError("model", happened, received, "accelerate it again")

    return refuse


def _held_by(modules: Sequence[Module]) -> list[Parameter]:
    return [weight for module in modules for weight in module._parameters.values() if weight is not None]


def _checked(model: object, given: object) -> None:
    a(Module, "give a model, such as AutoModelForCausalLM loads")("model", model)
    a(Given, "give Given.KEPT or Given.TAKEN")("given", given)


def _taken(*arguments: object, **named: object) -> object:
    raise DecodeError("model", "its weights were taken over", "a call of the given model", "call the accelerated one")
