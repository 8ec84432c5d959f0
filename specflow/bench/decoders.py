"""Which decoders can be measured: ours by name, transformers' beside them, and a user's own composed step."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from typing import Final, cast, final
from weakref import WeakKeyDictionary

from attrs import evolve, frozen
from returns.result import safe
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specflow.batch import BatchPredictor
from specflow.bench import llama_cpp, peers
from specflow.bench.context import Compose, Context, Prepare, composed
from specflow.bench.engines import Engine, Gguf, Torch
from specflow.catalogue import (
    DRAFTERS,
    POLICIES,
    RULES,
    USUAL_MOST,
    USUAL_POLICY,
    Entry,
    Make,
    Policy,
    Setting,
    step_of,
)
from specflow.drafters import Bigrams
from specflow.errors import DecodeError, said
from specflow.heads import Head, HeadPredictor
from specflow.interop.llama_cpp import LlamaCpp
from specflow.models import bigrams_of
from specflow.policies import CostMeter
from specflow.predictors import limits_of
from specflow.randomness import Randomness
from specflow.state import GammaPolicy, Rule, Step
from specflow.steps import autoregressive_step
from specflow.vocabulary import SharedTokens

TRANSFORMERS: Final[Mapping[str, Callable[[int | None], Prepare]]] = {
    "generate": lambda gamma: peers.generate(),
    "hf-lookup": lambda gamma: peers.generate(prompt_lookup_num_tokens=gamma or 10),
    "hf-lookup-3": lambda gamma: peers.generate(prompt_lookup_num_tokens=gamma or 10, max_matching_ngram_size=3),
    "hf-assistant": peers.assistant,
}
"""transformers' decoders; `hf-lookup-3` matches up to 3 tokens where transformers' default is 2."""

LLAMA_CPP: Final[Mapping[str, Callable[[int | None], Prepare]]] = {
    "llama.cpp": llama_cpp.alone,
    "llama.cpp-lookup": llama_cpp.lookup,
}
"""llama.cpp's."""

PEERS: Final = {**TRANSFORMERS, **LLAMA_CPP}

_BIGRAMS: Final[WeakKeyDictionary[Module, Bigrams]] = WeakKeyDictionary()


def _bigrams(context: Context) -> Bigrams:
    """The model's own bigrams, for which it is asked once."""
    if context.model not in _BIGRAMS:
        _BIGRAMS[context.model] = bigrams_of(context.model, context.tokenizer)
    return _BIGRAMS[context.model]


def _drafted(
    entry: Entry,
    policy: Policy,
    most: int,
    rule: Callable[[Randomness], Rule],
    head: Head | None,
) -> Compose:
    """One of our drafters in a step. What it and its policy remember is kept from text to text of a repeat, where one
    comes after the other; a policy that learns is taught by one text at a time."""

    @cache
    def series(repeat: int) -> tuple[Make, Callable[[float, CostMeter], GammaPolicy]]:
        return entry.make(), cache(partial(policy, most))

    def compose(context: Context) -> Step:
        target, processor, rng = context.target, context.processor, context.rng
        vocab_size = limits_of(context.model).vocab_size or len(context.tokenizer)
        bigrams, asked = partial(_bigrams, context), (context.model, vocab_size, context.prompt, processor, rng)
        drafts = (
            None if head is None or not entry.headed or isinstance(target, LlamaCpp) else HeadPredictor(head, target)
        )
        setting = Setting(*asked, context.assistant, bigrams, context.reading, context.shared, drafts)
        make, kept = series(context.repeat)
        drafting = make(setting)
        timed = evolve(drafting, drafter=context.timed(drafting.drafter))
        several = isinstance(target, BatchPredictor) or (isinstance(target, LlamaCpp) and target.slots > 1)
        paced = partial(policy, most) if several else kept
        return step_of(timed, paced(processor.temperature, target.meter), target, processor, rng, rule(rng), (target,))

    return compose


NAMES: Final = ("autoregressive", *DRAFTERS, *PEERS)
"""The decoders that have a name."""

_ASSISTED: Final = frozenset({"hf-assistant", *[name for name, entry in DRAFTERS.items() if entry.assisted]})

_LABEL: Final = re.compile(
    rf"(?P<base>[a-z0-9.+-]+)"
    rf"(@((?P<gamma>[1-9]\d{{0,17}})|(?P<policy>{'|'.join(POLICIES)})))?"
    rf"(@(?P<rule>{'|'.join(RULES)}))?"
)


@final
@frozen(eq=False)
class Decoder:
    """A decoder with its label and the name of the model that it decodes with.

    `features` are the hidden states that the target has to show it.
    """

    label: str
    model: str
    prepare: Prepare
    features: tuple[int, ...] | None = None


