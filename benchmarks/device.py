"""What specflow does on a device, in one command of a few minutes that needs no download.

    python -m benchmarks.device --out DIR                       # on CUDA, at most seven minutes after imports
    python -m benchmarks.device --out DIR --device cpu --tiny   # a minute or two: whether the command works

Models have random weights in published shapes, with fewer layers where they would not fit. Written are `device.json`,
with everything, and `device.md`, a page to read, anew after each table, so that a run that is cut short leaves what it
found. The parts run in the order of their worth, each within a share of the budget and in a process of its own; what
fails in one is told in its place, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Final, TypeAlias, final

import torch
import transformers
from attrs import asdict, frozen
from torch.nn import Module
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from typing_extensions import override

from benchmarks.accelerate import Decode, generating, plain, stepping
from specflow import (
    TEXT,
    CachedPredictor,
    Dice,
    Drafter,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Proposal,
    Step,
    Tokens,
    accelerate,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.accelerate.captured import Captured
from specflow.accelerate.check import arbitrary_text
from specflow.batch import BatchPredictor, Failed, together
from specflow.bench.stopwatch import Stopwatch, clock_for
from specflow.drafters import GreedyBlockDrafter
from specflow.errors import DecodeError, said
from specflow.paths import last_rows
from specflow.policies import CostAware, CostMeter
from specflow.predictors import UncachedPredictor, layer_skip
from specflow.predictors.trial import error_bound
from specflow.state import Tally
from specflow.testing import model_conformance

Cell: TypeAlias = str | int | float | bool | None


@final
@frozen
class Table:
    """Some rows of numbers, and what they are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @override
    def __str__(self) -> str:
        lines = [self.columns, ("---",) * len(self.columns), *[tuple(map(_shown, row)) for row in self.rows]]
        return "\n".join([f"{self.title}\n", *["| " + " | ".join(line) + " |" for line in lines]])


@final
@frozen
class Failure:
    """What failed, and how: what goes on after it may tell something."""

    what: str
    error: str

    @override
    def __str__(self) -> str:
        return f"{self.what}: {self.error}"


Found: TypeAlias = Table | Failure


def attempted(what: str, work: Callable[[], Iterator[Found]]) -> Iterator[Found]:
    """What some work finds, and that it failed, if it did."""
    try:
        yield from work()
    except Exception as error:  # whatever it is, it is told
        yield Failure(what, said(error))


@final
@frozen
class Result:
    """What came of a part: its tables, how long it took, and what ended it early, if anything did."""

    part: str
    seconds: float
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    """What specflow and torch warned of meanwhile, such as why a model is not accelerated."""
    error: str | None
    ended: bool


@final
@frozen
class Shape:
    """A published shape: the model type, and what its config holds. `tiny` is what makes it small."""

    name: str
    kind: str
    config: Mapping[str, object]
    tiny: Mapping[str, object]


_TINY: Final[Mapping[str, object]] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _shape(name: str, kind: str, sizes: tuple[int, int, int, int, int, int, int], **more: object) -> Shape:
    config = dict(zip(_TINY, sizes, strict=True)) | {"max_position_embeddings": 4096} | more
    window = {"sliding_window": 16} if "sliding_window" in more else {}
    return Shape(name, kind, config, {**_TINY, **window})


