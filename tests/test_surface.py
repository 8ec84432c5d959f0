"""Every public function is given wrong types and values, one argument at a time: `DecodeError`, or it simply works.

`TABLE` has an entry for whatever the packages and modules in `PLACES` export, and for the public methods of its
classes: how it is called rightly, and what is done with the result, so that a wrong value which is only met later
counts too. Each argument in turn is replaced by each of the `HOSTILE` values, and what comes must be a `DecodeError`,
as an exception or as a `Failure`, or nothing: the value meant something (`True` is an int, one tensor of ids is ids).
What is no parameter's fault, such as what a function of the caller's own raises, is not tried; what it *returns* is:
the last of the hostile values answer any call and any method with nonsense, so they are drafters, predictors,
processors, randomness, policies, rules, observers and conditions that return it.

Records are tried where their maker may be the caller: a state where a decode begins, a proposal where a drafter says
it, a law where a processor makes it, a verdict where a rule says it, an adjustment where a stage cuts it. They may be
built of anything; using them has to be refused. Stages are given anything in place of the record before them. Records
that are passed from stage to stage are made by stages, and policies are called by them: those are in `EXEMPT`, with all
else that nobody calls.
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
from pkgutil import iter_modules
from shutil import rmtree
from tempfile import mkdtemp
from time import perf_counter
from types import FrameType, ModuleType
from typing import Any, Final, TypeAlias, final

import numpy
import pytest
import tokenizers
import torch
from attrs import evolve, frozen
from returns.result import Failure, Success
from rich.console import Console
from safetensors.torch import save_file
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)

import specflow as s
import specflow.interop.processors as interop_processors
from specflow import (
    accelerate,
    batch,
    beam,
    bench,
    caches,
    catalogue,
    constraints,
    converted,
    distribution,
    interop,
    models,
    replay,
    stages,
    testing,
)
from specflow.beam import LengthPenalty, beam_step
from specflow.caches import KVCache, LossyCache, prune_cache
from specflow.distill import Recipe, distill, fit_jump, kept_prompts, made_up
from specflow.distribution import BlackBox, Distribution, max_fn
from specflow.drafters import (
    Bigrams,
    Candidate,
    Corpus,
    CorpusTree,
    GreedyBlockDrafter,
    GuessingNGramDrafter,
    IntersectionDrafter,
    LogitTree,
    OneLevelNGramStorage,
    Recycled,
    RecyclingTree,
    Retokenised,
    SampledBlockDrafter,
    as_chain,
    likeliest_first,
    merged,
    propose_nothing,
    translated,
)
from specflow.errors import DeadEndError, unwrap
from specflow.heads import (
    MTP,
    Eagle,
    Eagle3,
    HeadDrafter,
    HeadPredictor,
    HeadTree,
    Jump,
    Medusa,
    Norms,
    Shape,
    Vocabulary,
    load_head,
)
from specflow.laws import Lazily
from specflow.loop import grow, once
from specflow.lossy import Lossy, accept_loss
from specflow.margins import Margins, audit
from specflow.origin import law_of, weights_of
from specflow.paths import along_paths, last_rows, path_by_path
from specflow.policies import EGAG, SVIP, AdaEDL, Heuristic, Stop, StopAfter, Unsure, drafter_law, meter_of
from specflow.predictors import (
    OneByOne,
    RescoreNearTies,
    Resumed,
    UncachedPredictor,
    early_exit,
    layer_skip,
    margins_of,
)
from specflow.protocols import Limits, checked_limits
from specflow.randomness import Randomness
from specflow.spec_paths import install_spec_paths
from specflow.state import Committed, Count, Reason, Request, Tally, parents_of
from specflow.steps import constrained_step, lossy_unadjusted_step
from specflow.trace import DraftTrace, Fate, Recorder, StepTrace, Trace
from specflow.trees import preorder
from specflow.usage import Details, Positions, Usage
from specflow.vocabulary import SharedTokens, Spelling, alike, fit, fitted, shared_vocabulary

PLACES: Final = ("specflow", *[f"specflow.{each.name}" for each in iter_modules(s.__path__) if each.name[0] != "_"])
"""The packages and modules whose names are public: all that are one import deep."""

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
        if home.startswith("specflow") and (is_package or home == module.__name__):
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
        for value in names_of(import_module(place)):
            if not isinstance(value, type | type(public)):
                continue
            key = f"{value.__module__}.{value.__qualname__}".removeprefix("specflow.")
            found[key] = value
            if isinstance(value, type) and EXEMPT.get(key, BY_STAGES) == BY_STAGES:
                found.update(methods_of(value))
    return found


# Small worlds.

FOLDER: Final = Path(mkdtemp())
atexit.register(rmtree, FOLDER, ignore_errors=True)

V: Final = 5
TEXT: Final = (1, 2, 1)


@cache
def llama(seed: int = 0, device: str = "cpu", layers: int = 1) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
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


class Letters:
    """A tokenizer of letters."""

    all_special_ids = (2,)

    def __init__(self, first: str = "a") -> None:
        self.first = ord(first)

    def __len__(self) -> int:
        return 16

    def convert_ids_to_tokens(self, ids: int, /) -> str:
        return chr(self.first + ids)

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        return [ord(character) - self.first for character in text if 0 <= ord(character) - self.first < 16]


def spelling(size: int = V, first: str = "a") -> Spelling:
    return Spelling.of(Letters(first), size)


def shared(target: int = V, own: int = V) -> SharedTokens:
    return SharedTokens(spelling(target), spelling(own, "b"))


def lettered(first: str = "a") -> models.Loaded:
    names = {chr(ord(first) + i): i for i in range(16)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token=first))
    return models.Loaded(llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="c"))


def chatty() -> models.Loaded:
    loaded = lettered()
    loaded.tokenizer.chat_template = "a{{ messages[0]['content'] }}b"
    return loaded


TARGET: Final = testing.TableModel(V)
GREEDY: Final = s.GreedyProcessor()
SAMPLED: Final = s.MultinomialProcessor(1.0)
BAG: Final = BlackBox(torch.full((V,), 0.2), lambda probs: probs.argmax(-1, keepdim=True))
EVEN: Final = s.Categorical(torch.full((V,), 0.2))
LOGITS: Final = torch.arange(5.0)
CHAIN: Final = s.chain((1, 2))
TREE: Final[tuple[s.Proposal[s.PointMass], ...]] = (
    s.Proposal(1),
    s.Proposal(2, parent=s.TEXT),
    s.Proposal(3, parent=0),
)
CERTAIN: Final = testing.Case(2, (0,), 2)


@cache
def head_folder() -> Path:
    """A linear head for `llama()`."""
    folder = FOLDER / "head"
    folder.mkdir()
    shapes = {"mix.weight": (8, 8), "carry.weight": (8, 8), "token.weight": (8, 8), "token.bias": (8,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"specflow_head": "jump", "layers": [1], "vocab_size": 16}')
    return folder


def train(recipe: Recipe) -> object:
    return distill(llama(), [[3, 4], [5, 6, 7]], mkdtemp(dir=FOLDER), recipe)


@cache
def linear_head() -> Jump:
    """A linear head for `TARGET`."""
    torch.manual_seed(0)
    size = TARGET.width
    made = Jump(size, Vocabulary(V, V), (0,), torch.nn.Embedding(V, size), torch.nn.Linear(size, V))
    return made.double().eval().requires_grad_(False)


def head_parts() -> dict[str, Any]:
    """What heads over `TARGET` are made of."""
    size = TARGET.width
    parts = {"embed_tokens": torch.nn.Embedding(V, size), "lm_head": torch.nn.Linear(size, V)}
    return {"vocabulary": Vocabulary(V, V), "reads": (0,), **parts}


def head_shape() -> Shape:
    return Shape(TARGET.width, 8, 2, 1, 2)


def headed() -> HeadPredictor:
    return HeadPredictor(linear_head(), TARGET)


def begun() -> s.DecodeState:
    return s.start(TEXT, 3).unwrap()


def drafter(tokens: s.Tokens) -> Iterator[s.Proposal[s.PointMass]]:
    yield s.Proposal(1, s.PointMass(1), logits=LOGITS)
    yield s.Proposal(2, s.PointMass(2), logits=LOGITS)


def tree(tokens: s.Tokens) -> Iterator[s.Proposal[s.PointMass]]:
    yield from TREE


def weighed(tokens: s.Tokens) -> Iterator[s.Proposal[s.PointMass]]:
    """A tree that tells its chances."""
    for draft, chance in zip(TREE, (0.5, 0.3, 0.2), strict=True):
        yield evolve(draft, chance=chance)


def drawn(tokens: s.Tokens) -> Iterator[s.Proposal[s.Categorical]]:
    """Two siblings, and one behind the first of them."""
    yield s.Proposal(1, EVEN, s.TEXT)
    yield s.Proposal(2, EVEN, s.TEXT)
    yield s.Proposal(3, EVEN, 0)


def meter() -> s.CostMeter:
    made = s.CostMeter()
    for k in (1, 1, 2, 3):
        made.note(k, 1.0)
    return made


def storage() -> s.NGramStorage:
    made = s.NGramStorage(2, V)
    made.initialize([1, 2, 1, 3])
    return made


def bigrams() -> Bigrams:
    return Bigrams(numpy.array([[1, 2]] * V), numpy.array([[0.5, 0.25]] * V))


def table_file(name: str = "table.safetensors") -> Path:
    path = FOLDER / name
    bigrams().save(path)
    return path


def recycled() -> Recycled:
    made = Recycled(V)
    made.learn([TEXT, (2,)], [[(1, 0.5), (2, 0.25)], [(1, 0.5)]])
    return made


def recycled_file() -> Path:
    path = FOLDER / "recycled.safetensors"
    recycled().save(path)
    return path


def recall(made: Recycled) -> object:
    made.learn([TEXT], [[(1, 0.5)]])
    made.save(FOLDER / "other")
    return draft(RecyclingTree(made)), draft(s.LookupTree(made))


def texts() -> Corpus:
    return Corpus.of([(1, 2, 1, 3), (2, 1)], V)


def corpus_file() -> Path:
    path = FOLDER / "corpus.safetensors"
    texts().save(path)
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


def kept() -> KVCache:
    return KVCache(torch.zeros(1, 2, 1, 4, 2), 3)


def deep() -> PreTrainedModel:
    return llama(layers=2)


def warm(predictor: s.Predictor) -> Any:  # noqa: ANN401 - it may have methods that the types do not know yet
    predictor(TEXT, ())
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
    return s.seed_coupled_step(propose_nothing, world.target, world.processor, world.noise)


def flip(world: testing.World) -> bool:
    return world.rng.accept(0.5)


# What is done with a result.

Use: TypeAlias = Callable[[Any], object]


def nothing(result: object) -> None:
    """The result is all there is to it."""


def decode(step: s.Step) -> object:
    return s.run(step, begun())


RULES: Final = (s.Match, s.Reject, s.Block, s.Traverse)


def decode_from(state: s.DecodeState) -> object:
    for policy in (EGAG(), Heuristic(), s.CostAware(meter(), 2)):
        for proposer in (drafter, weighed):
            s.run(speculative(proposer, gamma=policy), state)
    return None


def draft(proposer: s.Drafter) -> object:
    list(islice(proposer(TEXT), 3))
    for policy in (s.Fixed(3), s.CostAware(meter(), 2)):
        decode(speculative(proposer, gamma=policy))
    return None


def say(proposal: s.Proposal) -> object:
    for policy in (s.Fixed(), EGAG(), Heuristic(), StopAfter(Unsure()), s.CostAware(meter(), 2)):
        decode(speculative(lambda tokens: iter((proposal,)), gamma=policy))

    def said(tokens: s.Tokens) -> Iterator[Any]:
        yield proposal

    for combined in (
        as_chain(said),
        s.at_most(2, said),
        s.first_of(said),
        s.longest(said),
        merged(said),
        s.then(said, said),
    ):
        decode(speculative(combined))
    return None


def say_drafts(proposals: tuple[s.Proposal, ...]) -> object:
    return decode(speculative(lambda tokens: iter(proposals)))


def pace(policy: s.GammaPolicy) -> object:
    policy((proposal for proposal in drafter(TEXT)), begun())
    for proposer in (drafter, tree, weighed, drawn):
        decode(speculative(proposer, gamma=policy))
    return None


def end(condition: Stop) -> object:
    return pace(StopAfter(condition, s.Fixed(3)))


@final
@frozen
class Made:
    """A processor that makes one law of everything."""

    law: Distribution

    def laws(self, tokens: s.Tokens, logits: torch.Tensor, /) -> tuple[Distribution, ...]:
        """The law, for each row."""
        return (self.law,) * len(logits)


def obey(law: Distribution) -> object:
    for rule in RULES:
        for proposer in (drafter, drawn):
            decode(s.verified_step(proposer, TARGET, Made(law), s.Dice(), rule(s.Dice())))
    decode(accept_loss(lossy_unadjusted_step(drawn, TARGET, Made(law), s.Dice())))
    return decode(s.autoregressive_step(TARGET, Made(law), s.Dice()))


def obey_q(q: Distribution) -> object:
    """As the law of a draft."""
    for rule in RULES:
        step = s.verified_step(lambda tokens: iter((s.Proposal(1, q),)), TARGET, SAMPLED, s.Dice(), rule(s.Dice()))
        decode(step)
    return None


def process(processor: s.Processor) -> object:
    laws = processor.laws(TEXT, torch.zeros(2, V))
    assert [laws[0], laws[1]]
    return decode(s.speculative_step(drafter, TARGET, processor, s.Dice()))


def roll(rng: Randomness) -> object:
    for rule in RULES:
        decode(s.verified_step(drawn, TARGET, SAMPLED, rng, rule(rng)))
    return None


def predict(predictor: s.Predictor) -> object:
    for drafts in ((), CHAIN, TREE):
        predictor(TEXT, drafts)
    for proposer in (drafter, tree):
        decode(s.speculative_step(proposer, predictor, GREEDY, s.Dice()))
    return None


def predict_ids(predictor: s.Predictor) -> object:
    return predictor(TEXT, CHAIN)


def timed(clocked: s.CostMeter) -> object:
    for _ in range(3):
        predict(clocked.timed(TARGET))
    return clocked.seconds(3), clocked.stale, pace(s.CostAware(clocked, 2))


def note(k: int, seconds: float) -> object:
    made = meter()
    made.note(k, seconds)
    return made.seconds(3), pace(s.CostAware(made, 2))


ABC: Final = (b"a", b"b", b"c", b"d", b"")
WORDS: Final = constraints.Grammar.regex("[abcd]*", ABC, stop=(4,))


class Even:
    """An engine that lets everything through."""

    def mask(self) -> torch.Tensor:
        return torch.ones(V, dtype=torch.bool)

    def take(self, token: int, /) -> bool:
        return True

    def back(self, count: int, /) -> None:
        """There is nothing to go back by."""

    def forced(self) -> s.Tokens:
        return ()

    def may_end(self) -> bool:
        return True


def answer() -> constraints.Constraint:
    return WORDS.after((1,))


WISHES: Final[tuple[tuple[Any, dict[str, object]], ...]] = (
    (constraints.BannedWords, {"words": [(1, 2), (3,)]}),
    (constraints.FrequencyPenalty, {"penalty": 0.5, "begins": 1}),
    (constraints.LogitBias, {"bias": {1: 0.5}}),
    (constraints.MinLength, {"least": 4, "stop": (4,), "begins": 1}),
    (constraints.NoRepeatNGram, {"n": 2}),
    (constraints.PresencePenalty, {"penalty": 0.5, "begins": 1}),
    (constraints.RepetitionPenalty, {"penalty": 1.5, "begins": 1}),
    (constraints.RequiredWords, {"words": [(1, 2), (3,)], "stop": (4,), "begins": 1}),
)


def obey_grammar(constraint: constraints.Constraint) -> object:
    """As a law, as drafts, and as a stage."""
    dice, end = s.Dice(), stages.ending(constraint.is_over)
    draft, cut, adjust = (
        stages.Draft(constraints.Forced(constraint)),
        constraints.CutForbidden(constraint),
        stages.Adjust(dice),
    )
    verify = stages.Verify(TARGET, constraints.Constrained(SAMPLED, constraint), s.Match(dice))
    state = s.start((1,), 3, stop=(4,)).unwrap()
    constraint.is_complete(state)
    return s.run(lambda state: state.then(draft).then(cut).then(verify).then(adjust).then(end), state)


def drafted() -> s.Drafted:
    return s.Drafted(begun(), TREE)


def scored(proposer: s.Drafter = tree) -> s.Scored:
    return stages.Score(TARGET, SAMPLED)(s.Drafted(begun(), tuple(proposer(TEXT))))


def judge(rule: s.Rule) -> object:
    for proposer in (drafter, tree, drawn):
        stages.Adjust(s.Dice())(stages.Judge(rule)(scored(proposer)))
    return rule(scored())


def judge_in_loss(rule: stages.LossyRule) -> object:
    for proposer in (drafter, tree, drawn):
        stages.LossyJudge(rule)(scored(proposer)).map(stages.Adjust(s.Dice()))
    return rule(scored())


def verify(record: s.Drafted) -> object:
    for rule in RULES:
        record.then(stages.Verify(TARGET, SAMPLED, rule(s.Dice()))).then(stages.Adjust(s.Dice()))
    return None


def verified() -> s.Verified:
    return scored(drafter).then(stages.Judge(s.Reject(s.Dice())))


def adjusted() -> s.Adjusted:
    return verified().then(stages.Adjust(s.Dice()))


def finish(record: s.Adjusted) -> object:
    for stage in (stages.StopWhen(stages.never), stages.StopWhen(lambda state: False)):
        stage(record).then(stages.commit).then(stages.advance)
    return record.then(stages.ending())


def committed() -> Committed:
    return adjusted().then(stages.commit)


def draft_parts() -> dict[str, object]:
    return {"token": 1, "parent": s.TEXT, "q": 0.5, "p": 1.0, "fate": Fate.ACCEPTED, "source": "toy"}


def kept_drafts() -> tuple[DraftTrace, ...]:
    return DraftTrace(1, s.TEXT, 0.5, 1.0, Fate.ACCEPTED, "toy"), DraftTrace(2, 0, None, 0.0, Fate.REJECTED, "toy")


def kept_trace(first: DraftTrace | None = None) -> Trace:
    drafts = kept_drafts() if first is None else (first,)
    tokens = tuple([draft.token for draft in drafts if draft.fate is Fate.ACCEPTED])
    return Trace(TEXT, (StepTrace((*tokens, 3), drafts),))


def trace_file() -> Path:
    kept_trace().save(FOLDER / "trace.json")
    return FOLDER / "trace.json"


def show(trace: Trace) -> object:
    trace.save(FOLDER / "shown.json")
    assert Trace.load(FOLDER / "shown.json") == trace
    quiet().print(trace)
    return trace.html(), str(trace), trace.tally


def record(recorder: Recorder) -> object:
    decode(speculative(recorder.drafting(drafter), observe=recorder))
    return show(recorder.trace)


def watch(observer: s.stages.Observer) -> object:
    return observer(committed())


def until(condition: stages.Condition) -> object:
    condition(begun())
    return decode(speculative(until=condition))


def search(step: beam.BeamStep, beams: beam.Beams | None = None) -> object:
    outcome: beam.Beams | s.Finished = beam.Beams(Request(TEXT, 6)) if beams is None else beams
    while isinstance(outcome, beam.Beams):
        outcome = step(outcome)
    return outcome


def until_nine(state: s.DecodeState) -> bool:
    return len(state.tokens) >= 9


def nothing_new(committed: Committed) -> Committed:
    return committed


def judge_score(score: s.Scored) -> object:
    return [rule(s.Dice())(score) for rule in RULES]


def rows_of_beams(texts: tuple[s.Tokens, ...]) -> torch.Tensor:
    return torch.cat([TARGET(text, ()) for text in texts])


def read_many(asked: Any) -> list[batch.Reply]:  # noqa: ANN401 - hostile values among them
    return [TARGET(each.tokens, each.drafts) for each in asked]


def answered(answers: Any) -> object:  # noqa: ANN401 - whatever came
    """The answers of a batch, whose errors are those of its texts."""
    for answer in answers:
        error = answer.error if isinstance(answer, batch.Failed) else answer
        if isinstance(error, Exception):
            raise error
    return answers


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


def setting(**parts: object) -> catalogue.Setting:
    good: dict[str, Any] = {"model": llama(), "vocab_size": 16, "text": TEXT, "processor": SAMPLED, "rng": s.Dice()}
    return catalogue.Setting(**good | {"assistant": llama(1)} | parts)


def take(given: catalogue.Setting) -> object:
    """What every drafter of the catalogue makes of it."""
    for name, entry in catalogue.DRAFTERS.items():
        drafting = entry.make()(given)
        if name in ("llm", "ngram", "retokenised", "tree", "recycle", "logits"):
            decode(stepped(drafting=drafting, target=along_paths(lambda tokens: torch.zeros(16))))
    return None


def stepped(**parts: object) -> s.Step:
    rng = s.Dice()
    good: dict[str, Any] = {
        "drafting": catalogue.Drafting(drafter),
        "gamma": s.Fixed(2),
        "target": TARGET,
        "processor": SAMPLED,
        "rng": rng,
        "rule": s.Reject(rng),
    }
    return catalogue.step_of(**good | parts)


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


def reading() -> dict[str, object]:
    return {"tokens": TEXT, "drafts": TREE}


STEP: Final[Mapping[str, object]] = {"observe": stages.unobserved, "until": stages.never}
DRAFTING: Final[Mapping[str, object]] = {**STEP, "gamma": s.Fixed(2), "prune": ()}
SCORED: Final[Mapping[str, object]] = {"target": TARGET, "processor": SAMPLED}
JUDGED: Final[Mapping[str, object]] = {**SCORED, "rng": s.Dice()}

STORAGE: Final = s.NGramStorage.__mro__[1].__name__


@cache
def recorded() -> replay.Recording:
    return replay.record(TARGET, [TEXT], 3, kept=2)


def recording_file(name: str = "recording.safetensors") -> Path:
    path = FOLDER / name
    recorded().save(path)
    return path


def again(made: replay.Decoder) -> object:
    return replay.replay(recorded(), made, most=1).regret


def again_of(recording: replay.Recording) -> object:
    return replay.replay(recording, replay.Decoder.of(drafter), most=1).regret_of_steps


TABLE: Final[dict[str, Entry]] = {
    # batch
    "batch.hub.Asked": Entry(
        batch.Asked,
        lambda: {"tokens": TEXT, "drafts": s.chain((1,)), "by": lambda: None},
        lambda asked: answered(batch.BatchPredictor(llama()).read([asked])),
    ),
    "batch.hub.Shared": Entry(batch.Shared, lambda: {"read": read_many}, lambda shared: shared(TEXT, ())),
    "batch.hub.Shared.__call__": Entry(
        batch.Shared(batch.BatchPredictor(llama()).read), lambda: {"tokens": TEXT, "drafts": s.chain((1,))}
    ),
    "batch.hub.together": Entry(
        batch.together,
        lambda: {"decodes": [lambda: 1, lambda: 2], "slots": 2},
        lambda ends: list(islice(ends, 9)),  # what a decode raises is its own
    ),
    "batch.many.generate_many": Entry(
        batch.generate_many,
        lambda: {
            "prompts": [TEXT, (1,)],
            "target": llama(),
            "drafter": llama(1),
            "gamma": 2,
            "logits_processor": s.GreedyProcessor(),
            "max_gen_len": 2,
            "eos_tokens_id": [4],
            "seed": 1,
            "slots": 2,
            "progress": lambda number, end: None,
            "clock": perf_counter,
            "grammar": WORDS,
            "shared": shared(16, 16),
        },
    ),
    "batch.many.seed_of": Entry(batch.seed_of, lambda: {"seed": 1, "number": 2}),
    "batch.predictor.BatchPredictor": Entry(
        batch.BatchPredictor,
        lambda: {"model": llama(), "slots": 2, "piece": 8, "tokens": 20, "meter": s.CostMeter(), "features": (1,)},
        lambda made: made(TEXT, s.chain((1,))),
    ),
    "batch.predictor.BatchPredictor.__call__": Entry(
        batch.BatchPredictor(llama()), lambda: {"tokens": TEXT, "drafts": s.chain((1,))}
    ),
    "batch.predictor.BatchPredictor.features": Entry(
        batch.BatchPredictor(llama(), features=(1,)).features, lambda: {"tokens": TEXT, "last": 2}
    ),
    "batch.predictor.BatchPredictor.forget": Entry(batch.BatchPredictor(llama()).forget, dict),
    "batch.predictor.BatchPredictor.prune": Entry(batch.BatchPredictor(llama()).prune, lambda: {"tokens": TEXT}),
    "batch.predictor.BatchPredictor.read": Entry(
        batch.BatchPredictor(llama()).read, lambda: {"asked": [batch.Asked(TEXT, ())]}, answered
    ),
    # constraints
    "constraints.constrained.Constrained": Entry(
        constraints.Constrained, lambda: {"processor": SAMPLED, "constraint": answer()}, process
    ),
    "constraints.constrained.Constrained.laws": Entry(
        constraints.Constrained(SAMPLED, answer()).laws, lambda: {"tokens": TEXT, "logits": torch.zeros(2, V)}, list
    ),
    "constraints.constraint.Constraint": Entry(
        constraints.Constraint, lambda: {"start": WORDS.start(), "prompt": (1,), "stop": (4,)}, obey_grammar
    ),
    **{
        f"constraints.constraint.Constraint.{name}": Entry(getattr(answer(), name), lambda: {"tokens": TEXT})
        for name in ("at", "find")
    },
    "constraints.constraint.Constraint.allowed": Entry(
        answer().allowed, lambda: {"tokens": TEXT, "vocab_size": V}, effort=effort("vocab_size")
    ),
    "constraints.constraint.Constraint.following": Entry(
        answer().following, lambda: {"matcher": answer().at(TEXT), "token": 1}
    ),
    "constraints.constraint.Constraint.is_last": Entry(answer().is_last, lambda: {"matcher": answer().at(TEXT)}),
    **{
        f"constraints.constraint.Constraint.{name}": Entry(getattr(answer(), name), lambda: {"state": begun()})
        for name in ("is_complete", "is_over")
    },
    "constraints.forced.CutForbidden": Entry(
        constraints.CutForbidden,
        lambda: {"constraint": answer()},
        lambda cut: cut(s.Drafted(s.start(TEXT, 9, stop=(4,)).unwrap(), TREE)),
    ),
    "constraints.forced.CutForbidden.__call__": Entry(
        constraints.CutForbidden(answer()), lambda: {"drafted": s.Drafted(s.start(TEXT, 9, stop=(4,)).unwrap(), TREE)}
    ),
    "constraints.forced.Forced": Entry(constraints.Forced, lambda: {"constraint": answer(), "source": "mine"}, draft),
    "constraints.forced.Forced.__call__": Entry(constraints.Forced(answer()), lambda: {"tokens": TEXT}, list),
    "constraints.grammar.Grammar": Entry(
        constraints.Grammar,
        lambda: {"start": WORDS.start, "stop": (4,)},
        lambda grammar: obey_grammar(grammar.after((1,))),
    ),
    "constraints.grammar.Grammar.after": Entry(WORDS.after, lambda: {"prompt": TEXT}, obey_grammar),
    **{
        f"constraints.grammar.Grammar.{name}": Entry(
            getattr(constraints.Grammar, name),
            partial(dict, {argument: value, "tokenizer": ABC, "stop": (4,)}),
            lambda grammar: grammar.after((1,)).allowed((1,), V),
        )
        for name, argument, value in (
            ("choice", "texts", ("ab", "ad")),
            ("json_schema", "schema", {"type": "integer"}),
            ("lark", "text", 'start: "a" | "b"'),
            ("regex", "pattern", "a|b"),
        )
    },
    "constraints.matcher.following": Entry(
        constraints.following,
        lambda: {"make": Even},
        lambda matcher: obey_grammar(constraints.Constraint(matcher, (1,), (4,))),
    ),
    **{
        f"constraints.wishes.{kind.__name__}": Entry(
            kind, partial(dict, {"processor": SAMPLED, **more}), process, effort=effort("least", "n")
        )
        for kind, more in WISHES
    },
    **{
        f"constraints.wishes.{kind.__name__}.laws": Entry(
            kind(processor=SAMPLED, **more).laws,
            lambda: {"tokens": TEXT, "logits": torch.zeros(2, V)},
            lambda laws: list(map(laws.__getitem__, range(len(laws)))),
        )
        for kind, more in WISHES
    },
    "constraints.wishes.MinPProcessor": Entry(
        constraints.MinPProcessor, lambda: {"temperature": 1.0, "min_p": 0.3}, process
    ),
    # beam
    "beam.search.Beams": Entry(
        beam.Beams,
        lambda: {"request": Request(TEXT, 6), "live": (beam.Beam(),), "ended": None, "steps": 0},
        lambda beams: search(beam.beam_step(rows_of_beams, 2, 2), beams),
    ),
    "beam.cached.CachedBeamPredictor": Entry(
        beam.CachedBeamPredictor, lambda: {"model": llama()}, lambda made: search(beam.beam_step(made, 2, 2))
    ),
    "beam.cached.CachedBeamPredictor.__call__": Entry(
        beam.CachedBeamPredictor(llama()), lambda: {"texts": (TEXT, (1, 2, 3))}
    ),
    "beam.search.Expand": Entry(
        beam.Expand,
        lambda: {"predict": rows_of_beams, "top_k": 2},
        lambda expand: beam.Select(2)(expand(beam.Beams(Request(TEXT, 6)))),
    ),
    "beam.search.LengthPenalty": Entry(
        beam.LengthPenalty,
        lambda: {"min_length": 5.0, "alpha": 1.2},
        lambda made: (made.score(beam.Beam((1, 2), -1.0)), search(beam.beam_step(rows_of_beams, 2, 2, made))),
    ),
    "beam.search.LengthPenalty.of": Entry(lambda length: beam.LengthPenalty().of(length), lambda: {"length": 3}),
    "beam.search.LengthPenalty.score": Entry(
        lambda beam: LengthPenalty().score(beam), lambda: {"beam": beam.Beam((1,), -1.0)}
    ),
    "beam.search.LengthPenalty.best": Entry(
        lambda beam, limit: LengthPenalty().best(beam, limit), lambda: {"beam": beam.Beam((1,), -1.0), "limit": 4}
    ),
    "beam.search.Select": Entry(
        beam.Select,
        lambda: {"num_beams": 2, "penalty": LengthPenalty()},
        lambda select: select(beam.Expand(rows_of_beams, 2)(beam.Beams(Request(TEXT, 6)))),
    ),
    "beam.generate.ShowBeams": Entry(
        beam.ShowBeams,
        lambda: {"tokenizer": Words(), "console": quiet()},
        lambda show: search(beam.beam_step(rows_of_beams, 2, 2, observe=show)),
    ),
    "beam.generate.beam_search_generate": Entry(
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
    "beam.search.beam_step": Entry(
        beam_step,
        lambda: {
            "predict": rows_of_beams,
            "num_beams": 2,
            "top_k": 2,
            "penalty": LengthPenalty(),
            "observe": beam.unobserved_beams,
        },
        search,
    ),
    "beam.search.has_ended": Entry(
        beam.has_ended, lambda: {"beam": beam.Beam((1,), -1.0), "request": Request(TEXT, 6, frozenset({1}))}
    ),
    # caches and predictors
    "caches.made.LossyCache": Entry(
        LossyCache, lambda: {"make": DynamicCache}, lambda made: predict(s.CachedPredictor(llama(), made))
    ),
    "caches.made.LossyCache.__call__": Entry(LossyCache(DynamicCache)),
    **{
        f"caches.made.{tell.__name__}": Entry(tell, lambda: {"cache": key_values()})
        for tell in (caches.capacity, caches.is_empty, caches.is_plain, caches.offloads)
    },
    "caches.prune.prune_cache": Entry(prune_cache, lambda: {"cache": key_values(), "num_tokens_to_discard": 1}),
    "caches.buffer.KVCache": Entry(
        KVCache, lambda: {"buffer": torch.zeros(1, 2, 1, 4, 2), "length": 3}, lambda made: made.rollback(2)
    ),
    "caches.buffer.KVCache.rollback": Entry(lambda length: kept().rollback(length), lambda: {"length": 2}),
    "caches.buffer.KVCache.keep": Entry(
        lambda start, rows: kept().keep(start, rows), lambda: {"start": 1, "rows": [1]}
    ),
    "caches.buffer.KVCache.reserve": Entry(
        lambda length: kept().reserve(length), lambda: {"length": 9}, effort=effort("length")
    ),
    "predictors.cached.CachedPredictor": Entry(
        s.CachedPredictor,
        lambda: {"model": llama(), "make_cache": DynamicCache, "memos": 2, "features": (1,), "meter": meter()},
        predict,
    ),
    "predictors.cached.CachedPredictor.features": Entry(
        s.CachedPredictor(llama(), features=(0, 1)).features, lambda: {"tokens": TEXT, "last": 2}
    ),
    "predictors.cached.CachedPredictor.forget": Entry(lambda: warm(s.CachedPredictor(llama())).forget(), dict),
    "predictors.cached.CachedPredictor.__call__": Entry(s.CachedPredictor(llama()), reading),
    "predictors.cached.CachedPredictor.read_ahead": Entry(
        lambda tokens, most, choose: s.CachedPredictor(llama()).read_ahead(tokens, most, choose),
        lambda: {"tokens": TEXT, "most": 3, "choose": lambda logits, position: logits.argmax()},
    ),
    "predictors.cached.CachedPredictor.prune": Entry(
        lambda tokens: warm(s.CachedPredictor(llama())).prune(tokens), lambda: {"tokens": TEXT}
    ),
    "predictors.fresh.UncachedPredictor": Entry(
        UncachedPredictor, lambda: {"model": llama(), "features": (1,)}, predict
    ),
    "predictors.fresh.UncachedPredictor.features": Entry(
        UncachedPredictor(llama(), features=(0, 1)).features, lambda: {"tokens": TEXT, "last": 2}
    ),
    "predictors.skip.layer_skip": Entry(
        layer_skip, lambda: {"model": llama(), "skip": ()}, lambda made: predict(s.CachedPredictor(made))
    ),
    "predictors.early.early_exit": Entry(
        early_exit, lambda: {"model": deep(), "layers": 1, "memos": 2}, lambda made: predict(Resumed(deep(), made))
    ),
    "predictors.early.Resumed": Entry(
        Resumed, lambda: {"model": deep(), "early": early_exit(deep(), 1), "memos": 2}, predict
    ),
    "predictors.early.Resumed.__call__": Entry(Resumed(deep(), early_exit(deep(), 1)), reading),
    "predictors.early.Resumed.forget": Entry(lambda: warm(Resumed(deep(), early_exit(deep(), 1))).forget(), dict),
    "predictors.early.Resumed.prune": Entry(
        lambda tokens: warm(Resumed(deep(), early_exit(deep(), 1))).prune(tokens), lambda: {"tokens": TEXT}
    ),
    "predictors.fresh.UncachedPredictor.__call__": Entry(UncachedPredictor(llama()), reading),
    "predictors.fresh.UncachedPredictor.prune": Entry(
        lambda tokens: UncachedPredictor(llama()).prune(tokens), lambda: {"tokens": TEXT}
    ),
    "protocols.Limits": Entry(
        Limits,
        lambda: {"vocab_size": V, "context": 9},
        lambda made: (s.start(TEXT, 3, limits=made), shared_vocabulary(made, Limits(V))),
    ),
    "protocols.checked_limits": Entry(checked_limits, lambda: {"limits": Limits(V), "name": "limits"}),
    "vocabulary.padding.fit": Entry(
        fit, lambda: {"logits": torch.zeros(2, V), "vocab_size": 7}, effort=effort("vocab_size")
    ),
    "vocabulary.padding.fitted": Entry(fitted, lambda: {"predictor": TARGET, "vocab_size": 7}, predict),
    "vocabulary.shared.SharedTokens": Entry(
        SharedTokens,
        lambda: {"target": spelling(), "drafter": spelling(V, "b")},
        lambda made: (made.read(TEXT), made.rows(torch.zeros(2, V))),
    ),
    "vocabulary.shared.SharedTokens.read": Entry(lambda tokens: shared().read(tokens), lambda: {"tokens": TEXT}),
    "vocabulary.shared.SharedTokens.rows": Entry(
        lambda logits: shared().rows(logits), lambda: {"logits": torch.zeros(2, V)}
    ),
    "vocabulary.spelling.Spelling": Entry(
        Spelling,
        lambda: {"tokens": (b"a", b"b"), "encode": lambda text: [0], "begin": (0,), "special": frozenset({1})},
        lambda made: (
            made.spell("a"),
            made.after(b"a", b"a"),
            draft(Retokenised(drafter, SharedTokens(spelling(), made))),
        ),
    ),
    "vocabulary.spelling.Spelling.of": Entry(
        Spelling.of, lambda: {"tokenizer": Letters(), "vocab_size": 20}, effort=effort("vocab_size")
    ),
    "vocabulary.spelling.Spelling.after": Entry(
        lambda before, new: spelling().after(before, new), lambda: {"before": b"ab", "new": b"a"}
    ),
    "vocabulary.spelling.Spelling.bytes_of": Entry(
        lambda tokens: spelling().bytes_of(tokens), lambda: {"tokens": TEXT}
    ),
    "vocabulary.spelling.Spelling.spell": Entry(lambda text: spelling().spell(text), lambda: {"text": "ab"}),
    "vocabulary.spelling.Spelling.spells": Entry(lambda: spelling().spells()),
    "vocabulary.spelling.alike": Entry(alike, lambda: {"target": Letters(), "drafter": Letters("b")}),
    "predictors.cached.limits_of": Entry(s.limits_of, lambda: {"model": llama()}),
    "predictors.rescore.OneByOne": Entry(OneByOne, lambda: {"predictor": TARGET, "prompt": 3}, predict),
    "predictors.rescore.OneByOne.__call__": Entry(OneByOne(TARGET, 2), reading),
    "predictors.rescore.RescoreNearTies": Entry(
        RescoreNearTies,
        lambda: {"target": TARGET, "single": TARGET, "below": 0.1, "processor": s.GreedyProcessor(), "stop": (4,)},
        predict,
    ),
    "predictors.rescore.RescoreNearTies.__call__": Entry(RescoreNearTies(TARGET, TARGET, 0.1), reading),
    "predictors.rescore.margins_of": Entry(margins_of, lambda: {"logits": torch.zeros(2, V)}),
    "margins.Margins": Entry(Margins, lambda: {"recorded": []}, watch),
    "margins.Margins.__call__": Entry(Margins(), lambda: {"committed": committed()}),
    "trace.parts.DraftTrace": Entry(DraftTrace, draft_parts, lambda made: show(kept_trace(made))),
    "trace.parts.StepTrace": Entry(
        StepTrace,
        lambda: {
            "tokens": (1, 3),
            "drafts": kept_drafts(),
            "margins": (0.5, None),
            "seconds": 2.0,
            "drafting": 0.5,
            "reading": 1.0,
        },
        lambda made: (made.rejected(), show(Trace(TEXT, (made,)))),
    ),
    "trace.parts.StepTrace.rejected": Entry(kept_trace().steps[0].rejected),
    "trace.trace.Trace": Entry(
        Trace,
        lambda: {
            "prompt": TEXT,
            "steps": kept_trace().steps,
            "words": {1: b"a"},
            "about": {"a": "b"},
            "reason": Reason.STOP,
        },
        show,
    ),
    "trace.trace.Trace.save": Entry(lambda path: kept_trace().save(path), lambda: {"path": FOLDER / "other.json"}),
    "trace.trace.Trace.load": Entry(Trace.load, lambda: {"path": trace_file()}),
    "trace.trace.Trace.html": Entry(lambda beside: kept_trace().html(beside), lambda: {"beside": kept_trace()}),
    "trace.trace.Trace.save_html": Entry(
        lambda path, beside: kept_trace().save_html(path, beside),
        lambda: {"path": FOLDER / "other.html", "beside": kept_trace()},
    ),
    "trace.record.Recorder": Entry(
        Recorder, lambda: {"tokenizer": Words(), "about": {"a": "b"}, "clock": perf_counter}, record
    ),
    "trace.record.Recorder.__call__": Entry(Recorder(), lambda: {"committed": committed()}),
    "trace.record.Recorder.drafting": Entry(Recorder().drafting, lambda: {"drafter": drafter}, draft),
    "trace.record.Recorder.reading": Entry(Recorder().reading, lambda: {"target": TARGET}, predict),
    "margins.audit": Entry(audit, lambda: {"tokens": [1, 2, 3, 4], "model": llama(), "prompt": 2}),
    # laws, processors, randomness
    "distribution.BlackBox": Entry(
        BlackBox, lambda: {"probs": EVEN.probs, "sample": BAG.sample}, lambda law: (obey(law), obey_q(law))
    ),
    "distribution.BlackBox.draw": Entry(BAG.draw),
    "distribution.Categorical": Entry(
        s.Categorical, lambda: {"probs": EVEN.probs, "by": None}, lambda law: (obey(law), obey_q(law))
    ),
    "distribution.Categorical.entropy": Entry(EVEN.entropy),
    "distribution.PointMass": Entry(s.PointMass, lambda: {"token": 1}, lambda law: (obey(law), obey_q(law))),
    "distribution.PointMass.entropy": Entry(lambda: s.PointMass(1).entropy()),
    "distribution.max_fn": Entry(max_fn, lambda: {"x": torch.tensor([0.5, -0.5])}),
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
    "processors.EachPrefix": Entry(s.EachPrefix, lambda: {"law": lambda tokens, logits: EVEN}, process),
    "processors.EachPrefix.laws": Entry(
        lambda tokens, logits: s.EachPrefix(lambda text, row: EVEN).laws(tokens, logits)[0],
        lambda: {"tokens": TEXT, "logits": torch.zeros(2, V)},
    ),
    "laws.Lazily": Entry(
        Lazily,
        lambda: {"rows": 2, "make": lambda row: EVEN},
        lambda laws: [laws[row] for row in range(len(laws))],
        effort("rows"),
    ),
    "randomness.Dice": Entry(s.Dice, lambda: {"generator": None}, roll),
    "randomness.Dice.draw": Entry(
        lambda law, position: s.Dice().draw(law, position), lambda: {"law": EVEN, "position": 3}
    ),
    "randomness.Dice.draw_there": Entry(
        lambda probs, position: s.Dice().draw_there(probs, position), lambda: {"probs": EVEN.probs, "position": 3}
    ),
    "randomness.Dice.accept": Entry(lambda probability: s.Dice().accept(probability), lambda: {"probability": 0.5}),
    "randomness.SharedNoise": Entry(
        s.SharedNoise, lambda: {"seed": 3}, lambda rng: decode(s.seed_coupled_step(drafter, TARGET, SAMPLED, rng))
    ),
    "randomness.SharedNoise.draw": Entry(
        lambda law, position: s.SharedNoise(1).draw(law, position), lambda: {"law": EVEN, "position": 3}
    ),
    "randomness.SharedNoise.draw_there": Entry(
        lambda probs, position: s.SharedNoise(1).draw_there(probs, position),
        lambda: {"probs": EVEN.probs, "position": 3},
    ),
    # drafters
    "drafters.bigrams.Bigrams": Entry(
        Bigrams,
        lambda: {"tokens": bigrams().tokens, "chances": bigrams().chances},
        lambda made: draft(s.LookupTree(made)),
    ),
    "drafters.bigrams.Bigrams.of": Entry(
        Bigrams.of,
        lambda: {"target": TARGET, "before": (1,), "vocab_size": V, "k": 2},
        effort=effort("vocab_size"),
    ),
    "drafters.bigrams.Bigrams.after": Entry(lambda tokens: bigrams().after(tokens), lambda: {"tokens": TEXT}),
    "drafters.bigrams.Bigrams.save": Entry(lambda path: bigrams().save(path), lambda: {"path": table_file("other")}),
    "drafters.bigrams.Bigrams.load": Entry(Bigrams.load, lambda: {"path": table_file()}),
    "drafters.block.GreedyBlockDrafter": Entry(
        GreedyBlockDrafter,
        lambda: {"predictor": s.CachedPredictor(llama()), "ahead": 2, "vocab_size": V, "source": "block"},
        draft,
    ),
    "drafters.block.GreedyBlockDrafter.__call__": Entry(
        lambda tokens: list(islice(GreedyBlockDrafter(s.CachedPredictor(llama()))(tokens), 3)),
        lambda: {"tokens": TEXT},
    ),
    "drafters.block.SampledBlockDrafter": Entry(
        SampledBlockDrafter,
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
        lambda tokens: list(islice(SampledBlockDrafter(s.CachedPredictor(llama()), SAMPLED, s.Dice())(tokens), 3)),
        lambda: {"tokens": TEXT},
    ),
    "drafters.combine.at_most": Entry(s.at_most, lambda: {"k": 2, "drafter": drafter}, draft),
    "drafters.combine.first_of": Entry(
        lambda one, other: s.first_of(*(one, other)), lambda: {"one": propose_nothing, "other": drafter}, draft
    ),
    "drafters.combine.longest": Entry(
        lambda one, other, most: s.longest(one, other, most=most),
        lambda: {"one": drafter, "other": drafter, "most": 3},
        draft,
    ),
    "drafters.combine.merged": Entry(
        lambda one, other: merged(*(one, other)), lambda: {"one": drafter, "other": drafter}, draft
    ),
    "drafters.combine.then": Entry(
        lambda one, other: s.then(*(one, other)), lambda: {"one": drafter, "other": drafter}, draft
    ),
    "drafters.combine.propose_nothing": Entry(lambda tokens: list(propose_nothing(tokens)), lambda: {"tokens": TEXT}),
    "drafters.intersection.IntersectionDrafter": Entry(
        IntersectionDrafter,
        lambda: {
            "predictor": TARGET,
            "shared": shared(),
            "processor": SAMPLED,
            "rng": s.Dice(),
            "context": 9,
            "source": "llm",
            "widths": (),
        },
        draft,
    ),
    "drafters.intersection.IntersectionDrafter.__call__": Entry(
        lambda tokens: list(islice(IntersectionDrafter(TARGET, shared(), SAMPLED, s.Dice())(tokens), 5)),
        lambda: {"tokens": TEXT},
    ),
    "drafters.intersection.translated": Entry(translated, lambda: {"predictor": TARGET, "shared": shared()}, predict),
    "drafters.retokenised.Retokenised": Entry(
        Retokenised, lambda: {"drafter": drafter, "shared": shared(), "source": "text"}, draft
    ),
    "drafters.retokenised.Retokenised.__call__": Entry(
        lambda tokens: list(Retokenised(drafter, shared())(tokens)), lambda: {"tokens": TEXT}
    ),
    "drafters.llm.LLMDrafter.fitting": Entry(
        s.LLMDrafter.fitting,
        lambda: {
            "predictor": TARGET,
            "known": Limits(V, 20),
            "target": Limits(V, 24),
            "processor": SAMPLED,
            "rng": s.Dice(),
        },
        lambda drafter: list(islice(drafter(TEXT), 2)),
    ),
    "drafters.llm.LLMDrafter": Entry(
        s.LLMDrafter,
        lambda: {
            "predictor": TARGET,
            "processor": SAMPLED,
            "rng": s.Dice(),
            "context": 9,
            "vocab_size": V,
            "source": "llm",
            "widths": (),
        },
        lambda made: (draft(made), draft(evolve(made, widths=(2, 2)))),
    ),
    "drafters.llm.LLMDrafter.__call__": Entry(
        lambda tokens, widths: list(islice(s.LLMDrafter(TARGET, SAMPLED, s.Dice(), None, V, "", widths)(tokens), 5)),
        lambda: {"tokens": TEXT, "widths": (2, 2)},
    ),
    "drafters.lookup.PromptLookup": Entry(
        s.PromptLookup,
        lambda: {"max_matching_ngram_size": 2, "num_output_tokens": 3, "source": "lookup"},
        draft,
    ),
    "drafters.lookup.PromptLookup.__call__": Entry(
        lambda tokens: list(s.PromptLookup()(tokens)), lambda: {"tokens": TEXT}
    ),
    "drafters.ngrams.drafter.NGramDrafter": Entry(
        s.NGramDrafter, lambda: {"storage": storage(), "vocab_size": V, "source": "ngram"}, draft
    ),
    "drafters.ngrams.drafter.NGramDrafter.__call__": Entry(
        lambda tokens: list(islice(s.NGramDrafter(storage())(tokens), 3)), lambda: {"tokens": TEXT}
    ),
    "drafters.ngrams.drafter.GuessingNGramDrafter": Entry(
        GuessingNGramDrafter, lambda: {"storage": storage(), "vocab_size": V, "source": "ngram"}, draft
    ),
    "drafters.ngrams.drafter.GuessingNGramDrafter.__call__": Entry(
        lambda tokens: list(islice(GuessingNGramDrafter(storage())(tokens), 3)), lambda: {"tokens": TEXT}
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
            "read": lambda tokens: s.SuffixDrafter().read(tokens),
        }.items()
    },
    "heads.load.load_head": Entry(load_head, lambda: {"name": head_folder(), "model": llama()}),
    "heads.head.Vocabulary": Entry(
        Vocabulary, lambda: {"size": V, "known": V, "ids": torch.tensor([0, 2])}, effort=effort("size")
    ),
    "heads.layer.Shape": Entry(
        Shape,
        lambda: {
            **{"hidden": 4, "inner": 8, "heads": 2, "kv_heads": 1, "size": 2, "epsilon": 1e-6},
            **{"rope": {}, "biases": False, "normed_heads": False},
        },
    ),
    "heads.eagle.Norms": Entry(Norms, lambda: dict.fromkeys(("before_residual", "before_fc", "each", "output"), False)),
    "heads.eagle.Eagle": Entry(
        Eagle,
        lambda: {**head_parts(), "shape": head_shape(), "depth": 1, "bias": True},
        lambda made: HeadPredictor(made, TARGET),
        effort("depth"),
    ),
    "heads.eagle.Eagle3": Entry(
        Eagle3,
        lambda: {
            **{**head_parts(), "shape": head_shape(), "width": TARGET.width, "depth": 1},
            **{"norms": Norms(), "bias": False},
        },
        lambda made: HeadPredictor(made, TARGET),
        effort("depth", "width"),
    ),
    "heads.medusa.Medusa": Entry(
        Medusa,
        lambda: {"hidden": 4, "vocabulary": Vocabulary(V, V), "reads": (0,), "heads": 2, "blocks": 1, "says": V},
        lambda made: HeadPredictor(made, TARGET),
        effort("hidden", "heads", "blocks", "says"),
    ),
    "heads.jump.Jump": Entry(
        Jump, lambda: {**head_parts(), "hidden": 4}, lambda made: HeadPredictor(made, TARGET), effort("hidden")
    ),
    "heads.mtp.MTP": Entry(
        MTP,
        lambda: {
            **{**head_parts(), "hidden": 4, "layer": torch.nn.Identity(), "norm": torch.nn.Identity},
            **{"rotary": torch.nn.Identity(), "recycles_normed": True},
        },
        lambda made: HeadPredictor(made, TARGET),
        effort("hidden"),
    ),
    "heads.reading.HeadPredictor": Entry(
        HeadPredictor,
        lambda: {"head": linear_head(), "target": TARGET, "memos": 2},
        lambda made: made(TEXT, CHAIN),
    ),
    "heads.reading.HeadPredictor.__call__": Entry(
        lambda tokens, drafts: headed().__call__(tokens, drafts), lambda: {"tokens": TEXT, "drafts": CHAIN}
    ),
    "heads.reading.HeadPredictor.rows": Entry(
        lambda tokens, drafts, last: headed().rows(tokens, drafts, last),
        lambda: {"tokens": TEXT, "drafts": CHAIN, "last": 2},
    ),
    "heads.reading.HeadPredictor.reach": Entry(lambda tokens: headed().reach(tokens), lambda: {"tokens": TEXT}),
    "heads.reading.HeadPredictor.forget": Entry(lambda: headed().forget()),
    "heads.drafter.HeadDrafter": Entry(
        HeadDrafter,
        lambda: {"predictor": headed(), "processor": SAMPLED, "rng": s.Dice(), "widths": (2,), "source": "head"},
        draft,
    ),
    "heads.drafter.HeadDrafter.__call__": Entry(
        lambda tokens: list(islice(HeadDrafter(headed(), SAMPLED, s.Dice())(tokens), 3)), lambda: {"tokens": TEXT}
    ),
    "heads.drafter.HeadTree": Entry(
        HeadTree, lambda: {"predictor": headed(), "beam": 2, "depth": 2, "source": "head"}, draft
    ),
    "heads.drafter.HeadTree.__call__": Entry(
        lambda tokens: list(islice(HeadTree(headed(), 2, 2)(tokens), 3)), lambda: {"tokens": TEXT}
    ),
    "distill.train.Recipe": Entry(
        Recipe,
        lambda: {
            "drafts": 8,
            "ahead": 2,
            "steps": 1,
            "texts": 1,
            "rate": 0.01,
            "every": 1,
            "held_out": 2,
            "new_tokens": 3,
            "seed": 0,
        },
        train,
        effort("steps", "texts", "new_tokens"),
    ),
    "distill.jump.fit_jump": Entry(
        fit_jump,
        lambda: {
            "model": llama(),
            "texts": [[3, 4, 5, 6], [5, 6, 7]],
            "out": mkdtemp(dir=FOLDER),
            "layers": (1,),
            "ridge": 0.01,
        },
    ),
    "distill.prompts.made_up": Entry(
        made_up,
        lambda: {"loaded": chatty(), "count": 2, "seed": 0, "most": 3, "told": lambda done: None, "reading": llama()},
        effort=effort("count", "most"),
    ),
    "distill.prompts.kept_prompts": Entry(
        kept_prompts,
        lambda: {
            "loaded": chatty(),
            "count": 2,
            "seed": 0,
            "out": mkdtemp(dir=FOLDER),
            "told": lambda done: None,
            "reading": llama(),
        },
        effort=effort("count"),
    ),
    "distill.train.distill": Entry(
        distill,
        lambda: {
            "model": llama(),
            "prompts": [[3, 4], [5, 6, 7]],
            "out": mkdtemp(dir=FOLDER),
            "recipe": Recipe(steps=1, new_tokens=3, held_out=2),
            "stop": (),
            "tell": lambda heard: None,
            "answered": lambda done: None,
            "learnt": lambda step: None,
            "reading": llama(),
            "resume": False,
        },
    ),
    "drafters.likeliest.Candidate": Entry(
        Candidate,
        lambda: {"token": 1, "chance": 0.5, "source": "mine"},
        lambda made: draft(lambda tokens: likeliest_first(0, lambda place: (made,), lambda place, token: token)),
    ),
    "drafters.likeliest.likeliest_first": Entry(
        likeliest_first,
        lambda: {"start": 1, "followers": lambda place: (Candidate(1, 0.5),), "after": lambda place, token: token},
        lambda stream: draft(lambda tokens: stream),
    ),
    "drafters.recycling.Recycled": Entry(
        Recycled,
        lambda: {"vocab_size": V, "k": 2, "n": 2, "max_contexts": 9, "before": bigrams()},
        recall,
    ),
    **{
        f"drafters.recycling.Recycled.{name}": Entry(call, good)
        for name, call, good in of_storages(
            ("after", lambda tokens: recycled().after(tokens), lambda: {"tokens": TEXT}),
            (
                "learn",
                lambda contexts, followers: recycled().learn(contexts, followers),
                lambda: {"contexts": [TEXT], "followers": [[(1, 0.5)]]},
            ),
            ("save", lambda path: recycled().save(path), lambda: {"path": FOLDER / "other"}),
            ("load", lambda path: recycled().load(path), lambda: {"path": recycled_file()}),
        )
    },
    "drafters.recycling.RecyclingTree": Entry(
        RecyclingTree, lambda: {"table": recycled(), "shares": (0.5, 0.2), "source": "recycled"}, draft
    ),
    "drafters.recycling.RecyclingTree.__call__": Entry(
        lambda tokens: list(islice(RecyclingTree(recycled())(tokens), 5)), lambda: {"tokens": TEXT}
    ),
    "drafters.logits.LogitTree": Entry(
        LogitTree,
        lambda: {"table": recycled(), "retrieve": drafter, "guesses": (0.5, 0.2), "source": "logits"},
        draft,
    ),
    "drafters.logits.LogitTree.__call__": Entry(
        lambda tokens: list(islice(LogitTree(recycled())(tokens), 5)), lambda: {"tokens": TEXT}
    ),
    "drafters.retrieval.Corpus": Entry(
        Corpus,
        lambda: {"vocab_size": V, "tokens": texts().tokens, "suffixes": texts().suffixes},
        lambda made: draft(CorpusTree(made)),
    ),
    **{
        f"drafters.retrieval.Corpus.{name}": Entry(call, good)
        for name, call, good in of_storages(
            ("of", Corpus.of, lambda: {"texts": [TEXT], "vocab_size": V}),
            ("find", lambda tokens, longest: texts().find(tokens, longest), lambda: {"tokens": TEXT, "longest": 3}),
            ("after", lambda tokens: texts().after(tokens), lambda: {"tokens": TEXT}),
            ("save", lambda path: texts().save(path), lambda: {"path": FOLDER / "other"}),
            ("load", Corpus.load, lambda: {"path": corpus_file(), "vocab_size": V}),
        )
    },
    "drafters.retrieval.CorpusTree": Entry(
        CorpusTree, lambda: {"corpus": texts(), "longest": 3, "shortest": 1, "source": "corpus"}, draft
    ),
    "drafters.retrieval.CorpusTree.__call__": Entry(
        lambda tokens: list(islice(CorpusTree(texts())(tokens), 5)), lambda: {"tokens": TEXT}
    ),
    "drafters.tree.LookupTree": Entry(s.LookupTree, lambda: {"followers": bigrams(), "branches": 2}, draft),
    "drafters.tree.LookupTree.__call__": Entry(
        lambda tokens: list(islice(s.LookupTree(bigrams())(tokens), 5)), lambda: {"tokens": TEXT}
    ),
    "drafters.combine.as_chain": Entry(as_chain, lambda: {"drafter": weighed, "least": 0.1}, draft),
    **{
        f"drafters.ngrams.storage.{kind.__name__}": Entry(
            kind, lambda: {"n": 2, "vocab_size": V, "max_contexts": 9}, store
        )
        for kind in (s.NGramStorage, OneLevelNGramStorage)
    },
    **{
        f"drafters.ngrams.storage.{STORAGE}.{name}": Entry(call, good)
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
            ("known", lambda tokens: list(islice(storage().known(tokens), 3)), lambda: {"tokens": TEXT}),
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
    "policies.egag.EGAG": Entry(
        EGAG, lambda: {"gamma_min": 1, "gamma_max": 3, "ema_beta": 0.5, "temperature": 1.0}, pace
    ),
    "policies.stops.SVIP": Entry(SVIP, lambda: {"h": 0.3, "c": 0.15, "temperature": 1.0}, end),
    "policies.stops.AdaEDL": Entry(AdaEDL, lambda: {"lambda_": 0.4, "temperature": 1.0}, end),
    "policies.stops.Unsure": Entry(Unsure, lambda: {"confidence": 0.4, "temperature": 1.0}, end),
    "policies.fixed.Fixed": Entry(s.Fixed, lambda: {"gamma": 2}, pace),
    "policies.fixed.Heuristic": Entry(Heuristic, lambda: {"gamma": 2, "gamma_max": 4}, pace),
    "policies.stops.StopAfter": Entry(StopAfter, lambda: {"stop": Unsure(), "within": s.Fixed(3)}, pace),
    "policies.belief.drafter_law": Entry(drafter_law, lambda: {"proposal": next(drafter(TEXT)), "temperature": 1.0}),
    **{
        f"policies.stops.{stop.__name__}.__call__": Entry(
            lambda proposal, stop=stop: stop()(proposal), lambda: {"proposal": next(drafter(TEXT))}
        )
        for stop in (SVIP, AdaEDL, Unsure)
    },
    "policies.cost.CostAware": Entry(s.CostAware, lambda: {"meter": meter(), "most": 3, "tell": nothing}, pace),
    "policies.meter.CostMeter": Entry(s.CostMeter, lambda: {"clock": iter(range(999)).__next__}, timed),
    "policies.meter.meter_of": Entry(meter_of, lambda: {"model": llama(), "slots": 2}, lambda made: made.seconds(1)),
    "policies.meter.CostMeter.timed": Entry(lambda target: meter().timed(target), lambda: {"target": TARGET}, predict),
    "policies.meter.CostMeter.note": Entry(note, lambda: {"k": 2, "seconds": 0.5}),
    "policies.meter.CostMeter.now": Entry(meter().now),
    "policies.meter.CostMeter.since": Entry(meter().since, lambda: {"began": 0.5}),
    "policies.meter.CostMeter.costs": Entry(lambda most: meter().costs(most), lambda: {"most": 3}),
    "policies.meter.CostMeter.seconds": Entry(lambda most: meter().seconds(most), lambda: {"most": 3}),
    # decodes
    "errors.DecodeError": Entry(
        s.DecodeError, lambda: {"parameter": "gamma", "happened": "it is", "received": 0, "remedy": "give 1"}, str
    ),
    "errors.DecodeError.renamed": Entry(
        lambda names: s.DecodeError("gamma", "it is", 0, "give 1").renamed(names),
        lambda: {"names": {"gamma": "k"}},
        str,
    ),
    "errors.DeadEndError": Entry(
        DeadEndError, lambda: {"parameter": "text", "happened": "it is over", "received": 0, "remedy": "end it"}, str
    ),
    "errors.unwrap": Entry(unwrap, lambda: {"result": Success(3)}),
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
            "policy": None,
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
            "policy": s.Fixed(2),
        },
    ),
    "loop.once": Entry(once, lambda: {"first": speculative(), "then": speculative()}, decode),
    "loop.run": Entry(s.run, lambda: {"step": speculative(), "state": begun()}),
    "loop.unfold": Entry(s.unfold, lambda: {"step": speculative(), "state": begun()}, unroll),
    "loop.grow": Entry(grow, lambda: {"step": speculative(), "state": begun()}, unroll),
    "loop.start": Entry(
        s.start,
        lambda: {"prompt": TEXT, "max_new_tokens": 3, "stop": (2,), "limits": Limits(V, 9)},
        lambda started: s.run(speculative(), started.unwrap()) if isinstance(started, Success) else None,
    ),
    "vocabulary.padding.shared_vocabulary": Entry(
        shared_vocabulary, lambda: {"target": Limits(V), "drafter": Limits(V)}
    ),
    "lossy.Lossy": Entry(Lossy, lambda: {"value": begun()}),
    "lossy.Lossy.map": Entry(lambda stages: Lossy(3).map(stages), lambda: {"stages": nothing}),
    "lossy.accept_loss": Entry(
        accept_loss,
        lambda: {"step": lossy_unadjusted_step(drafter, TARGET, SAMPLED, s.Dice())},
        decode,
    ),
    "spec_paths.install_spec_paths": Entry(install_spec_paths),
    # steps
    "steps.autoregressive_step": Entry(s.autoregressive_step, lambda: {**STEP, **JUDGED}, decode),
    "steps.speculative_step": Entry(s.speculative_step, lambda: {**DRAFTING, **JUDGED, "drafter": drafter}, decode),
    "steps.lossy_unadjusted_step": Entry(
        lossy_unadjusted_step,
        lambda: {**DRAFTING, **JUDGED, "drafter": drafter},
        lambda step: decode(accept_loss(step)),
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
    "steps.verified_step": Entry(
        s.verified_step, lambda: {**DRAFTING, **JUDGED, "drafter": drafter, "rule": s.Block(s.Dice())}, decode
    ),
    "steps.constrained_step": Entry(
        constrained_step,
        lambda: {**DRAFTING, **JUDGED, "answer": answer(), "drafter": drafter, "rule": s.Reject(s.Dice())},
        lambda step: s.run(step, s.start((1,), 3, stop=(4,)).unwrap()),
    ),
    # the catalogue
    "catalogue.Setting": Entry(
        catalogue.Setting,
        lambda: {
            "model": llama(),
            "vocab_size": 16,
            "text": TEXT,
            "processor": SAMPLED,
            "rng": s.Dice(),
            "assistant": llama(1),
            "bigrams": lambda: None,
            "reading": partial(s.CachedPredictor),
            "shared": shared(16, 16),
            "head": headed(),
        },
        take,
    ),
    "catalogue.Drafting": Entry(
        catalogue.Drafting,
        lambda: {"drafter": drafter, "teach": (nothing_new,), "memos": (UncachedPredictor(llama()),)},
        lambda made: decode(stepped(drafting=made)),
    ),
    "catalogue.Entry": Entry(
        catalogue.Entry,
        lambda: {"make": lambda: lambda given: None, "assisted": False, "bigrams": False, "headed": False},
    ),
    "catalogue.step_of": Entry(
        catalogue.step_of,
        lambda: {
            "drafting": catalogue.Drafting(drafter),
            "gamma": s.Fixed(2),
            **SCORED,
            "rng": s.Dice(),
            "rule": s.Reject(s.Dice()),
            "prune": (UncachedPredictor(llama()),),
            "until": stages.never,
            "cut": catalogue.all_drafts,
            "observe": stages.unobserved,
        },
        decode,
    ),
    "catalogue.all_drafts": Entry(catalogue.all_drafts, lambda: {"drafted": drafted()}),
    # replay
    "origin.weights_of": Entry(weights_of, lambda: {"model": llama()}),
    "origin.law_of": Entry(law_of, lambda: {"processor": SAMPLED}),
    "replay.recording.Costs": Entry(
        replay.Costs,
        lambda: {"lengths": (1, 2), "seconds": (1.0, 1.5), "prompt": 2.0, "own": 0.1},
        lambda costs: [costs.of(k) for k in (1, 2, 9)],
    ),
    "replay.recording.Costs.of": Entry(replay.Costs().of, lambda: {"k": 2}),
    "replay.recording.Costs.begin": Entry(replay.Costs().begin, lambda: {"k": 2}),
    "replay.recording.RecordedText": Entry(
        replay.RecordedText,
        lambda: {
            "prompt": TEXT,
            "output": (2, 1),
            "limit": 6,
            "stop": frozenset({3}),
            "seed": 1,
            "costs": replay.Costs(),
        },
        lambda text: again_of(replay.Recording((text,), V)),
    ),
    "replay.recording.RecordedText.state": Entry(
        replay.RecordedText(TEXT, (2,), 6).state, lambda: {"vocab_size": V}, decode_from
    ),
    "replay.recording.Recording": Entry(
        replay.Recording,
        lambda: {
            "texts": recorded().texts,
            "vocab_size": V,
            "temperature": 0.5,
            "kept": 2,
            "rows": recorded().rows,
            "facts": {"model": "a table"},
            "origin": {"model": "a table"},
        },
        lambda made: (made.save(FOLDER / "other recording"), again_of(made)),
    ),
    "replay.recording.Recording.knowing": Entry(recorded().knowing, lambda: {"rows": recorded().rows}, again_of),
    "replay.recording.Recording.save": Entry(
        lambda path: recorded().save(path), lambda: {"path": recording_file("another recording")}
    ),
    "replay.recording.Recording.load": Entry(replay.Recording.load, lambda: {"path": recording_file()}),
    "replay.record.record": Entry(
        replay.record,
        lambda: {
            "target": TARGET,
            "prompts": [TEXT, (3,)],
            "max_new_tokens": 3,
            "stop": (4,),
            "limits": Limits(V, 24),
            "processor": SAMPLED,
            "seed": 1,
            "kept": 2,
            "lengths": (1, 2),
            "onto": None,
            "facts": {"model": "a table"},
            "progress": lambda recording: None,
            "clock": perf_counter,
            "origin": {"model": "a table"},
        },
        again_of,
        effort("max_new_tokens"),
    ),
    "replay.played.Decoder": Entry(
        replay.Decoder,
        lambda: {
            "make": lambda given: catalogue.Drafting(drafter),
            "policy": lambda meter: s.Fixed(2),
            "rule": s.Match(s.Dice()),
        },
        again,
    ),
    "replay.played.Decoder.of": Entry(
        replay.Decoder.of, lambda: {"drafter": drafter, "gamma": s.Fixed(2), "rule": s.Reject(s.Dice())}, again
    ),
    "replay.played.replay": Entry(
        replay.replay,
        lambda: {
            "recording": recorded(),
            "decoder": replay.Decoder.of(drafter),
            "live": TARGET,
            "processor": GREEDY,
            "most": 2,
            "clock": perf_counter,
        },
        lambda played: (played.regret, played.tally),
        effort("most"),
    ),
    # records that users make
    "state.Request": Entry(
        Request,
        lambda: {"prompt": TEXT, "limit": 6, "stop": frozenset({2}), "vocab_size": V},
        lambda request: s.run(speculative(), s.DecodeState(request, TEXT)),
    ),
    "state.DecodeState": Entry(
        s.DecodeState,
        lambda: {"request": Request(TEXT, 5), "tokens": TEXT, "pace": (), "tally": Tally()},
        decode_from,
    ),
    "state.Count": Entry(
        Count,
        lambda: {"drafted": 2, "accepted": 1},
        lambda count: decode_from(evolve(begun(), tally=Tally(1, (("draft", count),)))),
    ),
    "state.Tally": Entry(
        Tally,
        lambda: {"steps": 1, "sources": (("draft", Count(2, 1)),), "judged_at": (1, 1), "accepted_at": (1,)},
        lambda tally: decode_from(evolve(begun(), tally=tally)),
    ),
    "usage.Details": Entry(Details, lambda: {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 2}),
    "usage.Positions": Entry(Positions, lambda: {"judged": (2, 1), "accepted": (1, 0)}),
    "usage.Positions.of": Entry(Positions.of, lambda: {"tally": Tally()}),
    "usage.Usage": Entry(
        Usage,
        lambda: {
            "prompt_tokens": 1,
            "completion_tokens": 3,
            "total_tokens": 4,
            "completion_tokens_details": Details(1, 1),
        },
    ),
    "usage.Usage.of": Entry(Usage.of, lambda: {"state": begun()}),
    "trees.Proposal": Entry(
        s.Proposal,
        lambda: {
            "token": 1,
            "q": s.PointMass(1),
            "parent": s.TEXT,
            "source": "mine",
            "chance": 0.5,
            "logits": LOGITS,
        },
        say,
    ),
    "trees.chain": Entry(s.chain, lambda: {"tokens": (1, 2), "source": "mine"}, say_drafts),
    "trees.parents_of": Entry(parents_of, lambda: {"drafts": TREE}),
    "state.Record.then": Entry(lambda stage: begun().then(stage), lambda: {"stage": stages.draft_nothing}),
    "state.Drafted": Entry(s.Drafted, lambda: {"state": begun(), "proposals": TREE}, verify),
    **{
        f"state.Drafted.{name}": Entry(lambda i, name=name: getattr(drafted(), name)(i), lambda: {"i": 2}, list)
        for name in ("children", "followers", "path", "text", "trunk")
    },
    **{
        f"state.Scored.{name}": Entry(lambda i, name=name: getattr(scored(), name)(i), lambda: {"i": 2})
        for name in ("children", "ends", "followers", "law", "made", "stretch")
    },
    "state.Scored.rows": Entry(lambda path: scored().rows(path), lambda: {"path": (s.TEXT, 0, 2)}),
    "state.Verdict": Entry(
        s.Verdict, lambda: {"path": (0, 2), "correction": EVEN}, lambda verdict: judge(lambda given: verdict)
    ),
    "state.Adjusted": Entry(
        s.Adjusted,
        lambda: {"verified": verified(), "bonus": 3, "keep": 1, "reason": Reason.CONDITION},
        lambda record: (record.tokens, finish(record)),
    ),
    # stages
    "stages.adjust.Adjust": Entry(stages.Adjust, lambda: {"rng": s.Dice()}, lambda stage: stage(verified())),
    "stages.adjust.Adjust.__call__": Entry(stages.Adjust(s.Dice()), lambda: {"verified": verified()}),
    "stages.adjust.LossySkipAdjustment": Entry(
        stages.LossySkipAdjustment, lambda: {"rng": s.Dice()}, lambda stage: stage(verified())
    ),
    "stages.adjust.LossySkipAdjustment.__call__": Entry(
        stages.LossySkipAdjustment(s.Dice()), lambda: {"verified": verified()}
    ),
    "stages.commit.advance": Entry(stages.advance, lambda: {"committed": committed()}),
    "stages.commit.commit": Entry(stages.commit, lambda: {"adjusted": adjusted()}),
    "stages.draft.Draft": Entry(
        stages.Draft, lambda: {"drafter": drafter, "gamma": s.Fixed(2)}, lambda stage: stage(begun())
    ),
    "stages.draft.Draft.__call__": Entry(stages.Draft(drafter), lambda: {"state": begun()}),
    "stages.draft.draft_nothing": Entry(stages.draft_nothing, lambda: {"state": begun()}),
    "stages.ending.ending": Entry(
        lambda until, observe, stage: stages.ending(until, observe, *(stage,)),
        lambda: {"until": until_nine, "observe": stages.unobserved, "stage": nothing_new},
        lambda end: end(adjusted()),
    ),
    "stages.judge.Judge": Entry(stages.Judge, lambda: {"rule": s.Reject(s.Dice())}, lambda stage: stage(scored())),
    "stages.judge.Judge.__call__": Entry(stages.Judge(s.Reject(s.Dice())), lambda: {"scored": scored()}),
    "stages.judge.LossyJudge": Entry(
        stages.LossyJudge, lambda: {"rule": stages.LossyTypical(s.Dice())}, lambda stage: stage(scored())
    ),
    "stages.judge.LossyJudge.__call__": Entry(
        stages.LossyJudge(stages.LossyTypical(s.Dice())), lambda: {"scored": scored()}
    ),
    "stages.judge.Verify": Entry(
        stages.Verify, lambda: {**SCORED, "rule": s.Reject(s.Dice())}, lambda stage: stage(drafted())
    ),
    "stages.judge.Verify.__call__": Entry(
        stages.Verify(TARGET, SAMPLED, s.Reject(s.Dice())), lambda: {"drafted": drafted()}
    ),
    "stages.ngram.UpdateNgram": Entry(
        stages.UpdateNgram, lambda: {"storage": storage(), "filler_top_k": 2}, lambda stage: stage(committed())
    ),
    "stages.ngram.UpdateNgram.__call__": Entry(stages.UpdateNgram(storage()), lambda: {"committed": committed()}),
    "stages.recycle.Recycle": Entry(stages.Recycle, lambda: {"table": recycled()}, lambda stage: stage(committed())),
    "stages.recycle.Recycle.__call__": Entry(stages.Recycle(recycled()), lambda: {"committed": committed()}),
    "stages.rows.Rows": Entry(stages.Rows, lambda: {"most": 2, "along": True}),
    "stages.rows.Looks": Entry(
        stages.Looks, lambda: {"stage": nothing_new, "rows": stages.Rows(2)}, lambda stage: stage(committed())
    ),
    "stages.rows.Looks.__call__": Entry(stages.Looks(nothing_new, stages.Rows(2)), lambda: {"committed": committed()}),
    "stages.observe.Show": Entry(stages.Show, lambda: {"tokenizer": Words(), "console": quiet()}, watch),
    "stages.observe.Show.__call__": Entry(stages.Show(Words(), quiet()), lambda: {"committed": committed()}),
    "stages.observe.unobserved": Entry(stages.unobserved, lambda: {"committed": committed()}),
    "stages.ending.PruneCache": Entry(
        stages.PruneCache, lambda: {"providers": (UncachedPredictor(llama()),)}, lambda stage: stage(committed())
    ),
    "stages.ending.PruneCache.__call__": Entry(stages.PruneCache(()), lambda: {"committed": committed()}),
    **{
        f"stages.rules.{rule.__name__.lower()}.{rule.__name__}": Entry(rule, lambda: {"rng": s.Dice()}, judge)
        for rule in RULES
    },
    **{
        f"stages.rules.{rule.__name__.lower()}.{rule.__name__}.__call__": Entry(
            rule(s.Dice()), lambda: {"scored": scored()}
        )
        for rule in RULES
    },
    "stages.rules.typical.LossyTypical": Entry(
        stages.LossyTypical, lambda: {"rng": s.Dice(), "epsilon": 0.09, "alpha": 0.3}, judge_in_loss
    ),
    "stages.rules.typical.LossyTypical.__call__": Entry(stages.LossyTypical(s.Dice()), lambda: {"scored": scored()}),
    "stages.score.Score": Entry(stages.Score, lambda: dict(SCORED), lambda stage: judge_score(stage(drafted()))),
    "stages.score.Score.__call__": Entry(stages.Score(TARGET, SAMPLED), lambda: {"drafted": drafted()}),
    "stages.stop.StopWhen": Entry(
        stages.StopWhen, lambda: {"condition": stages.never}, lambda stage: stage(adjusted())
    ),
    "stages.stop.StopWhen.__call__": Entry(stages.StopWhen(until_nine), lambda: {"adjusted": adjusted()}),
    "stages.stop.any_of": Entry(
        lambda one, other: stages.any_of(*(one, other)), lambda: {"one": until_nine, "other": stages.never}, until
    ),
    "stages.stop.never": Entry(stages.never, lambda: {"state": begun()}),
    "stages.stop.stop_string": Entry(
        lambda tokenizer, one, other: stages.stop_string(tokenizer, *(one, other)),
        lambda: {"tokenizer": Words(), "one": "x", "other": "yz"},
        until,
    ),
    # paths and trees
    "paths.path_by_path": Entry(path_by_path, lambda: {"rows": lambda tokens, last: torch.zeros(last, V)}, predict),
    "paths.along_paths": Entry(along_paths, lambda: {"model": lambda tokens: torch.zeros(V)}, predict),
    "paths.last_rows": Entry(last_rows, lambda: {"predictor": TARGET, "tokens": TEXT, "last": 2, "name": "predictor"}),
    "trees.preorder": Entry(preorder, lambda: {"drafts": TREE}),
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
        for make in (accelerate.lossy_bf16, accelerate.lossy_int8, accelerate.lossy_int4)
    },
    "accelerate.check.check": Entry(
        accelerate.check, lambda: {"model": llama(), "lengths": (1, 4), "passes": (2, 3)}, str
    ),
    # converted
    "converted.copy_of": Entry(converted.copy_of, lambda: {"path": Path("/nowhere/at/all.gguf"), "weights": True}),
    "converted.is_gguf": Entry(converted.is_gguf, lambda: {"path": Path("/nowhere/at/all.gguf")}),
    # models
    "models.Loaded": Entry(
        models.Loaded, lambda: {"model": llama(), "tokenizer": Words()}, lambda made: (made.stop, made.chat("hi"))
    ),
    "models.Loaded.chat": Entry(
        lambda message: models.Loaded(llama(), Words()).chat(message),  # type: ignore[arg-type]
        lambda: {"message": "hi"},
    ),
    "models.Loaded.check_template": Entry(lambda: models.Loaded(llama(), Words()).check_template(), dict),  # type: ignore[arg-type]
    "models.Loaded.conversation": Entry(
        lambda messages: models.Loaded(llama(), Words()).conversation(messages),  # type: ignore[arg-type]
        lambda: {"messages": [{"role": "user", "content": "hi"}]},
    ),
    "models.load": Entry(models.load, lambda: {"name": "/nowhere/at/all", "dtype": "float32"}),
    "models.load_words": Entry(models.load_words, lambda: {"name": "/nowhere/at/all"}),
    "models.Loaded.ids": Entry(
        lambda text: models.Loaded(llama(), Words()).ids(text),  # type: ignore[arg-type]
        lambda: {"text": "hi"},
    ),
    "models.Loaded.text": Entry(
        lambda tokens: models.Loaded(llama(), Words()).text(tokens),  # type: ignore[arg-type]
        lambda: {"tokens": (1, 2)},
    ),
    "models.bigrams_of": Entry(models.bigrams_of, lambda: {"model": llama(), "tokenizer": Words()}),
    "models.file_of": Entry(models.file_of, lambda: {"name": "/nowhere/at/all"}),
    "models.shared_tokens": Entry(models.shared_tokens, lambda: {"target": lettered(), "drafter": lettered("b")}),
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
            "features": None,
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
        testing.through_trees, lambda: {"target": TARGET, "vocab_size": V, "seed": 0}, predict
    ),
    "testing.conformance.with_features": Entry(
        testing.with_features,
        lambda: {"predictor": TARGET, "showing": s.CachedPredictor(llama(), features=(1,))},
        predict_ids,
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
            "memo": UncachedPredictor(llama()),
            "fresh": UncachedPredictor(llama()),
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
        testing.TableModel, lambda: {"vocab_size": V, "seed": 0, "width": 2}, predict, effort("vocab_size", "width")
    ),
    "testing.tables.TableModel.features": Entry(TARGET.features, lambda: {"tokens": TEXT, "last": 2}),
    "testing.tables.TableModel.__call__": Entry(testing.TableModel(V), reading),
    "bench.prompts.read_prompts": Entry(bench.read_prompts, lambda: {"path": Path("nowhere")}),
}


# What is not tried, and why.

BY_STAGES = "a record that stages make, and hand to one another"
RESULT = "a result, made by the library"
NONE = "an enum or a protocol: nothing that is called with values"
BY_STEPS = "called by a step, with the record that the stage before it made"
ON_LAWS = "the arithmetic of laws: called by stages, on laws and tokens that they have looked at"
ON_TREES = "the arithmetic of trees: called by stages, on drafts that they have looked at"
ON_TEXTS = "the arithmetic of texts: called by what remembers them, on ids that it has looked at"
ON_CACHES = "what a predictor remembers: made by the models that it reads"
ON_BRANCHES = "randomness of the certificate's own, and the law that it found"
ON_ANSWERS = "looks itself at what the parts of users answer, and refuses it by name"
ABSTRACT = "a base class: its subclasses are tried"
BY_CONVERTED = "called by converted.copy_of, with what it read of a file"
BY_SAVERS = "called by what saves and loads, which is tried with any path"
BY_HEADS = "called by a HeadPredictor, with what the head itself made"
COMMAND = "a part of the command line, which reads its arguments itself"

EXEMPT: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *(
                f"heads.{head}.{method}"
                for head in ("eagle.Eagle", "eagle.Eagle3", "jump.Jump", "medusa.Medusa", "mtp.MTP")
                for method in ("begin", "enter", "advance", "say")
            ),
            *(f"heads.head.Vocabulary.{method}" for method in ("spread", "named", "speakable")),
            "heads.layer.Shape.rotary",
        ),
        BY_HEADS,
    ),
    **dict.fromkeys(
        (
            "state.Committed",
            "state.Finished",
            "state.Record",
            "state.Scored",
            "state.Stretch",
            "state.Verified",
            "beam.search.Beam",
            "beam.search.Expanded",
            "beam.search.Selected",
            "testing.certificate.World",
        ),
        BY_STAGES,
    ),
    **dict.fromkeys(
        (
            "accelerate.check.Disagreement",
            "accelerate.check.Agreement",
            "batch.hub.Failed",
            "distill.train.Heard",
            "bench.prompts.Prompt",
            "policies.choice.Choice",
            "policies.meter.Costs",
            *(f"replay.{name}" for name in ("hindsight.Hindsight", "played.Played", "played.Replay")),
            "margins.Audit",
            "margins.Departure",
            "testing.certificate.Certificate",
            "testing.certificate.Ending",
            "testing.conformance.Conformance",
            "testing.conformance.Divergence",
        ),
        RESULT,
    ),
    **dict.fromkeys(
        (
            "asked.Doing",
            "accelerate.build.Given",
            "accelerate.build.NotAccelerated",
            "batch.hub.Reads",
            "batch.many.Metered",
            "drafters.followers.Followers",
            "interop.streaming.Streamer",
            "laws.Laws",
            "processors.Processor",
            "protocols.Prunable",
            "heads.head.Head",
            "protocols.ReadsAhead",
            "protocols.ReadsFeatures",
            "randomness.Randomness",
            "randomness.Sampling",
            "state.Reason",
            "stages.fates.Fate",
            "stages.rows.ReadsRows",
            "vocabulary.spelling.Tokenizer",
            "testing.certificate.ExactnessError",
            "testing.conformance.Move",
            "testing.laws.LawError",
            "testing.laws.Memo",
        ),
        NONE,
    ),
    **dict.fromkeys(
        (
            "beam.search.Expand.__call__",
            "beam.search.Select.__call__",
            "beam.generate.ShowBeams.__call__",
            "beam.search.advance_beams",
            "beam.search.unobserved_beams",
            "policies.cost.CostAware.__call__",
            "policies.egag.EGAG.__call__",
            "policies.fixed.Fixed.__call__",
            "policies.fixed.Heuristic.__call__",
            "policies.stops.StopAfter.__call__",
            "interop.generate.Generate.__call__",
            "stages.rules.reject.Reject.judge_from",
            "randomness.Dice.mark",
            "interop.processors.Stateless.__call__",
            "models.check_messages",
            "models.check_text",
            "errors.said",
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
            "distribution.normalised",
            "distribution.vector",
            "distribution.Categorical.of",
            "distribution.Categorical.residual",
            "distribution.Categorical.taken_from",
            "distribution.PointMass.of",
            "distribution.PointMass.residual",
            "distribution.PointMass.taken_from",
            "randomness.drawn",
            "randomness.draws",
            "randomness.q_of",
        ),
        ON_LAWS,
    ),
    **dict.fromkeys(
        (
            "trees.children_of",
            "trees.depths",
            "trees.is_chain",
            "trees.leaves",
            "trees.lineage",
            "trees.parent_of",
            "trees.path_along",
            "trees.path_to",
            "trees.without",
        ),
        ON_TREES,
    ),
    **dict.fromkeys([f"prefix.{name}" for name in ("begins", "common_prefix", "parting", "tokens_of")], ON_TEXTS),
    **dict.fromkeys(("caches.past.Past", "caches.rows.Roomy", "caches.shelf.Row", "caches.shelf.Shelf"), ON_CACHES),
    **dict.fromkeys(("constraints.matcher.Engine", "constraints.matcher.Matcher"), ABSTRACT),
    **dict.fromkeys(
        ("testing.enumeration.Branch", "testing.enumeration.Law", "testing.enumeration.Noise"), ON_BRANCHES
    ),
    **{f"asked.{name}": ON_ANSWERS for name in ("rows_of", "features_of", "looked_at", "laws_of", "laws_when_asked")},
    **{f"asked.{name}": ON_ANSWERS for name in ("accepts", "stream_of", "done_by", "proposal_of", "fits", "law_after")},
    "state.rows_along": ON_ANSWERS,
    "trees.no_draft": ON_ANSWERS,
    **dict.fromkeys(
        (
            "drafters.ngrams.storage.INgramStorage",
            *[
                f"drafters.ngrams.storage.INgramStorage.{name}"
                for name in (
                    "continuation",
                    "known",
                    "learn",
                    "has_gram",
                    "initialize",
                    "next_token",
                    "reset",
                    "update",
                )
            ],
            "processors.LogitsProcessor",
            "processors.LogitsProcessor.sample",
        ),
        ABSTRACT,
    ),
    **dict.fromkeys(
        (
            *(f"{room}.command.{name}" for room in ("bench", "distill") for name in ("add_arguments", "main")),
            *(f"doctor.{name}" for name in ("Extra", "Part", "add_arguments", "examined", "instructions")),
            *(f"doctor.{name}" for name in ("main", "part_of")),
            "bench.context.Context",
            "replay.command.add_commands",
            "cli.main",
            *(f"chat.{name}" for name in ("Screen", "Talk", "talk")),
            *(f"commands.{name}" for name in ("check_engine", "named_model", "one_sentence", "outcomes", "version_of")),
            *(f"commands.{name}" for name in ("Told", "processor_name", "prompt_of", "vocabulary_of")),
            *(f"corpus.{name}" for name in ("Answer", "Answers", "Progress", "Row")),
            *(f"corpus.{name}" for name in ("answer_all", "answers_in", "rate", "read_rows", "summary")),
        ),
        COMMAND,
    ),
    **{f"origin.{name}": BY_SAVERS for name in ("refuse_other", "short")},
    **{f"files.{name}": BY_SAVERS for name in ("checked_path", "checksum", "content_of", "no_file", "write")},
    **{f"files.{name}": BY_SAVERS for name in ("can_be_written", "save_text")},
    **dict.fromkeys(("gguf_keys.differing", "gguf_keys.missing"), BY_CONVERTED),
    "caches.lasting.lasting": ON_CACHES,
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
    "a draft of nothing": lambda: (s.Proposal(None),),  # type: ignore[arg-type]
    "a draft beyond": lambda: (s.Proposal(2**70),),
    "an orphan": lambda: (s.Proposal(1, parent=3),),
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
            torch.default_generator.manual_seed(0)
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