@final
@frozen(eq=False)
class Models:
    """The models to decode with: the one that was loaded, under "", and others made from it, by name.

    `assistant` and `head` draft for them. `shared` is what the assistant's vocabulary has in common with theirs, None
    where it is the same, and `assistant_tokenizer` its own. `gguf` runs the file of the one that was loaded, where that
    is what decodes; torch runs all others.
    """

    targets: Mapping[str, Module]
    assistant: Module | None = None
    shared: SharedTokens | None = None
    head: Head | None = None
    assistant_tokenizer: PreTrainedTokenizerBase | None = None
    gguf: Gguf | None = None

    def engine(self, name: str) -> Engine:
        """What runs a target."""
        return Torch(self.targets[name]) if self.gguf is None or name else self.gguf


@safe(exceptions=(DecodeError,))
def decoder(label: str, models: Models) -> Decoder:
    """The decoder named `[model/]name[@γ][@rule]` or `[model/]module:function`, or why it cannot run here.

    `autoregressive`; a drafter of ours (`specflow.catalogue`): `suffix`, which drafts as many tokens as pay,
    `suffix@10`, or under another policy `suffix@svip`, both up to 16, and judged by another rule than `reject`,
    `llm@5@block`; `generate`, `hf-lookup@10`, `hf-lookup-3@10`, `hf-assistant` of transformers; `llama.cpp` and
    `llama.cpp-lookup@10` of llama.cpp. A function is a `Compose`: it takes a `Context` and gives a `Step`. What a
    policy learns and what `memory` remembers is kept from text to text of a repeat, what `tree` asked the target for
    all of them.
    """
    variant, _, name = label.rpartition("/")
    if variant not in models.targets:
        known = ", ".join(filter(None, models.targets)) or "none"
        raise DecodeError("decoders", "no such model was made", label, f"declared models: {known}")
    prepare, head = _prepare(name, variant, models), models.head
    return Decoder(label, variant, prepare, head.reads if head is not None and _is_headed(name) else None)


def _is_headed(name: str) -> bool:
    """Whether it is a head that drafts."""
    base = name.partition("@")[0]
    return base in DRAFTERS and DRAFTERS[base].headed


@final
@frozen
class Parts:
    """What a name says: whose decoder it is, γ, and the names of a policy and a rule; None where it does not say."""

    base: str
    gamma: int | None
    policy: str | None
    rule: str | None

    @classmethod
    def of(cls, name: str) -> Parts:
        """The parts of `name[@γ or policy][@rule]`. `DecodeError` for what is no decoder's name."""
        found = _LABEL.fullmatch(name)
        base, gamma, policy, rule = found.group("base", "gamma", "policy", "rule") if found else (name, *[None] * 3)
        if base not in NAMES or ((policy or rule) and base not in DRAFTERS):
            remedy = f"use {', '.join(NAMES)}, or module:function"
            raise DecodeError("decoders", "no decoder has this name", name, remedy)
        return cls(base, None if gamma is None else int(gamma), policy, rule)

    @property
    def paced(self) -> tuple[Policy, int]:
        """The policy of a drafter of the catalogue, and the most tokens that it drafts."""
        return POLICIES["fixed" if self.gamma else self.policy or USUAL_POLICY], self.gamma or USUAL_MOST


def _prepare(name: str, variant: str, models: Models) -> Prepare:
    model, head = models.targets[variant], models.head
    if ":" in name:
        return composed(cast(Compose, imported(name)))
    parts = Parts.of(name)
    base = parts.base
    if base in _ASSISTED and models.assistant is None:
        raise DecodeError("decoders", "there is no draft model", base, "name one with --draft-model")
    if head is None and _is_headed(name):
        raise DecodeError("decoders", "there is no head", base, "name one with --head")
    is_gguf = isinstance(models.engine(variant), Gguf)
    if is_gguf and _is_headed(name):
        raise DecodeError("decoders", "llama.cpp shows nothing that a head could read", base, "leave it out")
    if base in LLAMA_CPP and not is_gguf:
        happened, remedy = "llama.cpp decodes its own targets only", "use --engine llama.cpp, and no model's name"
        raise DecodeError("decoders", happened, base, remedy)
    if base in TRANSFORMERS and (is_gguf or not isinstance(model, PreTrainedModel)):
        happened, kind = "transformers decodes with its own models only", type(model).__name__
        raise DecodeError("decoders", happened, "llama.cpp" if is_gguf else kind, "leave the model's name out")
    if base in PEERS:
        return PEERS[base](parts.gamma)
    if base in DRAFTERS:
        entry = DRAFTERS[base]
        return composed(_drafted(entry, *parts.paced, RULES[parts.rule or "reject"], head))
    return composed(lambda context: autoregressive_step(context.target, context.processor, context.rng))


def imported(path: str) -> Callable[..., object]:
    """The function at `module:function`, looked for in the working directory too; `DecodeError` where there is none."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function: object = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # a module may do anything while it is imported
        remedy = "give module:function, importable from here"
        raise DecodeError("decoders", f"it cannot be imported ({said(error)})", path, remedy) from error
    if not callable(function):
        raise DecodeError("decoders", "it is no function", path, "give module:function")
    return function
