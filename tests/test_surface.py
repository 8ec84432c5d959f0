"""Every public function is given wrong types and values, one argument at a time: `DecodeError`, or it simply works.

`TABLE` has an entry for whatever the packages and modules in `PLACES` export, and for the public methods of its
classes: how it is called rightly, and what is done with the result, so that a wrong value which is only met later
counts too. Each argument in turn is replaced by each of the `HOSTILE` values, and what comes must be a `DecodeError`,
as an exception or as a `Failure`, or nothing: the value meant something (`True` is an int, one tensor of ids is ids).
What is no parameter's fault, such as what a function of the caller's own raises, is not tried; what it *returns* is:
the last of the hostile values answer any call and any method with nonsense, so they are drafters, predictors,
processors, randomness, policies, observers and conditions that return it.

Records are tried where their maker may be the caller: a state where a decode begins, a proposal and a node where a
drafter says it, a law where a processor makes it. They may be built of anything; using them has to be refused. Records
that pass from stage to stage are made by stages, and stages and policies are called by steps: those are in `EXEMPT`,
with all else that nobody calls.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache, partial
from importlib import import_module
from io import StringIO
from itertools import islice
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from types import FrameType, ModuleType
from typing import Any, Final, TypeAlias, final

import numpy
import pytest
import torch
from attrs import evolve, frozen
from returns.result import Failure, Success
from rich.console import Console
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
)

import specflow as s
import specflow.interop.processors as interop_processors
from specflow import accelerate, beam, distribution, interop, kv_cache, models, processors, stages, testing
from specflow.stages import block, stop, typical, verify

PLACES: Final = (
    "",
    "stages",
    "drafters",
    "interop",
    "accelerate",
    "testing",
    "beam",
    "distribution",
    "kv_cache",
    "models",
    "processors",
    "trees",
    "sampling",
    "ngram_assisted",
    "utils.caching",
    "utils.logits_processor",
)
"""The packages and modules whose names are public."""

SECONDS: Final = 3.0
"""How much of the processor one call may take; one that hangs fails."""


# What is public.


def names_of(module: ModuleType) -> Iterator[object]:
    """What a package exports, or what a module defines."""
    is_package = hasattr(module, "__path__")
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None)
        if name.startswith("_") or not callable(value) or not isinstance(home, str):
            continue
        if home.startswith("specflow") and (is_package or home == module.__name__ or ".utils" in module.__name__):
            yield value


def methods_of(kind: type) -> Iterator[tuple[str, object]]:
    """The public methods of a class, `__call__` among them, by the name of the class that defines them."""
    for home in kind.__mro__:
        for name, value in vars(home).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            is_public = not name.startswith("_") or name == "__call__"
            if home.__module__.startswith("specflow") and inspect.isfunction(function) and is_public:
                yield f"{home.__module__}.{home.__qualname__}.{name}".removeprefix("specflow."), function


def public() -> dict[str, object]:
    """Whatever users can call, by its name behind `specflow.`."""
    found: dict[str, object] = {}
    for place in PLACES:
        for value in names_of(import_module(f"specflow.{place}".rstrip("."))):
            if not isinstance(value, type | type(public)):
                continue
            key = f"{value.__module__}.{value.__qualname__}".removeprefix("specflow.")
            found[key] = value
            if isinstance(value, type) and key not in EXEMPT:
                found.update(methods_of(value))
    return found


# Small worlds.

FOLDER: Final = Path(mkdtemp())
atexit.register(rmtree, FOLDER, ignore_errors=True)

V: Final = 5
TEXT: Final = (1, 2, 1)


@cache
def llama(seed: int = 0, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


class Words:
    """A tokenizer of nine lines."""

    chat_template = None
    eos_token_id = 2

    def __call__(self, text: str) -> Words:
        self.input_ids = [ord(character) % 16 for character in text]
        return self

    def __len__(self) -> int:
        return 16

    def decode(self, token_ids: list[int]) -> str:
        return "".join([chr(97 + i) for i in token_ids])


TARGET: Final = testing.TableModel(V)
GREEDY: Final = s.GreedyProcessor()
SAMPLED: Final = s.MultinomialProcessor(1.0)
BAG: Final = s.BlackBox(torch.full((V,), 0.2), lambda probs: probs.argmax(-1, keepdim=True))
EVEN: Final = s.Categorical(torch.full((V,), 0.2))
LOGITS: Final = torch.arange(5.0)
NODES: Final = (s.Node(1), s.Node(2), s.Node(3, parent=0))
CERTAIN: Final = testing.Case(2, (0,), 2)


def begun() -> s.DecodeState:
    return s.start(TEXT, 3).unwrap()


def drafter(tokens: s.Tokens) -> Iterator[s.Proposal[s.PointMass]]:
    yield s.Proposal(1, s.PointMass(1), logits=LOGITS)
    yield s.Proposal(2, s.PointMass(2), logits=LOGITS)


def nodes(tokens: s.Tokens) -> Iterator[s.Node]:
    yield from NODES


def meter() -> s.CostMeter:
    made = s.CostMeter()
    for k in (1, 1, 2, 3):
        made.note(k, 1.0)
    return made


def storage() -> s.NGramStorage:
    made = s.NGramStorage(2, V)
    made.initialize([1, 2, 1, 3])
    return made


def bigrams() -> s.Bigrams:
    return s.Bigrams(numpy.array([[1, 2]] * V), numpy.array([[0.5, 0.25]] * V))


def table_file(name: str = "table.safetensors") -> Path:
    path = FOLDER / name
    bigrams().save(path)
    return path


def key_values() -> DynamicCache:
    made = DynamicCache()
    made.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)  # type: ignore[attr-defined]
    return made


def speculative(draft: s.Drafter = drafter, **parts: Any) -> s.Step:  # noqa: ANN401 - parts of any kind are the point
    return s.speculative_step(draft, TARGET, SAMPLED, s.Dice(), **parts)


def storage_file() -> Path:
    path = FOLDER / "storage.safetensors"
    storage().save(path)
    return path


def quiet() -> Console:
    return Console(file=StringIO())


def kept() -> kv_cache.KVCache:
    return kv_cache.KVCache(torch.zeros(1, 2, 1, 4, 2), 3)


def warm(predictor: s.CachedPredictor) -> Any:  # noqa: ANN401 - it may have methods that the types do not know yet
    predictor(TEXT, 1)
    return predictor


class Heard:
    """A streamer."""

    def put(self, value: torch.Tensor) -> None:
        """Hears."""

    def end(self) -> None:
        """Hears that it is over."""


def in_world(world: testing.World) -> s.Step:
    return s.autoregressive_step(world.target, world.processor, world.rng)


def in_noise(world: testing.World) -> s.Step:
    return s.seed_coupled_step(s.propose_nothing, world.target, world.processor, world.noise)


def flip(world: testing.World) -> bool:
    return world.rng.accept(0.5)


# What is done with a result.

Use: TypeAlias = Callable[[Any], object]


def nothing(result: object) -> None:
    """The result is all there is to it."""


def decode(step: s.Step) -> object:
    return s.run(step, begun())


def decode_from(state: s.DecodeState) -> object:
    for policy in (s.EGAG(), s.Heuristic(), s.CostAware(meter(), 2)):
        s.run(speculative(gamma=policy), state)
    return s.run(s.tree_step(nodes, s.path_by_path(TARGET), GREEDY, s.Dice(), s.CostAwareTree(meter(), 2)), state)


def draft(proposer: s.Drafter) -> object:
    list(islice(proposer(TEXT), 3))
    return decode(speculative(proposer))


def draft_tree(proposer: s.TreeDrafter, gamma: s.TreePolicy = s.Fixed(3)) -> object:
    list(islice(proposer(TEXT), 3))
    return decode(s.tree_step(proposer, s.path_by_path(TARGET), GREEDY, s.Dice(), gamma))


def say(proposal: s.Proposal) -> object:
    for policy in (s.Fixed(), s.EGAG(), s.StopAfter(s.Unsure()), s.CostAware(meter(), 2)):
        decode(speculative(lambda tokens: iter((proposal,)), gamma=policy))
    return None


def say_node(node: s.Node) -> object:
    for policy in (s.Fixed(), s.CostAwareTree(meter(), 2)):
        draft_tree(lambda tokens: iter((node,)), policy)
    return None


def pace(policy: s.GammaPolicy) -> object:
    policy((proposal for proposal in drafter(TEXT)), begun())
    return decode(speculative(gamma=policy))


def pace_tree(policy: s.TreePolicy) -> object:
    return draft_tree(nodes, policy)


def end(condition: s.Stop) -> object:
    return pace(s.StopAfter(condition, s.Fixed(3)))


@final
@frozen
class Made:
    """A processor that makes one law of everything."""

    law: s.Distribution

    def laws(self, tokens: s.Tokens, logits: torch.Tensor, /) -> tuple[s.Distribution, ...]:
        """The law, for each row."""
        return (self.law,) * len(logits)


def obey(law: s.Distribution) -> object:
    for stage in (verify.RejectTokens, verify.MatchSamples, block.VerifyBlock):
        for proposer in (drafter, lambda tokens: iter((s.Proposal(1, EVEN),))):
            drafted = s.Drafted(begun(), tuple(proposer(TEXT)))
            stages.Adjust(s.Dice())(stage(TARGET, Made(law), s.Dice())(drafted))
    return decode(s.autoregressive_step(TARGET, Made(law), s.Dice()))


def process(processor: s.Processor) -> object:
    laws = processor.laws(TEXT, torch.zeros(2, V))
    assert [laws[0], laws[1]]
    return decode(s.speculative_step(drafter, TARGET, processor, s.Dice()))


def roll(rng: s.Randomness) -> object:
    return decode(s.speculative_step(lambda tokens: iter((s.Proposal(1, EVEN),)), TARGET, SAMPLED, rng))


def predict(predictor: s.Predictor) -> object:
    predictor(TEXT, 2)
    return decode(s.speculative_step(drafter, predictor, GREEDY, s.Dice()))


def predict_ids(predictor: s.Predictor) -> object:
    return predictor(TEXT, 2)


def read(predictor: s.TreePredictor) -> object:
    predictor(TEXT, NODES)
    return decode(s.tree_step(nodes, predictor, GREEDY, s.Dice()))


def timed(clocked: s.CostMeter) -> object:
    for _ in range(3):
        predict(clocked.timed(TARGET))
    return clocked.seconds(3), clocked.stale, pace(s.CostAware(clocked, 2))


def timed_tree(clocked: s.CostMeter) -> object:
    for _ in range(3):
        read(clocked.timed_tree(s.path_by_path(TARGET)))
    return pace_tree(s.CostAwareTree(clocked, 2))


def note(k: int, seconds: float) -> object:
    made = meter()
    made.note(k, seconds)
    return made.seconds(3), pace(s.CostAware(made, 2))


def judge(stage: Callable[[s.Drafted], s.Verified]) -> object:
    return stage(s.Drafted(begun(), tuple(drafter(TEXT)))).accepted


def judge_in_loss(stage: Callable[[s.Drafted], s.Lossy[s.Verified]]) -> object:
    return stage(s.Drafted(begun(), tuple(drafter(TEXT)))).value


def verified() -> s.Verified:
    return verify.Verify(TARGET, GREEDY, Match(s.Dice()))(s.Drafted(begun(), tuple(drafter(TEXT))))


def committed() -> s.Committed:
    return stages.commit(stages.Adjust(s.Dice())(verified()))


def watch(observer: s.stages.Observer) -> object:
    return observer(committed())


def until(condition: stages.Condition) -> object:
    condition(begun())
    return decode(speculative(until=condition))


def search(step: beam.BeamStep, beams: beam.Beams | None = None) -> object:
    outcome: beam.Beams | s.Finished = beam.Beams(s.Request(TEXT, 6)) if beams is None else beams
    while isinstance(outcome, beam.Beams):
        outcome = step(outcome)
    return outcome


def rows_of_beams(texts: tuple[s.Tokens, ...]) -> torch.Tensor:
    return torch.cat([TARGET(text, 1) for text in texts])


def unroll(outcomes: Iterator[object]) -> object:
    return list(islice(outcomes, 9))


def arrive(tokens: Any) -> object:  # noqa: ANN401 - an asynchronous iterator
    async def collect() -> list[object]:
        return [new async for new in tokens]

    return asyncio.run(collect())


def store(made: s.NGramStorage) -> object:
    made.initialize([1, 2, 1])
    made.update([1, 2], 1)
    return list(islice(made.continuation((1, 2)), 3)), draft(s.NGramDrafter(made))


def generate(custom: interop.Generate) -> object:
    config = GenerationConfig(max_new_tokens=3, do_sample=True, eos_token_id=2, pad_token_id=0)
    return llama().generate(torch.tensor([[1, 3]]), generation_config=config, custom_generate=custom)


def hear_tokens(streamer: interop.Streamer) -> object:
    return interop.stream(speculative(), begun(), streamer)


# How each of them is called.


def of_storages(
    *entries: tuple[str, Callable[..., object], Callable[[], dict[str, object]]],
) -> tuple[tuple[str, Callable[..., object], Callable[[], dict[str, object]]], ...]:
    return entries


@final
@frozen
class Entry:
    """A call, right arguments for it, what is done with the result, and arguments whose size is the work they ask."""

    call: Callable[..., object]
    good: Callable[[], dict[str, object]] = dict
    use: Use = nothing
    effort: frozenset[str] = frozenset()


def effort(*names: str) -> frozenset[str]:
    return frozenset(names)


GENERATE: Final[Mapping[str, object]] = {
    "max_gen_len": 3,
    "logits_processor": GREEDY,
    "eos_tokens_id": 2,
    "pad_token_id": 0,
    "debug": False,
}

STEP: Final[Mapping[str, object]] = {"observe": stages.unobserved, "until": stages.never}
DRAFTING: Final[Mapping[str, object]] = {**STEP, "gamma": s.Fixed(2), "prune": ()}
JUDGED: Final[Mapping[str, object]] = {"target": TARGET, "processor": SAMPLED, "rng": s.Dice()}

STORAGE: Final = s.NGramStorage.__mro__[1].__name__

TABLE: Final[dict[str, Entry]] = {
    # beam
    "beam.Beams": Entry(
        beam.Beams,
        lambda: {"request": s.Request(TEXT, 6), "live": (beam.Beam(),), "ended": None, "steps": 0},
        lambda beams: search(beam.beam_step(rows_of_beams, 2, 2), beams),
    ),
    "beam.CachedBeamPredictor": Entry(
        beam.CachedBeamPredictor, lambda: {"model": llama()}, lambda made: search(beam.beam_step(made, 2, 2))
    ),
    "beam.CachedBeamPredictor.__call__": Entry(beam.CachedBeamPredictor(llama()), lambda: {"texts": (TEXT, (1, 2, 3))}),
    "beam.Expand": Entry(
        beam.Expand,
        lambda: {"predict": rows_of_beams, "top_k": 2},
        lambda expand: beam.Select(2)(expand(beam.Beams(s.Request(TEXT, 6)))),
    ),
    "beam.LengthPenalty": Entry(
        beam.LengthPenalty,
        lambda: {"min_length": 5.0, "alpha": 1.2},
        lambda made: (made.score(beam.Beam((1, 2), -1.0)), search(beam.beam_step(rows_of_beams, 2, 2, made))),
    ),
    "beam.LengthPenalty.of": Entry(lambda length: beam.LengthPenalty().of(length), lambda: {"length": 3}),
    "beam.LengthPenalty.score": Entry(
        lambda beam: s.LengthPenalty().score(beam), lambda: {"beam": beam.Beam((1,), -1.0)}
    ),
    "beam.LengthPenalty.best": Entry(
        lambda beam, limit: s.LengthPenalty().best(beam, limit), lambda: {"beam": beam.Beam((1,), -1.0), "limit": 4}
    ),
    "beam.Select": Entry(
        beam.Select,
        lambda: {"num_beams": 2, "penalty": s.LengthPenalty()},
        lambda select: select(beam.Expand(rows_of_beams, 2)(beam.Beams(s.Request(TEXT, 6)))),
    ),
    "beam.ShowBeams": Entry(
        beam.ShowBeams,
        lambda: {"tokenizer": Words(), "console": quiet()},
        lambda show: search(beam.beam_step(rows_of_beams, 2, 2, observe=show)),
    ),
    "beam.beam_search_generate": Entry(
        s.beam_search_generate,
        lambda: {
            "inputs": [1, 3],
            "model": llama(),
            "max_gen_len": 3,
            "num_beams": 2,
            "top_k": 2,
            "min_length": 5.0,
            "alpha": 1.2,
            "eos_tokens_id": 2,
            "pad_token_id": 0,
            "debug": False,
            "tokenizer": None,
        },
    ),
    "beam.beam_step": Entry(
        s.beam_step,
        lambda: {
            "predict": rows_of_beams,
            "num_beams": 2,
            "top_k": 2,
            "penalty": s.LengthPenalty(),
            "observe": beam.unobserved_beams,
        },
        search,
    ),
    "beam.has_ended": Entry(
        beam.has_ended, lambda: {"beam": beam.Beam((1,), -1.0), "request": s.Request(TEXT, 6, frozenset({1}))}
    ),
    # caches and predictors
    "caching.LossyCache": Entry(
        s.LossyCache, lambda: {"make": DynamicCache}, lambda made: predict(s.CachedPredictor(llama(), made))
    ),
    "caching.LossyCache.__call__": Entry(s.LossyCache(DynamicCache)),
    "caching.prune_cache": Entry(s.prune_cache, lambda: {"cache": key_values(), "num_tokens_to_discard": 1}),
    "kv_cache.KVCache": Entry(
        kv_cache.KVCache, lambda: {"buffer": torch.zeros(1, 2, 1, 4, 2), "length": 3}, lambda made: made.rollback(2)
    ),
    "kv_cache.KVCache.rollback": Entry(lambda length: kept().rollback(length), lambda: {"length": 2}),
    "kv_cache.KVCache.keep": Entry(lambda start, rows: kept().keep(start, rows), lambda: {"start": 1, "rows": [1]}),
    "kv_cache.KVCache.reserve": Entry(
        lambda length: kept().reserve(length), lambda: {"length": 9}, effort=effort("length")
    ),
    "predictor.CachedPredictor": Entry(
        s.CachedPredictor, lambda: {"model": llama(), "make_cache": DynamicCache, "memos": 2}, predict
    ),
    "predictor.CachedPredictor.forget": Entry(lambda: warm(s.CachedPredictor(llama())).forget(), dict),
    "predictor.CachedPredictor.__call__": Entry(s.CachedPredictor(llama()), lambda: {"tokens": TEXT, "last": 2}),
    "predictor.CachedPredictor.read_ahead": Entry(
        lambda tokens, most, choose: s.CachedPredictor(llama()).read_ahead(tokens, most, choose),
        lambda: {"tokens": TEXT, "most": 3, "choose": lambda logits, position: logits.argmax()},
    ),
    "predictor.CachedPredictor.read_tree": Entry(
        lambda tokens, nodes: s.CachedPredictor(llama()).read_tree(tokens, nodes),
        lambda: {"tokens": TEXT, "nodes": NODES},
    ),
    "predictor.CachedPredictor.prune": Entry(
        lambda tokens: warm(s.CachedPredictor(llama())).prune(tokens), lambda: {"tokens": TEXT}
    ),
    "predictor.UncachedPredictor": Entry(s.UncachedPredictor, lambda: {"model": llama()}, predict),
    "predictor.UncachedPredictor.__call__": Entry(s.UncachedPredictor(llama()), lambda: {"tokens": TEXT, "last": 2}),
    "predictor.UncachedPredictor.read_tree": Entry(
        lambda tokens, nodes: s.UncachedPredictor(llama()).read_tree(tokens, nodes),
        lambda: {"tokens": TEXT, "nodes": NODES},
    ),
    "predictor.UncachedPredictor.prune": Entry(
        lambda tokens: s.UncachedPredictor(llama()).prune(tokens), lambda: {"tokens": TEXT}
    ),
    "predictor.Limits": Entry(
        s.Limits,
        lambda: {"vocab_size": V, "context": 9},
        lambda made: (s.start(TEXT, 3, limits=made), s.shared_vocabulary(made, s.Limits(V))),
    ),
    "predictor.fitted": Entry(s.fitted, lambda: {"predictor": TARGET, "vocab_size": 7}, predict),
    "predictor.limits_of": Entry(s.limits_of, lambda: {"model": llama()}),
    "near_ties.OneByOne": Entry(s.OneByOne, lambda: {"predictor": TARGET, "prompt": 3}, predict),
    "near_ties.OneByOne.__call__": Entry(s.OneByOne(TARGET, 2), lambda: {"tokens": TEXT, "last": 2}),
    "near_ties.RescoreNearTies": Entry(
        s.RescoreNearTies, lambda: {"target": TARGET, "single": TARGET, "below": 0.1}, predict
    ),
    "near_ties.RescoreNearTies.__call__": Entry(
        s.RescoreNearTies(TARGET, TARGET, 0.1), lambda: {"tokens": TEXT, "last": 2}
    ),
    "near_ties.margins_of": Entry(s.margins_of, lambda: {"logits": torch.zeros(2, V)}),
    "margins.Margins": Entry(s.Margins, lambda: {"recorded": []}, watch),
    "margins.audit": Entry(s.audit, lambda: {"tokens": [1, 2, 3, 4], "model": llama(), "prompt": 2}),
    # laws, processors, randomness
    "distribution.BlackBox": Entry(s.BlackBox, lambda: {"probs": EVEN.probs, "sample": BAG.sample}, obey),
    "distribution.BlackBox.draw": Entry(BAG.draw),
    "distribution.Categorical": Entry(s.Categorical, lambda: {"probs": EVEN.probs, "by": None}, obey),
    "distribution.Categorical.entropy": Entry(EVEN.entropy),
    "distribution.PointMass": Entry(s.PointMass, lambda: {"token": 1}, obey),
    "distribution.PointMass.entropy": Entry(lambda: s.PointMass(1).entropy()),
    "distribution.max_fn": Entry(s.max_fn, lambda: {"x": torch.tensor([0.5, -0.5])}),
    "distribution.normalised_entropy": Entry(distribution.normalised_entropy, lambda: {"probs": EVEN.probs}),
    "processors.GreedyProcessor": Entry(s.GreedyProcessor, lambda: {"temperature": 1.0}, process),
    "processors.GreedyProcessor.sample": Entry(GREEDY.sample, lambda: {"probs": torch.ones(2, V)}),
    "processors.MultinomialProcessor": Entry(s.MultinomialProcessor, lambda: {"temperature": 1.0}, process),
    "processors.MultinomialProcessor.sample": Entry(SAMPLED.sample, lambda: {"probs": torch.ones(2, V)}),
    "processors.LogitsProcessor.__call__": Entry(SAMPLED, lambda: {"logits": torch.zeros(2, V)}),
    "processors.LogitsProcessor.laws": Entry(SAMPLED.laws, lambda: {"tokens": TEXT, "logits": torch.zeros(2, V)}),
    "processors.TopKProcessor": Entry(s.TopKProcessor, lambda: {"temperature": 1.0, "top_k": 2}, process),
    "processors.NucleusProcessor": Entry(s.NucleusProcessor, lambda: {"temperature": 1.0, "top_p": 0.9}, process),
    "processors.TopKNucleusProcessor": Entry(
        s.TopKNucleusProcessor, lambda: {"temperature": 1.0, "top_k": 2, "top_p": 0.9}, process
    ),
    "processors.EachPrefix": Entry(processors.EachPrefix, lambda: {"law": lambda tokens, logits: EVEN}, process),
    "processors.EachPrefix.laws": Entry(
        lambda tokens, logits: processors.EachPrefix(lambda text, row: EVEN).laws(tokens, logits)[0],
        lambda: {"tokens": TEXT, "logits": torch.zeros(2, V)},
    ),
    "processors.Lazily": Entry(
        processors.Lazily,
        lambda: {"rows": 2, "make": lambda row: EVEN},
        lambda laws: [laws[row] for row in range(len(laws))],
        effort("rows"),
    ),
    "random.Dice": Entry(s.Dice, lambda: {"generator": None}, roll),
    "random.Dice.draw": Entry(lambda law, position: s.Dice().draw(law, position), lambda: {"law": EVEN, "position": 3}),
    "random.Dice.draw_there": Entry(
        lambda probs, position: s.Dice().draw_there(probs, position), lambda: {"probs": EVEN.probs, "position": 3}
    ),
    "random.Dice.accept": Entry(lambda probability: s.Dice().accept(probability), lambda: {"probability": 0.5}),
    "random.SharedNoise": Entry(
        s.SharedNoise, lambda: {"seed": 3}, lambda rng: decode(s.seed_coupled_step(drafter, TARGET, SAMPLED, rng))
    ),
    "random.SharedNoise.draw": Entry(
        lambda law, position: s.SharedNoise(1).draw(law, position), lambda: {"law": EVEN, "position": 3}
    ),
    "random.SharedNoise.draw_there": Entry(
        lambda probs, position: s.SharedNoise(1).draw_there(probs, position),
        lambda: {"probs": EVEN.probs, "position": 3},
    ),
    # drafters
    "drafters.bigrams.Bigrams": Entry(
        s.Bigrams,
        lambda: {"tokens": bigrams().tokens, "chances": bigrams().chances},
        lambda made: draft_tree(s.LookupTree(made)),
    ),
    "drafters.bigrams.Bigrams.of": Entry(
        s.Bigrams.of,
        lambda: {"target": s.path_by_path(TARGET), "before": (1,), "vocab_size": V, "k": 2},
        effort=effort("vocab_size"),
    ),
    "drafters.bigrams.Bigrams.behind": Entry(lambda token: bigrams().behind(token), lambda: {"token": 1}),
    "drafters.bigrams.Bigrams.save": Entry(lambda path: bigrams().save(path), lambda: {"path": table_file("other")}),
    "drafters.bigrams.Bigrams.load": Entry(s.Bigrams.load, lambda: {"path": table_file()}),
    "drafters.block.GreedyBlockDrafter": Entry(
        s.GreedyBlockDrafter,
        lambda: {"predictor": s.CachedPredictor(llama()), "ahead": 2, "vocab_size": V, "source": "block"},
        draft,
    ),
    "drafters.block.GreedyBlockDrafter.__call__": Entry(
        lambda tokens: list(islice(s.GreedyBlockDrafter(s.CachedPredictor(llama()))(tokens), 3)),
        lambda: {"tokens": TEXT},
    ),
    "drafters.block.SampledBlockDrafter": Entry(
        s.SampledBlockDrafter,
        lambda: {
            "predictor": s.CachedPredictor(llama()),
            "processor": SAMPLED,
            "rng": s.Dice(),
            "ahead": 2,
            "vocab_size": V,
            "source": "block",
        },
        draft,
    ),
    "drafters.block.SampledBlockDrafter.__call__": Entry(
        lambda tokens: list(islice(s.SampledBlockDrafter(s.CachedPredictor(llama()), SAMPLED, s.Dice())(tokens), 3)),
        lambda: {"tokens": TEXT},
    ),
    "drafters.combine.at_most": Entry(s.at_most, lambda: {"k": 2, "drafter": drafter}, draft),
    "drafters.combine.first_of": Entry(
        lambda one, other: s.first_of(*(one, other)), lambda: {"one": s.propose_nothing, "other": drafter}, draft
    ),
    "drafters.combine.longest": Entry(
        lambda one, other, most: s.longest(one, other, most=most),
        lambda: {"one": drafter, "other": drafter, "most": 3},
        draft,
    ),
    "drafters.combine.then": Entry(
        lambda one, other: s.then(*(one, other)), lambda: {"one": drafter, "other": drafter}, draft
    ),
    "drafters.combine.propose_nothing": Entry(lambda tokens: list(s.propose_nothing(tokens)), lambda: {"tokens": TEXT}),
    "drafters.llm.LLMDrafter": Entry(
        s.LLMDrafter,
        lambda: {
            "predictor": TARGET,
            "processor": SAMPLED,
            "rng": s.Dice(),
            "context": 9,
            "vocab_size": V,
            "source": "llm",
        },
        draft,
    ),
    "drafters.llm.LLMDrafter.__call__": Entry(
        lambda tokens: list(islice(s.LLMDrafter(TARGET, SAMPLED, s.Dice(), vocab_size=V)(tokens), 3)),
        lambda: {"tokens": TEXT},
    ),
    "drafters.lookup.PromptLookup": Entry(
        s.PromptLookup,
        lambda: {"max_matching_ngram_size": 2, "num_output_tokens": 3, "source": "lookup"},
        draft,
    ),
    "drafters.lookup.PromptLookup.__call__": Entry(
        lambda tokens: list(s.PromptLookup()(tokens)), lambda: {"tokens": TEXT}
    ),
    "drafters.ngram.NGramDrafter": Entry(
        s.NGramDrafter, lambda: {"storage": storage(), "vocab_size": V, "source": "ngram"}, draft
    ),
    "drafters.ngram.NGramDrafter.__call__": Entry(
        lambda tokens: list(islice(s.NGramDrafter(storage())(tokens), 3)), lambda: {"tokens": TEXT}
    ),
    "drafters.ngram.GuessingNGramDrafter": Entry(
        s.GuessingNGramDrafter, lambda: {"storage": storage(), "vocab_size": V, "source": "ngram"}, draft
    ),
    "drafters.ngram.GuessingNGramDrafter.__call__": Entry(
        lambda tokens: list(islice(s.GuessingNGramDrafter(storage())(tokens), 3)), lambda: {"tokens": TEXT}
    ),
    "drafters.suffix.SuffixDrafter": Entry(
        s.SuffixDrafter,
        lambda: {"most": 3, "factor": 2.0, "offset": 3.0, "shortest": 1, "source": "suffix"},
        draft,
    ),
    **{
        f"drafters.suffix.SuffixDrafter.{name}": Entry(call, lambda: {"tokens": TEXT})
        for name, call in {
            "__call__": lambda tokens: list(s.SuffixDrafter()(tokens)),
            "match": lambda tokens: s.SuffixDrafter().match(tokens),
            "copy": lambda tokens: s.SuffixDrafter().copy(tokens),
            "read": lambda tokens: s.SuffixDrafter().read(tokens),
        }.items()
    },
    "drafters.tree.LookupTree": Entry(s.LookupTree, lambda: {"bigrams": bigrams(), "branches": 2}, draft_tree),
    "drafters.tree.LookupTree.__call__": Entry(
        lambda tokens: list(islice(s.LookupTree(bigrams())(tokens), 5)), lambda: {"tokens": TEXT}
    ),
    "drafters.tree.as_chain": Entry(s.as_chain, lambda: {"drafter": nodes, "least": 0.1}, draft),
    "drafters.tree.as_tree": Entry(s.as_tree, lambda: {"drafter": drafter}, draft_tree),
    **{
        f"drafters.storage.{kind.__name__}": Entry(kind, lambda: {"n": 2, "vocab_size": V, "max_contexts": 9}, store)
        for kind in (s.NGramStorage, s.OneLevelNGramStorage)
    },
    **{
        f"drafters.storage.{STORAGE}.{name}": Entry(call, good)
        for name, call, good in of_storages(
            ("next_token", lambda input_ids: storage().next_token(input_ids), lambda: {"input_ids": [1, 2]}),
            ("has_gram", lambda ngram: storage().has_gram(ngram), lambda: {"ngram": [1, 2]}),
            (
                "update",
                lambda input_ids, next_tokens: storage().update(input_ids, next_tokens),
                lambda: {"input_ids": [1, 2], "next_tokens": 3},
            ),
            ("initialize", lambda input_ids: storage().initialize(input_ids), lambda: {"input_ids": [1, 2]}),
            ("reset", lambda: storage().reset(), dict),
            ("counts", lambda: storage().counts(), dict),
            (
                "continuation",
                lambda tokens: list(islice(storage().continuation(tokens), 3)),
                lambda: {"tokens": TEXT},
            ),
            (
                "learn",
                lambda tokens, start, followers: storage().learn(tokens, start, followers),
                lambda: {"tokens": TEXT, "start": 1, "followers": [[2], [1]]},
            ),
            ("save", lambda path: storage().save(path), lambda: {"path": FOLDER / "saved"}),
            ("load", lambda path: storage().load(path), lambda: {"path": storage_file()}),
        )
    },
    # policies
    "gamma.EGAG": Entry(s.EGAG, lambda: {"gamma_min": 1, "gamma_max": 3, "ema_beta": 0.5, "temperature": 1.0}, pace),
    "gamma.SVIP": Entry(s.SVIP, lambda: {"h": 0.3, "c": 0.15, "temperature": 1.0}, end),
    "gamma.AdaEDL": Entry(s.AdaEDL, lambda: {"lambda_": 0.4, "temperature": 1.0}, end),
    "gamma.Unsure": Entry(s.Unsure, lambda: {"confidence": 0.4, "temperature": 1.0}, end),
    "gamma.Fixed": Entry(s.Fixed, lambda: {"gamma": 2}, pace),
    "gamma.Heuristic": Entry(s.Heuristic, lambda: {"gamma": 2, "gamma_max": 4}, pace),
    "gamma.StopAfter": Entry(s.StopAfter, lambda: {"stop": s.Unsure(), "within": s.Fixed(3)}, pace),
    "gamma.drafter_law": Entry(s.drafter_law, lambda: {"proposal": next(drafter(TEXT)), "temperature": 1.0}),
    **{
        f"gamma.{stop.__name__}.__call__": Entry(
            lambda proposal, stop=stop: stop()(proposal), lambda: {"proposal": next(drafter(TEXT))}
        )
        for stop in (s.SVIP, s.AdaEDL, s.Unsure)
    },
    "gamma_cost.CostAware": Entry(s.CostAware, lambda: {"meter": meter(), "most": 3, "tell": nothing}, pace),
    "gamma_cost.CostMeter": Entry(
        s.CostMeter, lambda: {"clock": iter(range(999)).__next__}, lambda made: (timed(made), timed_tree(made))
    ),
    "gamma_cost.CostMeter.timed": Entry(lambda target: meter().timed(target), lambda: {"target": TARGET}, predict),
    "gamma_cost.CostMeter.timed_tree": Entry(
        lambda target: meter().timed_tree(target), lambda: {"target": s.path_by_path(TARGET)}, read
    ),
    "gamma_cost.CostMeter.note": Entry(note, lambda: {"k": 2, "seconds": 0.5}),
    "gamma_cost.CostMeter.now": Entry(meter().now),
    "gamma_cost.CostMeter.since": Entry(meter().since, lambda: {"began": 0.5}),
    "gamma_cost.CostMeter.seconds": Entry(lambda most: meter().seconds(most), lambda: {"most": 3}),
    "gamma_tree.CostAwareTree": Entry(
        s.CostAwareTree, lambda: {"meter": meter(), "most": 3, "tell": nothing}, pace_tree
    ),
    # decodes
    "errors.unwrap": Entry(s.unwrap, lambda: {"result": Success(3)}),
    "generate.autoregressive_generate": Entry(
        s.autoregressive_generate,
        lambda: {**GENERATE, "inputs": [1, 3], "model": llama(), "use_cache": True},
    ),
    "generate.speculative_generate": Entry(
        s.speculative_generate,
        lambda: {
            **GENERATE,
            "inputs": [1, 3],
            "drafter": llama(1),
            "target": llama(),
            "tokenizer": None,
            "gamma": 2,
            "use_egag": True,
            "gamma_min": 1,
            "gamma_max": 3,
            "egag_ema_beta": 0.5,
            "use_cache": True,
            "skip_sample_adjustment": False,
            "first_target": False,
        },
    ),
    "generate.ngram_assisted_speculative_generate": Entry(
        s.ngram_assisted_speculative_generate,
        lambda: {
            **GENERATE,
            "inputs": [1, 3],
            "ngramstorage": s.NGramStorage(2, 16),
            "target": llama(),
            "tokenizer": None,
            "gamma": 2,
            "filler_top_k": 2,
            "use_cache": True,
            "first_target": False,
            "stop_if_unknown": True,
        },
    ),
    "loop.once": Entry(s.once, lambda: {"first": speculative(), "then": speculative()}, decode),
    "loop.run": Entry(s.run, lambda: {"step": speculative(), "state": begun()}),
    "loop.unfold": Entry(s.unfold, lambda: {"step": speculative(), "state": begun()}, unroll),
    "loop.start": Entry(
        s.start,
        lambda: {"prompt": TEXT, "max_new_tokens": 3, "stop": (2,), "limits": s.Limits(V, 9)},
        lambda started: s.run(speculative(), started.unwrap()) if isinstance(started, Success) else None,
    ),
    "loop.shared_vocabulary": Entry(s.shared_vocabulary, lambda: {"target": s.Limits(V), "drafter": s.Limits(V)}),
    "lossy.Lossy": Entry(s.Lossy, lambda: {"value": begun()}),
    "lossy.Lossy.map": Entry(lambda stages: s.Lossy(3).map(stages), lambda: {"stages": nothing}),
    "lossy.accept_loss": Entry(
        s.accept_loss,
        lambda: {"step": s.lossy_unadjusted_step(drafter, TARGET, SAMPLED, s.Dice())},
        decode,
    ),
    "spec_paths.install_spec_paths": Entry(s.install_spec_paths),
    # steps
    "steps.autoregressive_step": Entry(s.autoregressive_step, lambda: {**STEP, **JUDGED}, decode),
    "steps.speculative_step": Entry(s.speculative_step, lambda: {**DRAFTING, **JUDGED, "drafter": drafter}, decode),
    "steps.lossy_unadjusted_step": Entry(
        s.lossy_unadjusted_step,
        lambda: {**DRAFTING, **JUDGED, "drafter": drafter},
        lambda step: decode(s.accept_loss(step)),
    ),
    "steps.ngram_step": Entry(
        s.ngram_step,
        lambda: {**DRAFTING, **JUDGED, "drafter": drafter, "update": stages.UpdateNgram(storage())},
        decode,
    ),
    "steps.seed_coupled_step": Entry(
        s.seed_coupled_step,
        lambda: {
            **DRAFTING,
            "drafter": drafter,
            "target": TARGET,
            "processor": SAMPLED,
            "noise": s.SharedNoise(3),
        },
        decode,
    ),
    "steps.tree_step": Entry(
        s.tree_step,
        lambda: {**DRAFTING, **JUDGED, "target": s.path_by_path(TARGET), "drafter": nodes},
        decode,
    ),
    # records that users make
    "state.Request": Entry(
        s.Request,
        lambda: {"prompt": TEXT, "limit": 6, "stop": frozenset({2}), "vocab_size": V},
        lambda request: s.run(speculative(), s.DecodeState(request, TEXT)),
    ),
    "state.DecodeState": Entry(
        s.DecodeState,
        lambda: {"request": s.Request(TEXT, 5), "tokens": TEXT, "pace": (), "tally": s.Tally()},
        decode_from,
    ),
    "state.Count": Entry(
        s.Count,
        lambda: {"drafted": 2, "accepted": 1},
        lambda count: decode_from(evolve(begun(), tally=s.Tally(1, (("draft", count),)))),
    ),
    "state.Tally": Entry(
        s.Tally,
        lambda: {"steps": 1, "sources": (("draft", s.Count(2, 1)),)},
        lambda tally: decode_from(evolve(begun(), tally=tally)),
    ),
    "state.Proposal": Entry(
        s.Proposal, lambda: {"token": 1, "q": s.PointMass(1), "source": "mine", "logits": LOGITS}, say
    ),
    "state.Node": Entry(s.Node, lambda: {"token": 1, "parent": -1, "chance": 0.5, "source": "mine"}, say_node),
    # stages
    "stages.adjust.Adjust": Entry(stages.Adjust, lambda: {"rng": s.Dice()}, lambda stage: stage(verified())),
    "stages.adjust.LossySkipAdjustment": Entry(
        stages.LossySkipAdjustment, lambda: {"rng": s.Dice()}, lambda stage: stage(verified())
    ),
    "stages.block.VerifyBlock": Entry(stages.VerifyBlock, lambda: dict(JUDGED), judge),
    "stages.draft.Draft": Entry(
        stages.Draft, lambda: {"drafter": drafter, "gamma": s.Fixed(2)}, lambda stage: stage(begun())
    ),
    "stages.ngram.UpdateNgram": Entry(
        stages.UpdateNgram, lambda: {"storage": storage(), "filler_top_k": 2}, lambda stage: stage(committed())
    ),
    "stages.observe.Show": Entry(stages.Show, lambda: {"tokenizer": Words(), "console": quiet()}, watch),
    "stages.prune.PruneCache": Entry(
        stages.PruneCache, lambda: {"providers": (s.UncachedPredictor(llama()),)}, lambda stage: stage(committed())
    ),
    "stages.stop.StopWhen": Entry(
        stages.StopWhen,
        lambda: {"condition": stages.never},
        lambda stage: stage(stages.Adjust(s.Dice())(verified())),
    ),
    "stages.stop.stop_string": Entry(
        lambda tokenizer, one, other: stop.stop_string(tokenizer, *(one, other)),
        lambda: {"tokenizer": Words(), "one": "x", "other": "yz"},
        until,
    ),
    "stages.tree.DraftTree": Entry(
        stages.DraftTree, lambda: {"drafter": nodes, "gamma": s.Fixed(2)}, lambda stage: stage(begun())
    ),
    "stages.tree.VerifyTree": Entry(
        stages.VerifyTree,
        lambda: {**JUDGED, "target": s.path_by_path(TARGET)},
        lambda stage: stage(s.DraftedTree(begun(), NODES)),
    ),
    "stages.typical.LossyTypicalAcceptance": Entry(
        typical.LossyTypicalAcceptance, lambda: {**JUDGED, "epsilon": 0.09, "alpha": 0.3}, judge_in_loss
    ),
    "stages.verify.MatchSamples": Entry(stages.MatchSamples, lambda: dict(JUDGED), judge),
    "stages.verify.RejectTokens": Entry(stages.RejectTokens, lambda: dict(JUDGED), judge),
    # trees
    "trees.path_by_path": Entry(s.path_by_path, lambda: {"predictor": TARGET}, read),
    # interop
    "interop.generate.Generate": Entry(
        interop.Generate,
        lambda: {"drafter": drafter, "gamma": s.Fixed(2), "rng": s.Dice()},
        generate,
    ),
    "interop.processors.ProcessorList": Entry(
        interop.ProcessorList,
        lambda: {
            "processors": LogitsProcessorList([MinLengthLogitsProcessor(5, 2)]),
            "choose": interop.sampled,
        },
        process,
    ),
    "interop.processors.ProcessorList.laws": Entry(
        lambda tokens, logits: interop.ProcessorList(LogitsProcessorList()).laws(tokens, logits),
        lambda: {"tokens": TEXT, "logits": torch.zeros(2, V)},
    ),
    "interop.processors.InOrder": Entry(
        interop_processors.InOrder,
        lambda: {
            "processors": LogitsProcessorList([MinLengthLogitsProcessor(5, 2)]),
            "choose": interop.sampled,
        },
        process,
    ),
    "interop.processors.InOrder.laws": Entry(
        interop_processors.InOrder(LogitsProcessorList()).laws, lambda: {"tokens": TEXT, "logits": torch.zeros(2, V)}
    ),
    "interop.processors.Stateless": Entry(
        interop_processors.Stateless,
        lambda: {"processor": MinLengthLogitsProcessor(5, 2)},
        lambda made: process(interop.ProcessorList([made])),
    ),
    "interop.processors.most_likely": Entry(interop.most_likely, lambda: {"scores": LOGITS}),
    "interop.processors.sampled": Entry(interop.sampled, lambda: {"scores": LOGITS}),
    "interop.streaming.new_tokens": Entry(
        interop.new_tokens, lambda: {"step": speculative(), "state": begun()}, arrive
    ),
    "interop.streaming.stops": Entry(interop.stops, lambda: {"criteria": StoppingCriteriaList()}, until),
    "interop.streaming.stream": Entry(
        interop.stream, lambda: {"step": speculative(), "state": begun(), "streamer": Heard()}
    ),
    # accelerate
    **{
        f"accelerate.build.{make.__name__}": Entry(make, lambda: {"model": llama(), "given": accelerate.Given.KEPT})
        for make in (accelerate.fast, accelerate.bit_for_bit)
    },
    **{
        f"accelerate.build.{make.__name__}": Entry(make, lambda: {"model": llama()})
        for make in (accelerate.lossy_bf16, accelerate.lossy_int8)
    },
    "accelerate.check.check": Entry(
        accelerate.check, lambda: {"model": llama(), "lengths": (1, 4), "passes": (2, 3)}, str
    ),
    # models
    "models.Loaded": Entry(
        models.Loaded, lambda: {"model": llama(), "tokenizer": Words()}, lambda made: (made.stop, made.chat("hi"))
    ),
    "models.Loaded.chat": Entry(
        lambda message: models.Loaded(llama(), Words()).chat(message),  # type: ignore[arg-type]
        lambda: {"message": "hi"},
    ),
    "models.load": Entry(models.load, lambda: {"name": "/nowhere/at/all", "dtype": "float32"}),
    "models.Loaded.ids": Entry(
        lambda text: models.Loaded(llama(), Words()).ids(text),  # type: ignore[arg-type]
        lambda: {"text": "hi"},
    ),
    "models.bigrams_of": Entry(models.bigrams_of, lambda: {"model": llama(), "tokenizer": Words()}),
    "models.smollm2_is_converted": Entry(models.smollm2_is_converted),
    "models.smollm2_is_installed": Entry(models.smollm2_is_installed),
    # testing
    "testing.certificate.Case": Entry(
        testing.Case,
        lambda: {
            "vocab_size": 2,
            "prompt": (0,),
            "new_tokens": 2,
            "stop": frozenset({1}),
            "processor": lambda rng: SAMPLED,
            "seed": 0,
        },
        lambda case: testing.certify(in_world, cases=(case,)),
        effort("vocab_size", "new_tokens"),
    ),
    "testing.certificate.Case.law": Entry(CERTAIN.law, lambda: {"program": lambda world: world.rng.accept(0.5)}),
    "testing.certificate.certify": Entry(
        testing.certify, lambda: {"compose": in_world, "until": stages.never, "cases": (CERTAIN,)}
    ),
    "testing.certificate.certify_seed": Entry(testing.certify_seed, lambda: {"compose": in_noise, "cases": (CERTAIN,)}),
    "testing.certificate.same_law": Entry(
        testing.same_law,
        lambda: {"program": flip, "reference": flip, "cases": (CERTAIN,)},
    ),
    "testing.conformance.conformance": Entry(
        testing.conformance,
        lambda: {
            "predictor": TARGET,
            "fresh": TARGET,
            "vocab_size": V,
            "tolerance": 1e-9,
            "seed": 0,
            "steps": 6,
            "longest": 12,
            "often": (),
            "prune": None,
        },
        effort=effort("steps", "longest"),
    ),
    "testing.conformance.model_conformance": Entry(
        testing.model_conformance,
        lambda: {
            "model": llama(),
            "predictor": s.CachedPredictor(llama()),
            "tolerance": 1e-3,
            "seed": 0,
            "steps": 4,
            "longest": 12,
        },
        effort=effort("steps", "longest"),
    ),
    "testing.conformance.fresh_passes": Entry(
        testing.fresh_passes,
        lambda: {"model": llama(), "vocab_size": 16, "longest": 12, "tolerance": 1e-3},
        predict_ids,
        effort("longest"),
    ),
    "testing.conformance.through_trees": Entry(
        testing.through_trees, lambda: {"target": s.path_by_path(TARGET), "vocab_size": V, "seed": 0}, predict
    ),
    "testing.enumeration.branches": Entry(
        testing.branches, lambda: {"program": lambda branch: branch.accept(0.5)}, unroll
    ),
    "testing.enumeration.exact_law": Entry(testing.exact_law, lambda: {"program": lambda branch: branch.accept(0.5)}),
    "testing.laws.drafting_nothing_is_autoregressive": Entry(
        testing.drafting_nothing_is_autoregressive,
        lambda: {
            "compose": lambda world, draft: s.speculative_step(draft, world.target, world.processor, world.rng),
            "cases": (CERTAIN,),
        },
    ),
    "testing.laws.observing_is_identity": Entry(
        testing.observing_is_identity,
        lambda: {
            "compose": lambda world, observe: s.autoregressive_step(world.target, world.processor, world.rng, observe),
            "cases": (CERTAIN,),
        },
    ),
    "testing.laws.memo_is_invisible": Entry(
        testing.memo_is_invisible,
        lambda: {"memo": TARGET, "fresh": TARGET, "vocab_size": 2, "tolerance": 1e-9, "seed": 0},
    ),
    "testing.laws.pruning_is_identity": Entry(
        testing.pruning_is_identity,
        lambda: {
            "memo": s.UncachedPredictor(llama()),
            "fresh": s.UncachedPredictor(llama()),
            "vocab_size": 16,
            "tolerance": 1e-3,
            "seed": 0,
        },
    ),
    **{
        f"testing.laws.{law.__name__}": Entry(law, lambda: {"compose": in_world, "cases": (CERTAIN,)})
        for law in (testing.states_are_values, testing.statistics_add_up, testing.steps_are_atomic)
    },
    "testing.tables.HiddenProcessor": Entry(testing.HiddenProcessor, lambda: {"rng": s.Dice()}, process),
    "testing.tables.HiddenProcessor.sample": Entry(
        lambda probs: testing.HiddenProcessor(s.Dice()).sample(probs), lambda: {"probs": torch.ones(2, V)}
    ),
    "testing.tables.TableModel": Entry(
        testing.TableModel, lambda: {"vocab_size": V, "seed": 0}, predict, effort("vocab_size")
    ),
    "testing.tables.TableModel.__call__": Entry(testing.TableModel(V), lambda: {"tokens": TEXT, "last": 2}),
}


# What is not tried, and why.

BY_STAGES = "a record that stages make, and hand to one another"
RESULT = "a result, made by the library"
NONE = "an error, an enum or a protocol: nothing that is called with values"
BY_STEPS = "called by a step, with the record that the stage before it made"
ON_LAWS = "the arithmetic of laws: called by stages, on laws and tokens that they have looked at"
ON_BRANCHES = "randomness of the certificate's own, and the law that it found"
ON_NODES = "the arithmetic of trees: called by stages, on nodes that they have looked at"
ABSTRACT = "a base class: its subclasses are tried"

EXEMPT: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            "state.Adjusted",
            "state.Committed",
            "state.Drafted",
            "state.DraftedTree",
            "state.Finished",
            "state.Verified",
            "beam.Beam",
            "beam.Expanded",
            "beam.Selected",
            "testing.certificate.World",
        ),
        BY_STAGES,
    ),
    **dict.fromkeys(
        (
            "accelerate.check.Disagreement",
            "accelerate.check.Agreement",
            "gamma_cost.Choice",
            "margins.Audit",
            "testing.certificate.Certificate",
            "testing.certificate.Ending",
            "testing.conformance.Conformance",
            "testing.conformance.Divergence",
        ),
        RESULT,
    ),
    **dict.fromkeys(
        (
            "accelerate.build.Given",
            "accelerate.build.NotAccelerated",
            "errors.DecodeError",
            "interop.streaming.Streamer",
            "predictor.Prunable",
            "processors.Laws",
            "processors.Processor",
            "random.Randomness",
            "random.Sampling",
            "state.Reason",
            "testing.certificate.ExactnessError",
            "testing.conformance.Move",
            "testing.laws.LawError",
            "testing.laws.Memo",
        ),
        NONE,
    ),
    **dict.fromkeys(
        (
            "beam.Expand.__call__",
            "beam.Select.__call__",
            "beam.ShowBeams.__call__",
            "beam.advance_beams",
            "beam.unobserved_beams",
            "gamma.EGAG.__call__",
            "gamma.Fixed.__call__",
            "gamma.Heuristic.__call__",
            "gamma.StopAfter.__call__",
            "gamma_cost.CostAware.__call__",
            "gamma_tree.CostAwareTree.__call__",
            "interop.generate.Generate.__call__",
            "margins.Margins.__call__",
            "stages.adjust.Adjust.__call__",
            "stages.adjust.LossySkipAdjustment.__call__",
            "stages.block.VerifyBlock.__call__",
            "stages.block.VerifyBlock.judge",
            "stages.commit.advance",
            "stages.commit.commit",
            "stages.draft.Draft.__call__",
            "stages.draft.draft_nothing",
            "stages.ngram.UpdateNgram.__call__",
            "stages.observe.Show.__call__",
            "stages.observe.unobserved",
            "stages.prune.PruneCache.__call__",
            "stages.stop.StopWhen.__call__",
            "stages.stop.never",
            "stages.tree.DraftTree.__call__",
            "stages.tree.VerifyTree.__call__",
            "stages.typical.LossyTypicalAcceptance.__call__",
            "stages.typical.LossyTypicalAcceptance.judge",
            "stages.verify.MatchSamples.__call__",
            "stages.verify.MatchSamples.judge",
            "stages.verify.RejectTokens.__call__",
            "stages.verify.RejectTokens.judge",
            "stages.verify.RejectTokens.judge_from",
            "random.Dice.mark",
            "interop.processors.Stateless.__call__",
            "models.check_text",
            "models.said",
        ),
        BY_STEPS,
    ),
    **dict.fromkeys(
        (
            "distribution.Origin",
            "distribution.flaw",
            "distribution.flaw_of_sums",
            "distribution.lawful",
            "distribution.no_law",
            "distribution.vector",
            "distribution.Categorical.of",
            "distribution.Categorical.residual",
            "distribution.Categorical.taken_from",
            "distribution.PointMass.of",
            "distribution.PointMass.residual",
            "distribution.PointMass.taken_from",
        ),
        ON_LAWS,
    ),
    **dict.fromkeys(
        (
            "trees.children_of",
            "trees.depths",
            "trees.leaves",
            "trees.lineage",
            "trees.path_along",
            "trees.path_to",
            "trees.preorder",
        ),
        ON_NODES,
    ),
    **dict.fromkeys(
        ("testing.enumeration.Branch", "testing.enumeration.Law", "testing.enumeration.Noise"), ON_BRANCHES
    ),
    **dict.fromkeys(
        (
            "drafters.storage.INgramStorage",
            *[f"drafters.storage.INgramStorage.{name}" for name in ("continuation", "learn", "has_gram", "initialize")],
            *[f"drafters.storage.INgramStorage.{name}" for name in ("next_token", "reset", "update")],
            "processors.LogitsProcessor",
            "processors.LogitsProcessor.sample",
        ),
        ABSTRACT,
    ),
}


# What nobody should give.


class Colour(Enum):
    """An enum of the caller's own."""

    RED = "red"


