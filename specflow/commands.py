"""What commands share: the model that somebody names, and one sentence for whatever a model raises."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from torch.nn import Module

from specflow.accelerate import Given, bit_for_bit, fast
from specflow.errors import DecodeError, said, unwrap
from specflow.models import Loaded, load
from specflow.predictors import limits_of

ACCELERATE: Final[Mapping[str, Callable[[Module, Given], Module]]] = {
    "no": lambda model, given: model,
    "fast": fast,
    "bit-for-bit": bit_for_bit,
}
"""What `--accelerate` names: what becomes of the target before it decodes."""


@contextmanager
def one_sentence(parameter: str, happened: str, remedy: str) -> Iterator[None]:
    """What somebody else's program raises, which may be anything, as a `DecodeError`; those of ours as they are."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(parameter, happened, said(error), remedy) from error


def named_model(args: argparse.Namespace) -> Loaded:
    """The model of `--model` in `--dtype`. Stop tokens that the model can never say are told of."""
    loaded = unwrap(load(args.model, args.dtype))
    for token in sorted(loaded.never_said):
        happened = f"the stop token {token} is outside the model's vocabulary of {vocabulary_of(loaded)}"
        print(f"specflow: {happened}, and ends no text", file=sys.stderr)
    return loaded


def vocabulary_of(loaded: Loaded) -> int:
    """How many tokens a model knows; as many as its tokenizer where it does not tell."""
    return limits_of(loaded.model).vocab_size or len(loaded.tokenizer)
