"""Which decoders can be measured: ours by name, transformers' beside them, and a user's own composed step."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Final, TypeAlias, cast, final
from weakref import WeakKeyDictionary

from attrs import frozen
from returns.result import Failure, Result, Success
from torch.nn import Module
from transformers import PreTrainedModel

from specflow.bench import peers
from specflow.bench.context import Compose, Context, Prepare, composed
from specflow.bench.stopwatch import clock_for
from specflow.drafters import (
    Bigrams,
    LLMDrafter,
    LookupTree,
    NGramDrafter,
    NGramStorage,
    PromptLookup,
    SuffixDrafter,
    at_most,
    first_of,
    longest,
)
from specflow.errors import DecodeError
from specflow.models import bigrams_of, said
from specflow.policies import CostAware, CostMeter, Fixed
from specflow.predictors import CachedPredictor, limits_of
from specflow.stages import UpdateNgram
from specflow.state import Drafter, GammaPolicy, Predictor, Step
from specflow.steps import autoregressive_step, ngram_step, speculative_step
from specflow.vocabulary import fitted

Composer: TypeAlias = Callable[[Context, Predictor, GammaPolicy], Step]
"""A decoder that leaves open how many tokens it drafts, and through which predictor it reads the target."""

PEERS: Final[Mapping[str, Callable[[int | None], Prepare]]] = {
    "generate": lambda gamma: peers.generate(),
    "hf-lookup": lambda gamma: peers.prompt_lookup(10 if gamma is None else gamma),
    "hf-lookup-3": lambda gamma: peers.prompt_lookup(10 if gamma is None else gamma, longest=3),
    "hf-assistant": peers.assistant,
}
"""transformers' decoders; `hf-lookup-3` matches up to 3 tokens where transformers' default is 2."""


def _with(draft: Callable[[Context], Drafter]) -> Composer:
    def compose(context: Context, target: Predictor, gamma: GammaPolicy) -> Step:
        drafter = context.timed(draft(context))
        return speculative_step(drafter, target, context.processor, context.rng, gamma, prune=(context.target,))

    return compose


def _model(context: Context) -> Drafter:
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


def _storage(context: Context) -> NGramStorage:
    return NGramStorage(4, limits_of(context.model).vocab_size or len(context.tokenizer))


def _with_ngrams(context: Context, target: Predictor, gamma: GammaPolicy) -> Step:
    storage = _storage(context)
    storage.initialize(context.prompt)
    drafter, update = context.timed(NGramDrafter(storage)), UpdateNgram(storage)
    return ngram_step(drafter, target, context.processor, context.rng, update, gamma, prune=(context.target,))


def _with_memory() -> Composer:
    """The text's own repetitions first, then what all texts so far have said, that of the warm-up included."""
    kept: list[NGramStorage] = []

    def compose(context: Context, target: Predictor, gamma: GammaPolicy) -> Step:
        if not kept:
            kept.append(_storage(context))
        (storage,) = kept
        drafter = context.timed(first_of(SuffixDrafter(), at_most(5, NGramDrafter(storage, source="memory"))))
        update = UpdateNgram(storage, filler_top_k=1)
        return ngram_step(drafter, target, context.processor, context.rng, update, gamma, prune=(context.target,))

    return compose


_BIGRAMS: Final[WeakKeyDictionary[Module, Bigrams]] = WeakKeyDictionary()


def _bigrams(context: Context) -> Bigrams:
    """The model's own bigrams, for which it is asked once."""
    if context.model not in _BIGRAMS:
        _BIGRAMS[context.model] = bigrams_of(context.model, context.tokenizer)
    return _BIGRAMS[context.model]


def _with_tree(context: Context, target: Predictor, gamma: GammaPolicy) -> Step:
    """Trees of what the text repeats and of the target's own bigrams."""
    drafter = context.timed(LookupTree(_bigrams(context)))
    return speculative_step(drafter, target, context.processor, context.rng, gamma, prune=(context.target,))