@final
@frozen(eq=False)
class Answers:
    """Whatever is called, or asked for by name, answers any call with the same."""

    answer: object

    def __call__(self, *arguments: object, **named: object) -> object:
        return self.answer

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **named: self.answer


ANSWERS: Final[Mapping[str, object]] = {
    "None": None,
    "-1": -1,
    "2**70": 2**70,
    "nan": float("nan"),
    "'a'": "a",
    "()": (),
    "(1, 2)": (1, 2),
    "zeros(2, 3)": torch.zeros(2, 3),
}

HOSTILE: Final[Mapping[str, Callable[[], object]]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "2**31": lambda: 2**31,
    "2**70": lambda: 2**70,
    "1.5": lambda: 1.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "'a'": lambda: "a",
    "''": lambda: "",
    "b'a'": lambda: b"a",
    "[]": list,
    "()": tuple,
    "{}": dict,
    "[None]": lambda: [None],
    "('a', 1.5)": lambda: ("a", 1.5),
    "(1, -2, 2**70)": lambda: (1, -2, 2**70),
    "object()": object,
    "tensor(3)": lambda: torch.tensor(3),
    "tensor([1, 2])": lambda: torch.tensor([1, 2]),
    "tensor([])": lambda: torch.zeros(0),
    "zeros(2, 3)": lambda: torch.zeros(2, 3),
    "nans(5)": lambda: torch.full((5,), float("nan")),
    "int64(3)": lambda: numpy.int64(3),
    "array([1, 2])": lambda: numpy.array([1, 2]),
    "a class": lambda: int,
    "a generator": lambda: (i for i in range(2)),
    "an enum": lambda: Colour.RED,
    "a meta model": lambda: llama(device="meta"),
    "transformers' list": lambda: LogitsProcessorList([MinLengthLogitsProcessor(5, 2)]),
    **{f"answers {label}": partial(Answers, answer) for label, answer in ANSWERS.items()},
}

