"""Which decoders can be measured: ours by name, transformers' beside them, and a user's own composed step."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Final, cast, final

from attrs import frozen
from returns.result import Failure, Result, Success
from torch.nn import Module
from transformers import PreTrainedModel

from specflow.bench import peers
from specflow.bench.context import Compose, Context, Prepare, composed
from specflow.drafters.llm import LLMDrafter
from specflow.drafters.lookup import PromptLookup
from specflow.drafters.suffix import SuffixDrafter
from specflow.errors import DecodeError
from specflow.gamma import Fixed
from specflow.predictor import CachedPredictor, fitted, limits_of
from specflow.state import Drafter, GammaPolicy, Step
from specflow.steps import autoregressive_step, speculative_step

PEERS: Final[Mapping[str, Callable[[int | None], Prepare]]] = {
    "generate": lambda gamma: peers.generate(),
    "hf-lookup": lambda gamma: peers.prompt_lookup(10 if gamma is None else gamma),
    "hf-lookup-3": lambda gamma: peers.prompt_lookup(10 if gamma is None else gamma, longest=3),
    "hf-assistant": peers.assistant,
}
"""transformers' decoders; `hf-lookup-3` matches up to 3 tokens where transformers' default is 2."""


def llm(context: Context) -> Drafter:
    """The assistant model as drafter."""
    assistant = context.assistant
    assert assistant is not None
    known, vocab_size = limits_of(assistant), limits_of(context.model).vocab_size
    predictor = CachedPredictor(assistant)
    return LLMDrafter(
        predictor if vocab_size is None else fitted(predictor, vocab_size),
        context.processor,
        context.rng,
        known.context,
        known.vocab_size,
    )


DRAFTERS: Final[Mapping[str, Callable[[Context], Drafter]]] = {
    "llm": llm,
    "lookup": lambda context: PromptLookup(),
    "suffix": lambda context: SuffixDrafter(),
}
"""Our drafters, each in a speculative step."""

_ASSISTED: Final = frozenset({"llm", "hf-assistant"})


@final
@frozen(eq=False)
class Decoder:
    """A decoder with its label and the name of the model that it decodes with."""

    label: str
    model: str
    prepare: Prepare


@final
@frozen(eq=False)
class Models:
    """The models to decode with: the one that was loaded, under "", and others made from it, by name."""

    targets: Mapping[str, Module]
    assistant: Module | None = None


def decoder(label: str, models: Models) -> Result[Decoder, DecodeError]:
    """The decoder named `[model/]name[@γ]` or `[model/]module:function`, or why it cannot run here.

    `autoregressive`; `generate`, `hf-lookup`, `hf-lookup-3`, `hf-assistant` of transformers; a drafter of ours such as
    `llm@5`. A function is a `Compose`: it takes a `Context` and gives a `Step`.
    """
    variant, _, name = label.rpartition("/")
    if variant not in models.targets:
        known = ", ".join(filter(None, models.targets)) or "none"
        return Failure(DecodeError("decoders", "no such model was made", label, f"declared models: {known}"))
    return _prepare(name, models.targets[variant], models.assistant).map(
        lambda prepare: Decoder(label, variant, prepare)
    )


def _prepare(name: str, model: Module, assistant: Module | None) -> Result[Prepare, DecodeError]:
    if ":" in name:
        return imported(name).map(lambda function: composed(cast(Compose, function)))
    parts = re.fullmatch(r"(?P<base>[a-z0-9-]+)(@(?P<gamma>[1-9]\d*))?", name)
    base, gamma = (parts["base"], parts["gamma"]) if parts else (name, None)
    refusal = _refusal(base, model, assistant)
    if refusal is not None:
        return Failure(refusal)
    if base in PEERS:
        return Success(PEERS[base](None if gamma is None else int(gamma)))
    if base in DRAFTERS:
        return Success(composed(_speculative(DRAFTERS[base], Fixed() if gamma is None else Fixed(int(gamma)))))
    return Success(composed(_autoregressive))


def _refusal(base: str, model: Module, assistant: Module | None) -> DecodeError | None:
    known = ("autoregressive", *DRAFTERS, *PEERS)
    if base not in known:
        return DecodeError("decoders", "no decoder has this name", base, f"use {', '.join(known)}, or module:function")
    if base in _ASSISTED and assistant is None:
        return DecodeError("decoders", "there is no assistant model", base, "name one with --assistant")
    if base in PEERS and not isinstance(model, PreTrainedModel):
        remedy = "leave the model's name out"
        return DecodeError("decoders", "transformers decodes with its own models only", type(model).__name__, remedy)
    return None


def _autoregressive(context: Context) -> Step:
    return autoregressive_step(context.target, context.processor, context.rng)


def _speculative(draft: Callable[[Context], Drafter], policy: GammaPolicy) -> Compose:
    def compose(context: Context) -> Step:
        drafter = context.timed(draft(context))
        return speculative_step(
            drafter, context.target, context.processor, context.rng, policy, prune=(context.target,)
        )

    return compose


def imported(path: str) -> Result[Callable[..., object], DecodeError]:
    """The function at `module:function`, looked for in the working directory too."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        remedy = "give module:function, importable from here"
        return Failure(DecodeError("decoders", f"it cannot be imported ({error})", path, remedy))
    return Success(function)