Make: TypeAlias = Callable[[str | None, Module], Compose]
"""(a gamma: a number, "cost", or None for the usual; the model) → a decoder. One serves all texts."""


def _drafted_by(make: Callable[[], Composer], usual: int) -> Make:
    def of(gamma: str | None, model: Module) -> Compose:
        composer, meter = make(), CostMeter(clock_for(model))
        if gamma == "cost":
            cost_aware = CostAware(meter)
            return lambda context: composer(context, meter.timed(context.target), cost_aware)
        fixed = Fixed(int(gamma or usual))
        return lambda context: composer(context, context.target, fixed)

    return of


DRAFTERS: Final[Mapping[str, Make]] = {
    "llm": _drafted_by(lambda: _with(_model), 5),
    "suffix": _drafted_by(lambda: _with(lambda context: SuffixDrafter()), 20),
    "lookup": _drafted_by(lambda: _with(lambda context: PromptLookup()), 10),
    "suffix+lookup": _drafted_by(lambda: _with(lambda context: longest(SuffixDrafter(), PromptLookup())), 20),
    "ngram": _drafted_by(lambda: _with_ngrams, 5),
    "memory": _drafted_by(_with_memory, 20),
    "tree": _drafted_by(lambda: _with_tree, 8),
}
"""Our drafters, each in a step."""

NAMES: Final = ("autoregressive", *DRAFTERS, *PEERS)
"""The decoders that have a name."""

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

    `autoregressive`; a drafter of ours: `suffix`, `suffix@10`, or `suffix@cost`, which is `CostAware`, and likewise
    `lookup`, `suffix+lookup` (the longer draft), `ngram`, `memory`, `llm`, and `tree` with γ nodes; `generate`,
    `hf-lookup@10`, `hf-lookup-3@10`, `hf-assistant` of transformers. A function is a `Compose`: it takes a `Context`
    and gives a `Step`. What a cost-aware γ learns, what `memory` remembers, and what `tree` asked the target, is kept
    from text to text.
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
    parts = re.fullmatch(r"(?P<base>[a-z0-9+-]+)(@(?P<gamma>[1-9]\d{0,17}|cost))?", name)
    base, gamma = (parts["base"], parts["gamma"]) if parts else (name, None)
    refusal = _refusal(base, gamma, model, assistant)
    if refusal is not None:
        return Failure(refusal)
    if base in PEERS:
        return Success(PEERS[base](None if gamma is None else int(gamma)))
    if base in DRAFTERS:
        return Success(composed(DRAFTERS[base](gamma, model)))
    return Success(composed(_autoregressive))


def _refusal(base: str, gamma: str | None, model: Module, assistant: Module | None) -> DecodeError | None:
    if base not in NAMES or (gamma == "cost" and base not in DRAFTERS):
        name = base if gamma is None else f"{base}@{gamma}"
        remedy = f"use {', '.join(NAMES)}, or module:function"
        return DecodeError("decoders", "no decoder has this name", name, remedy)
    if base in _ASSISTED and assistant is None:
        return DecodeError("decoders", "there is no assistant model", base, "name one with --assistant")
    if base in PEERS and not isinstance(model, PreTrainedModel):
        remedy = "leave the model's name out"
        return DecodeError("decoders", "transformers decodes with its own models only", type(model).__name__, remedy)
    return None


def _autoregressive(context: Context) -> Step:
    return autoregressive_step(context.target, context.processor, context.rng)


def imported(path: str) -> Result[Callable[..., object], DecodeError]:
    """The function at `module:function`, looked for in the working directory too."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # a module may do anything while it is imported
        remedy = "give module:function, importable from here"
        return Failure(DecodeError("decoders", f"it cannot be imported ({said(error)})", path, remedy))
    if not callable(function):
        return Failure(DecodeError("decoders", "it is no function", path, "give module:function"))
    return Success(function)
