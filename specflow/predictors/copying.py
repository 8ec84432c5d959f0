"""A model beside another, over the same weights."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import TypeVar

from torch.nn import Module

from specflow.errors import DecodeError

M = TypeVar("M", bound=Module)


def copy_sharing_weights(model: M) -> M:
    """The model with all its state, its parameters shared. `DecodeError` where it cannot be copied.

    >>> from torch.nn import Linear
    >>> model = Linear(2, 2)
    >>> copy = copy_sharing_weights(model)
    >>> copy is model, copy.weight is model.weight
    (False, True)
    """
    known: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():  # each has a dozen that hold no hook: to copy those takes most of the time
        known |= {id(each): type(each)() for each in vars(module).values() if type(each) is OrderedDict and not each}
    try:
        return deepcopy(model, known)
    except Exception as error:  # of a part that we do not know, anything
        remedy = "take out of it what copy.deepcopy refuses"
        raise DecodeError("model", "the model cannot be copied", f"{type(error).__name__}: {error}", remedy) from error