HUGE: Final = ("2**31", "2**70")


class HangError(BaseException):
    """A call took too long; nothing that catches an `Exception` catches it."""


def _hangs(number: int, frame: FrameType | None) -> None:
    raise HangError


def called(call: Callable[..., object], arguments: Mapping[str, object]) -> object:
    """What a call returns: its arguments are named where they have names."""
    parameters = inspect.signature(call).parameters.values()
    nameless = [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]
    named = {name: value for name, value in arguments.items() if name not in nameless}
    return call(*[arguments[name] for name in nameless], **named)


def complaint(entry: Entry, arguments: Mapping[str, object]) -> str | None:
    """What is wrong with how a call takes its arguments, if anything."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        result = called(entry.call, arguments)
        if not isinstance(result, Failure):
            entry.use(result)
            return None
        error: object = result.failure()
    except (Exception, HangError) as raised:
        error = raised
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if isinstance(error, s.DecodeError):
        return None if "\n" not in str(error) else f"an error of several lines: {error}"
    if isinstance(error, testing.LawError | testing.ExactnessError | accelerate.NotAccelerated):
        return None  # what a law's check says of a decoder that breaks it, and what no model can be
    place = ""
    if isinstance(error, BaseException) and error.__traceback__ is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "specflow/" in frame.filename]
        place = f" at {frames[-1].filename.rpartition('specflow/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}{place}"


def complaints(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """(parameter, value, what is wrong) for each argument replaced by each value."""
    for parameter in entry.good():
        for label, value in HOSTILE.items():
            if parameter in entry.effort and label in HUGE:
                continue
            torch.manual_seed(0)
            wrong = complaint(entry, {**entry.good(), parameter: value()})
            if wrong is not None:
                yield parameter, label, wrong


@pytest.fixture(autouse=True)
def _alarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(FOLDER)  # what is a path is written to
    before = signal.signal(signal.SIGPROF, _hangs)
    yield
    signal.signal(signal.SIGPROF, before)


def test_everything_public_is_in_the_table_or_exempt() -> None:
    names = public()
    assert sorted(names.keys() - TABLE.keys() - EXEMPT.keys()) == []
    assert sorted((TABLE.keys() | EXEMPT.keys()) - names.keys()) == []
    assert sorted(TABLE.keys() & EXEMPT.keys()) == []


@pytest.mark.parametrize("name", TABLE)
def test_right_arguments_are_right_and_all_there(name: str) -> None:
    assert complaint(TABLE[name], TABLE[name].good()) is None
    parameters = inspect.signature(public()[name]).parameters.values()  # type: ignore[arg-type]
    named = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    assert named - {"self", "cls"} <= TABLE[name].good().keys()


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.good()])
def test_wrong_arguments_are_refused_or_mean_something(name: str) -> None:
    assert [": ".join(wrong) for wrong in complaints(TABLE[name])] == []