LLAMA_1B: Final = _shape("llama 1B", "llama", (128256, 2048, 8192, 16, 32, 8, 64), rope_theta=5e5)
LLAMA_8B: Final = _shape("llama 8B", "llama", (128256, 4096, 14336, 32, 32, 8, 128), rope_theta=5e5)
QWEN: Final = _shape("qwen3 0.6B", "qwen3", (151936, 1024, 3072, 28, 16, 8, 128))
GEMMA: Final = _shape("gemma 3 1B", "gemma3_text", (262144, 1152, 6912, 26, 4, 1, 256), sliding_window=512)
MAMBA: Final = Shape(
    "mamba 370M",
    "mamba",
    {"vocab_size": 50280, "hidden_size": 1024, "num_hidden_layers": 48, "state_size": 16},
    {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
)


@final
@frozen
class Setup:
    """Where models run and how much is done: texts of `new` tokens after prompts of `before`."""

    device: torch.device
    tiny: bool

    @property
    def before(self) -> int:
        """Tokens of a prompt."""
        return 12 if self.tiny else 96

    @property
    def new(self) -> int:
        """Tokens of a text."""
        return 8 if self.tiny else 64

    @property
    def repeats(self) -> int:
        """How often a text is timed."""
        return 1 if self.tiny else 3

    def model(self, shape: Shape, dtype: torch.dtype, most: int = sys.maxsize) -> PreTrainedModel:
        """A random model, with at most so many layers, and no more than a third of the free memory holds.

        What the layers after the first quarter add is scaled down, so that the first quarter is a drafter for it.
        """
        values = {**shape.config, **(shape.tiny if self.tiny else {})}
        layers = values["num_hidden_layers"]
        assert isinstance(layers, int)
        layers = min(layers, most)
        while True:
            config = AutoConfig.for_model(shape.kind, **values | {"num_hidden_layers": layers, "use_cache": True})
            if layers == 1 or _bytes(config, dtype) <= self._room / 3:
                break
            layers //= 2
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        assert isinstance(model, PreTrainedModel)
        model.eval().requires_grad_(requires_grad=False)
        for name, weight in model.named_parameters():
            parts = name.split(".")
            if name.endswith(("o_proj.weight", "down_proj.weight")) and int(parts[2]) >= quarter(model):
                weight.mul_(0.1)
        # So that a text is no row of one token, as tied embeddings make of random layers.
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is not None and embeddings.weight is head.weight:
            embeddings.weight.mul_(0.1)
        return model

    @property
    def _room(self) -> float:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 4e9

    def prompt(self, model: Module, number: int = 0) -> Tokens:
        """A prompt of no meaning."""
        size = _vocabulary(model)
        return tuple(Random(number).choices(range(size), k=self.before))


def _bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        model: Module = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _vocabulary(model: Module) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", 2))


def quarter(model: Module) -> int:
    """How many layers the first quarter of a model has."""
    return max(1, int(getattr(getattr(model, "config", None), "num_hidden_layers", 1)) // 4)


@final
@frozen
class Told:
    """Drafts that are right by construction with a probability of `right` each: what drafts cost, whoever makes them.

    With two `branches` a wrong guess stands beside each draft that may be right, before or after it.
    """

    prompt: Tokens
    truth: Tokens
    size: int
    right: float = 0.8
    branches: int = 1

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        parent, made = TEXT, 0
        for place in range(len(tokens), len(self.prompt) + len(self.truth)):
            random, true = Random(place), self.truth[place - len(self.prompt)]
            wrong = (true + 1 + random.randrange(self.size - 1)) % self.size
            first = true if random.random() < self.right else wrong
            second = wrong if first == true else true
            guesses = (first, second)[: self.branches]
            for guess in guesses:
                yield Proposal(guess, parent=parent, source="told")
            if true not in guesses:
                return
            parent, made = made + guesses.index(true), made + len(guesses)


GAMMA: Final = 4
GREEDY: Final = GreedyProcessor()


def drafting(model: Module, drafter: Callable[[], Drafter], gamma: int = GAMMA) -> Decode:
    """Greedy decoding with drafts, a fixed number a step."""

    def step() -> Step:
        target = CachedPredictor(model)
        return speculative_step(drafter(), target, GREEDY, Dice(), Fixed(gamma), prune=(target,))

    return stepping(step)


def pacing(model: Module, drafter: Callable[[], Drafter], most: int = 8) -> Decode:
    """The same, as many as pay."""
    meter = CostMeter(clock_for(model))
    policy = CostAware(meter, most)

    def step() -> Step:
        target = CachedPredictor(model)
        return speculative_step(drafter(), meter.timed(target), GREEDY, Dice(), policy, prune=(target,))

    return stepping(step)


@final
class NotCaptured(UserWarning):
    """The note that `fast` gave something else than captured passes where those are what is to be measured."""


def versions(setup: Setup, model: Module) -> Mapping[str, Module]:
    """The model as it is given and, by the name of what it is, what `accelerate.fast` makes of it, if anything.

    Where that is nothing, the note says why, and no row stands under the name of what did not run.
    """
    fast = accelerate.fast(model)
    if fast is model:
        return {"given": model}
    if isinstance(fast, Captured):
        return {"given": model, "captured": fast}
    if setup.device.type == "cuda":
        warnings.warn(NotCaptured(f"fast made a {type(fast).__name__}: its passes are not captured"), stacklevel=2)
    return {"given": model, "fast": fast}


# The parts


def where(setup: Setup) -> Iterator[Found]:
    """What runs, and on what."""
    facts: list[tuple[Cell, ...]] = [
        (
            "device",
            torch.cuda.get_device_name(setup.device)
            if setup.device.type == "cuda"
            else platform.processor() or platform.machine(),
        ),
        (
            "python, torch, transformers",
            f"{platform.python_version()}, {torch.__version__}, {transformers.__version__}",
        ),
        ("threads", torch.get_num_threads()),
        ("products of fp32", torch.get_float32_matmul_precision()),
        ("convolutions in TF32", torch.backends.cudnn.allow_tf32),
    ]
    if setup.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(setup.device)
        facts += [
            ("CUDA", torch.version.cuda),
            ("attention by cuDNN", may_use_cudnn()),
            ("compute capability", ".".join(map(str, torch.cuda.get_device_capability(setup.device)))),
            ("memory, GB free of all", f"{free / 1e9:.1f} of {total / 1e9:.1f}"),
        ]
    yield Table("Where", ("what", ""), tuple(facts))


def conforms(setup: Setup) -> Iterator[Found]:
    """Whether what is read over a cache is what is read afresh, and greedy text with drafts the plain text."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (LLAMA_1B, QWEN, GEMMA, MAMBA):
            name = f"{shape.name}, {str(dtype).removeprefix('torch.')}"
            yield from attempted(name, partial(_conforms, setup, name, shape, dtype))


def _conforms(setup: Setup, title: str, shape: Shape, dtype: torch.dtype) -> Iterator[Found]:
    model, columns = setup.model(shape, dtype, most=4), ("drafts", "tree", "first layers", "fresh")
    if shape is GEMMA:
        model.config.sliding_window = min(64, int(model.config.sliding_window or 64))
    title += ", 4 layers at most: against fresh passes, and greedy texts "
    title += f"of {setup.new} tokens against the plain one"
    for name, each in (versions(setup, model) if shape in (LLAMA_1B, QWEN) else {"given": model}).items():
        row = _conformance(setup, name, each)
        yield Table(title, ("model", "fed in", "holds", "largest difference / logit", *columns), (row,))


def _conformance(setup: Setup, name: str, model: Module) -> tuple[Cell, ...]:
    predictor, prompt = CachedPredictor(model), setup.prompt(model)
    dtype = next(model.parameters()).dtype
    largest = float(predictor(prompt, ()).abs().max())
    report = model_conformance(
        model, tolerance=error_bound(dtype) * largest, steps=8 if setup.tiny else 20, longest=48 if setup.tiny else 96
    )
    truth, _ = plain(model)(prompt, setup.new)
    size = _vocabulary(model)
    fresh = stepping(lambda: autoregressive_step(UncachedPredictor(model), GREEDY, Dice()))
    first = first_layers(model)
    texts = [
        drafting(model, lambda: Told(prompt, truth, size)),
        drafting(model, lambda: Told(prompt, truth, size, branches=2), 8),
        None if first is None else drafting(model, first),
        fresh,
    ]
    alike = [None if decode is None else _alike(decode(prompt, setup.new)[0], truth) for decode in texts]
    return name, predictor.feeding.name, report.holds, report.largest / largest, *alike


def _alike(text: Tokens, truth: Tokens) -> str:
    """Whether a text is another's, or where it parts from it."""
    differing = next((i for i, (ours, theirs) in enumerate(zip(text, truth, strict=True)) if ours != theirs), None)
    return "same" if differing is None else f"parts at {differing}"


@final
class NoFirstLayers(UserWarning):
    """The note that a model's first layers do not draft for it, and why."""


def first_layers(model: Module) -> Callable[[], Drafter] | None:
    """Makes drafters of a model's first quarter, for one text each; None, with a note, where its layers are not found.

    They share one model without the other layers, as each such model is tried anew.
    """
    kept = quarter(model)
    try:
        without = layer_skip(model, range(kept, max(kept, _layers(model))))
    except DecodeError as error:
        note = NoFirstLayers(f"{type(model).__name__}: no row of drafts of its first layers: {error}")
        warnings.warn(note, stacklevel=2)
        return None
    on_host = next(model.parameters()).is_cpu

    def drafter() -> Drafter:
        predictor = CachedPredictor(without)
        return LLMDrafter(predictor, GREEDY, Dice()) if on_host else GreedyBlockDrafter(predictor, GAMMA)

    return drafter


def captured(setup: Setup) -> Iterator[Found]:
    """`accelerate.fast`, its passes captured on CUDA, against the same eager, the given model and `generate`."""
    for shape in (LLAMA_1B, LLAMA_8B):
        yield from attempted(shape.name, partial(_captured, setup, shape))


def _captured(setup: Setup, shape: Shape) -> Iterator[Found]:
    model = setup.model(shape, torch.bfloat16)
    prompt, decoders = setup.prompt(model), {"generate": generating(model)}
    for name, each in versions(setup, model).items():
        decoders[f"plain, {name}"] = plain(each)
        if isinstance(each, Captured):
            decoders["plain, the same not captured"] = plain(each.eager)
    yield from compared(setup, f"{shape.name}, {_layers(model)} layers, bf16: one text", model, decoders, prompt)
    if setup.device.type == "cuda":
        used = torch.cuda.memory_allocated(setup.device) / 1e9, torch.cuda.memory_reserved(setup.device) / 1e9
        yield Table(f"{shape.name}: memory after it", ("GB in use", "GB reserved"), (used,))


def compiled(setup: Setup) -> Iterator[Found]:
    """The same against `generate` with a static cache, which transformers compiles on CUDA."""
    model = setup.model(LLAMA_1B, torch.bfloat16)
    static = generating(model, cache_implementation="static")
    decoders = {"generate, static cache": static}
    decoders |= {f"plain, {name}": plain(each) for name, each in versions(setup, model).items()}
    title = f"llama 1B, {_layers(model)} layers, bf16: `generate` with a static cache"
    yield from compared(setup, title, model, decoders, setup.prompt(model))


def compared(
    setup: Setup, title: str, model: Module, decoders: Mapping[str, Decode], prompt: Tokens
) -> Iterator[Found]:
    """Decoders that take turns: milliseconds a token, of all of the text. One that fails is told, and out of it."""
    clock, new = clock_for(model), setup.new
    took: dict[str, list[float]] = {name: [] for name in decoders}
    texts: dict[str, tuple[Tokens, Tally]] = {}
    for turn in range(setup.repeats + 1):
        for name in tuple(took):
            began = clock()
            try:
                texts[name] = decoders[name](prompt, new)
            except Exception as error:  # whatever it is, the others may tell something
                took.pop(name)
                yield Failure(f"{title}: {name}", said(error))
                continue
            if turn:  # in the first one models are tried, and passes captured
                took[name].append(1e3 * (clock() - began) / new)
    if not took:
        return
    first = next(iter(took))
    rows = [
        (
            name,
            median(ms),
            median(took[first]) / median(ms),
            *_tallied(texts[name][1]),
            _alike(texts[name][0], texts[first][0]),
        )
        for name, ms in took.items()
    ]
    columns = ("decoder", "ms a token", "times the first", "accepted", "tokens a pass", "text")
    yield Table(title, columns, tuple(rows))


def _tallied(tally: Tally) -> tuple[Cell, Cell]:
    if not tally.steps:
        return None, None
    return tally.acceptance_rate if tally.drafted else None, 1 + tally.accepted / tally.steps


def _layers(model: Module) -> int:
    return int(getattr(getattr(model, "config", None), "num_hidden_layers", 0))


COPIES: Final = (
    "Memcpy DtoH",
    "Memcpy HtoD",
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "cudaGraphLaunch",
)
"""How the names begin by which the profiler calls the copies, the waits, and what is launched, on CUDA.

Kernels are launched by torch's API or by the driver's, whoever wrote them."""
ON_HOST: Final = ("aten::_local_scalar_dense", "aten::copy_")
"""What stands for copies where there is no device."""


def copies(setup: Setup) -> Iterator[Found]:
    """What is copied between host and device in a step, told by the profiler from a short and a longer text."""
    model = setup.model(LLAMA_1B, torch.bfloat16, most=4)
    prompt, size = setup.prompt(model), _vocabulary(model)
    truth, _ = plain(model)(prompt, setup.new)
    names = COPIES if setup.device.type == "cuda" else ON_HOST
    for kind, each in versions(setup, model).items():
        rows: list[tuple[Cell, ...]] = []
        decoders = {
            "plain": plain(each),
            "drafts": drafting(each, partial(Told, prompt, truth, size)),
            "tree": drafting(each, partial(Told, prompt, truth, size, branches=2), 8),
        }
        first = first_layers(each)
        if first is not None:
            decoders["first layers"] = drafting(each, first)
        for name, decode in decoders.items():
            lengths = setup.new // 4, setup.new
            # Models are tried and passes captured; and a text finds the room that the one before it has left.
            for n in lengths * 2:
                decode(prompt, n)
            (few, before), (many, after) = (_counted(setup, decode, prompt, n) for n in lengths)
            found = each_step(names, few, many, after - before)
            rows.append((f"{kind}, {name}", *found))
        yield Table(f"llama 1B, {_layers(model)} layers, bf16: a step, on average", ("decoder", *names), tuple(rows))


def each_step(names: Sequence[str], few: Counter[str], many: Counter[str], steps: int) -> list[float]:
    """How often what has each of these names comes in a step: by how much more often in a text with so many more.

    What comes less often in the longer text counts as that: a negative number says that the texts are not alike.
    """
    more = Counter(many)
    more.subtract(few)
    return [sum(count for event, count in more.items() if name in event) / max(1, steps) for name in names]


def _counted(setup: Setup, decode: Decode, prompt: Tokens, new: int) -> tuple[Counter[str], int]:
    """How often each event came in a text, and its steps."""
    activities = [ProfilerActivity.CPU]
    if setup.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        _, tally = decode(prompt, new)
    return Counter({event.key: event.count for event in record.key_averages()}), tally.steps


def passes(setup: Setup) -> Iterator[Found]:
    """What a pass over k tokens takes after a text, in milliseconds."""
    lengths = (1, 2, 4, 8) if setup.tiny else (*range(1, 9), 10, 12, 16, 20, 24, 32, 33, 40, 48, 64)
    for shape in (LLAMA_1B, LLAMA_8B):
        yield from attempted(shape.name, partial(_passes, setup, shape, lengths))


def _passes(setup: Setup, shape: Shape, lengths: Sequence[int]) -> Iterator[Found]:
    model = setup.model(shape, torch.bfloat16)
    before = 16 if setup.tiny else 512
    text, clock = arbitrary_text(before + max(lengths), _vocabulary(model)), clock_for(model)
    for name, each in versions(setup, model).items():
        predict, rows = CachedPredictor(each), list[tuple[Cell, ...]]()
        for k in lengths:
            taken = []
            for turn in range(2 + 2 * setup.repeats):
                began = clock()
                last_rows(predict, text[: before + k], k)
                if turn > 1:  # the first reads what comes before, the second may capture
                    taken.append(1e3 * (clock() - began))
            rows.append((k, median(taken)))
        title = f"{shape.name}, {_layers(model)} layers, bf16: ms for a pass over k tokens after {before}"
        yield Table(title, ("k", name), tuple(rows))


def drafts(setup: Setup) -> Iterator[Found]:
    """Plain, chains, trees, and drafts of the model's own first layers."""
    for shape in (LLAMA_8B, LLAMA_1B):
        yield from attempted(shape.name, partial(_drafts, setup, shape))


def _drafts(setup: Setup, shape: Shape) -> Iterator[Found]:
    model = setup.model(shape, torch.bfloat16)
    prompt, size = setup.prompt(model), _vocabulary(model)
    for name, each in versions(setup, model).items():
        truth, _ = plain(each)(prompt, setup.new)
        told, tree = partial(Told, prompt, truth, size), partial(Told, prompt, truth, size, branches=2)
        decoders = {
            "plain": plain(each),
            f"{GAMMA} drafts, 80 % right": drafting(each, told),
            "as many as pay": pacing(each, told),
            "tree of 8": drafting(each, tree, 8),
        }
        first = first_layers(each)
        if first is not None:
            decoders[f"{GAMMA} drafts of the first {quarter(each)} of {_layers(each)} layers"] = drafting(each, first)
        # So that the first that CostAware sees of a pass is not its capture, which it would long take for the rule.
        for gamma in (1, 3, 8):
            drafting(each, told, gamma)(prompt, setup.new)
        title = f"{shape.name}, {_layers(model)} layers, bf16, {name} model"
        yield from compared(setup, title, model, decoders, prompt)


def batches(setup: Setup) -> Iterator[Found]:
    """Several texts at once: tokens a second of all of them."""
    model = setup.model(LLAMA_1B, torch.bfloat16)
    for name, each in versions(setup, model).items():
        rows = tuple([_batch(setup, each, slots) for slots in ((1, 2) if setup.tiny else (1, 8, 32))])
        columns = ("texts", "tokens/s, plain", f"tokens/s, {GAMMA} drafts, 80 % right", "same text")
        yield Table(f"llama 1B, {_layers(model)} layers, bf16, {name} model: batches", columns, rows)


def _batch(setup: Setup, model: Module, slots: int) -> tuple[Cell, ...]:
    target, size = BatchPredictor(model, slots), _vocabulary(model)
    prompts = [setup.prompt(model, number) for number in range(slots)]

    def rate(steps: Sequence[Step]) -> tuple[float, list[Tokens]]:
        work = [
            partial(run, step, start(prompt, setup.new).unwrap()) for step, prompt in zip(steps, prompts, strict=True)
        ]
        clock = clock_for(model)
        for _ in range(2):  # models are tried, and passes captured
            dict(together(work, slots))
        began = clock()
        ends = dict(together(work, slots))
        seconds = clock() - began
        return slots * setup.new / seconds, [_ended(ends[number]).state.output for number in range(slots)]

    without, truths = rate([autoregressive_step(target, GREEDY, Dice())] * slots)
    drafters = [Told(prompt, truth, size) for prompt, truth in zip(prompts, truths, strict=True)]
    with_drafts, found = rate([speculative_step(each, target, GREEDY, Dice(), Fixed(GAMMA)) for each in drafters])
    same = sum(ours == theirs for ours, theirs in zip(found, truths, strict=True))
    return slots, without, with_drafts, f"{same}/{slots}"


def _ended(end: Finished | Failed) -> Finished:
    if isinstance(end, Failed):
        raise end.error
    return end


def times(setup: Setup) -> Iterator[Found]:
    """Where the time of a step goes: into the target's passes, the drafter, and specflow."""
    model = setup.model(LLAMA_1B, torch.bfloat16)
    prompt, size = setup.prompt(model), _vocabulary(model)
    for kind, each in versions(setup, model).items():
        rows: list[tuple[Cell, ...]] = []
        truth, _ = plain(each)(prompt, setup.new)
        drafters: dict[str, tuple[Drafter | None, int]] = {
            "plain": (None, 0),
            "drafts": (Told(prompt, truth, size), GAMMA),
            "tree": (Told(prompt, truth, size, branches=2), 8),
        }
        for name, (drafter, gamma) in drafters.items():
            rows.append((f"{kind}, {name}", *_split(setup, each, drafter, gamma, prompt)))
        columns = ("decoder", "steps", "passes", "tokens read", "µs a step", "in passes", "drafting", "specflow's own")
        yield Table(f"llama 1B, {_layers(model)} layers, bf16: where the time goes", columns, tuple(rows))


def _split(setup: Setup, model: Module, drafter: Drafter | None, gamma: int, prompt: Tokens) -> tuple[Cell, ...]:
    watch = Stopwatch(clock_for(model))

    def step() -> Step:
        target = CachedPredictor(model)
        if drafter is None:
            return autoregressive_step(target, GREEDY, Dice())
        return speculative_step(watch.timed(drafter), target, GREEDY, Dice(), Fixed(gamma))

    # The hooks make another model of it, which is tried and read afresh: so they come before the warm-up.
    with watch.watching(model):
        for _ in range(2):
            run(step(), start(prompt, setup.new).unwrap())
        going_on = step()
        state = run(going_on, start(prompt, 2).unwrap()).state  # the prompt is read
        rest = start(state.tokens, setup.new - 2).unwrap()
        watch.passes.clear()
        watch.drafting = 0.0
        began = watch.clock()
        steps = run(going_on, rest).state.tally.steps
        seconds = watch.clock() - began
    read = sum(one.seconds for one in watch.passes)
    fed = sum(one.fed for one in watch.passes)
    parts = (seconds, read, watch.drafting, seconds - read - watch.drafting)
    return steps, len(watch.passes), fed, *[1e6 * part / steps for part in parts]


def attention(setup: Setup) -> Iterator[Found]:
    """What cuDNN's attention costs a text whose passes have shapes that it has not met, and one where it has."""
    model = setup.model(LLAMA_1B, torch.bfloat16)
    prompt, size, clock = setup.prompt(model), _vocabulary(model), clock_for(model)
    truth, _ = plain(model)(prompt, setup.new)
    decoders = {"plain": plain(model), "drafts": drafting(model, partial(Told, prompt, truth, size))}
    rows: list[tuple[Cell, ...]] = []
    for chosen in (False, True):
        with cudnn_attention(chosen):
            plain(model)(prompt[: len(prompt) // 2], 2)
            for name, decode in decoders.items():
                taken = []
                for _ in range(2):
                    began = clock()
                    decode(prompt, setup.new)
                    taken.append(1e3 * (clock() - began) / setup.new)
                rows.append((chosen, name, *taken))
    columns = ("attention by cuDNN", "decoder", "ms a token, first text", "ms a token, the same text again")
    yield Table(f"llama 1B, {_layers(model)} layers, bf16, given model", columns, tuple(rows))


def may_use_cudnn() -> bool:
    """Whether torch may choose cuDNN's attention."""
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call] # of torch


@contextmanager
def cudnn_attention(chosen: bool) -> Iterator[None]:
    """Whether torch may choose cuDNN's attention in the block.

    It may elsewhere, unless told otherwise, and does on some devices in bf16. There cuDNN plans anew for each number of
    keys, so each pass of a text but a captured one would be timed with a plan.
    """
    before = may_use_cudnn()
    torch.backends.cuda.enable_cudnn_sdp(chosen)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


Part: TypeAlias = Callable[[Setup], Iterator[Found]]
PARTS: Final[tuple[tuple[str, Part, float], ...]] = (
    ("Where", where, 0.05),
    ("Conformance and identity", conforms, 0.25),
    ("Captured passes", captured, 0.2),
    ("Copies a step", copies, 0.1),
    ("What a pass takes", passes, 0.15),
    ("Drafts and trees", drafts, 0.25),
    ("Batches", batches, 0.2),
    ("Where the time goes", times, 0.1),
    ("Attention by cuDNN, and not", attention, 0.08),
    ("A static cache, compiled", compiled, 0.5),
)
"""By what they are worth; and the most of the budget that each may take."""


@final
@frozen
class Begun:
    """A part's process is there, and has imported what it needs."""


@final
@frozen
class Note:
    """A warning."""

    text: str


@final
@frozen
class Ended:
    """A part came to its end, or to an error."""

    error: str | None


UNENDED: Final = "it has not ended"
"""The error of a part that is still running, so that a page which is written meanwhile does not claim all of it."""


def _within_process(part: Part, setup: Setup, out: Connection) -> None:
    """Send all that comes of a part."""
    logging.set_verbosity_error()
    if setup.tiny and setup.device.type == "cpu":
        torch.set_num_threads(1)  # tiny passes spend their time waiting for threads
    out.send(Begun())
    error, noted = None, set[str]()

    def note(message: Warning | str, category: type[Warning]) -> None:
        text = f"{category.__name__}: {' '.join(str(message).split())}"
        if text not in noted:
            noted.add(text)
            out.send(Note(text))

    with warnings.catch_warnings(), torch.no_grad(), cudnn_attention(chosen=False):
        warnings.simplefilter("always")
        for ignored in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", ignored)
        warnings.showwarning = lambda message, category, *_: note(message, category)
        try:
            for table in part(setup):
                out.send(table)
        except Exception as failure:  # whatever it is, the other parts may tell something
            error = said(failure)
    out.send(Ended(error))


def carried_out(setup: Setup, budget: float, parts: Sequence[tuple[str, Part, float]] = PARTS) -> Iterator[Result]:
    """Each part within its share of what was given, and none beyond the whole of it: what is known after each table.

    Each runs in a process of its own: an illegal access leaves a process no device to go on with, and what hangs in a
    driver hears no signal.
    """
    end = perf_counter() + budget
    processes = processes_for(setup.device)
    for name, part, share in parts:
        began = perf_counter()
        if began >= end:
            yield Result(name, 0.0, (), (), "no time was left for it", ended=True)
            continue
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=_within_process, args=(part, setup, theirs))
        process.start()
        theirs.close()
        try:
            yield from _received(name, process, ours, share * budget, end)
        finally:
            process.kill()
            process.join(PATIENCE)
            ours.close()


def processes_for(device: torch.device) -> ForkServerContext | SpawnContext:
    """Where processes come from: a server forks them that has imported everything, so they wait for the device only.

    Where a forked one does not reach the device, as when an import has asked the driver for it, each imports all by
    itself, which takes some of the budget.
    """
    forked = get_context("forkserver")
    forked.set_forkserver_preload(["benchmarks.accelerate", "specflow.testing"])  # not this: it may be __main__
    process = forked.Process(target=_reach, args=(device,))
    process.start()
    process.join(9 * PATIENCE)
    reached = process.exitcode == 0
    process.kill()
    return forked if reached else get_context("spawn")


def _reach(device: torch.device) -> None:
    torch.zeros(1, device=device)


PATIENCE: Final = 10.0
"""Seconds in which a process ends that was told to."""


def _received(name: str, process: BaseProcess, source: Connection, share: float, end: float) -> Iterator[Result]:
    """What a part's process sends, until it ends, or `share` seconds after it began, or at `end`."""
    began, tables, notes, failures = perf_counter(), list[Table](), list[str](), list[str]()
    stop = end

    def result(error: str | None) -> Result:
        errors = "; ".join([*failures, *([] if error is None else [error])])
        return Result(name, perf_counter() - began, tuple(tables), tuple(notes), errors or None, error != UNENDED)

    while source.poll(max(0.0, stop - perf_counter())):
        try:
            message = source.recv()
        except EOFError:
            process.join(PATIENCE)
            yield result(f"its process ended with {process.exitcode}")
            return
        match message:
            case Begun():
                began = perf_counter()
                stop = min(began + share, end)
            case Table():
                tables.append(message)
                yield result(UNENDED)
            case Failure():
                failures.append(str(message))
                yield result(UNENDED)
            case Note(text):
                notes.append(text)
                yield result(UNENDED)
            case Ended(error):
                yield result(error)
                return
    yield result(f"it was ended after {perf_counter() - began:.0f} s")


ATTENTION: Final = (
    "Attention is torch's without cuDNN's, which plans anew for each number of keys; "
    "the part on attention has both for the given model."
)


def page(results: Sequence[Result], setup: Setup) -> str:
    """All that was found, to read."""
    kind = "tiny models: the numbers mean nothing" if setup.tiny else "random weights in published shapes"
    parts = [f"# specflow on {setup.device}\n\n`python -m benchmarks.device`, {kind}. {ATTENTION}"]
    for result in results:
        parts.append(f"## {result.part}\n\n{result.seconds:.1f} s" + (f"; **{result.error}**" if result.error else ""))
        parts += [f"Note: {note}" for note in result.notes]
        parts += map(str, result.tables)
    return "\n\n".join(parts) + "\n"


def _shown(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case bool():
            return "yes" if cell else "**no**"
        case float():
            return f"{cell:.3g}"
    return str(cell)


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out all parts; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where device.json and device.md go")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="the time for all of it")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short texts")
    options = parser.parse_args(arguments)
    setup = Setup(torch.device(options.device), options.tiny)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    for result in carried_out(setup, options.budget):
        results[result.part] = result
        found = {"tiny": setup.tiny, "device": str(setup.device), "parts": [asdict(each) for each in results.values()]}
        _write(options.out / "device.json", json.dumps(found, indent=1))
        _write(options.out / "device.md", page([*results.values()], setup))
        if result.ended:
            print(f"{result.part}: {result.seconds:.1f} s {result.error or ''}", flush=True)
    return int(any(result.error for result in results.values()))


def _write(path: Path, text: str) -> None:
    """Write a whole file, or leave the one that is there."""
    begun = path.with_suffix(".part")
    begun.write_text(text, encoding="utf-8")
    begun.replace(path)


if __name__ == "__main__":
    sys.exit(main())
