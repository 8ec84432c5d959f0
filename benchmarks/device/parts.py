"""The parts, in the order of their worth."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Final, TypeAlias

import torch
import transformers
from torch.nn import Module
from torch.profiler import ProfilerActivity, profile

from benchmarks.accelerate import Decode, generating, plain, stepping
from benchmarks.device.attention import ALLOWED, OPERATOR, cudnn_first, without_cudnn
from benchmarks.device.decoders import GAMMA, GREEDY, Told, costing, drafting, pacing
from benchmarks.device.found import Cell, Failure, Found, Table, attempted
from benchmarks.device.models import (
    GEMMA,
    LLAMA_1B,
    LLAMA_8B,
    MAMBA,
    QWEN,
    Setup,
    Shape,
    first_layers,
    layers_of,
    quarter,
    versions,
    vocabulary_of,
)
from specflow import (
    CachedPredictor,
    DecodeState,
    Dice,
    Drafter,
    Finished,
    Fixed,
    Predictor,
    Step,
    Tokens,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.accelerate.captured import PASSES, Captured
from specflow.accelerate.check import arbitrary_text
from specflow.batch import BatchPredictor, Failed, together
from specflow.bench.stopwatch import Stopwatch, clock_for
from specflow.errors import said
from specflow.paths import last_rows
from specflow.predictors import UncachedPredictor
from specflow.predictors.trial import error_bound
from specflow.state import Tally
from specflow.testing import model_conformance


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
            ("attention by cuDNN allowed by default", ALLOWED),
            ("compute capability", ".".join(map(str, torch.cuda.get_device_capability(setup.device)))),
            ("memory, GB free of all", f"{free / 1e9:.1f} of {total / 1e9:.1f}"),
        ]
    yield Table("Where", ("what", ""), tuple(facts))


def conforms(setup: Setup) -> Iterator[Found]:
    """Whether what is read over a cache is what is read afresh, and greedy text with drafts the plain text."""
    # The 8B shape in the precision in which its passes are timed: other sizes may take other kernels.
    kinds = {torch.float32: (LLAMA_1B, QWEN, GEMMA, MAMBA), torch.bfloat16: (LLAMA_1B, LLAMA_8B, QWEN, GEMMA, MAMBA)}
    for dtype, shapes in kinds.items():
        for shape in shapes:
            name = f"{shape.name}, {str(dtype).removeprefix('torch.')}"
            yield from attempted(name, partial(_conforms, setup, name, shape, dtype))


def _conforms(setup: Setup, title: str, shape: Shape, dtype: torch.dtype) -> Iterator[Found]:
    read = setup.model(shape, dtype, most=4)
    written = read if dtype is torch.float32 else setup.sure(shape, dtype, most=4)
    if shape is GEMMA:
        for model in (read, written):
            model.config.sliding_window = min(64, int(model.config.sliding_window or 64))
    title += ", 4 layers at most: against fresh passes, and greedy texts "
    title += f"of {setup.new} tokens against the plain one"
    columns = ("model", "fed", "holds", "largest difference / logit", "drafts", "tree", "first layers", "fresh")
    # Texts are written where rounding parts none, rows read where they hang on all that comes before.
    kinds = [{"given": model} if shape in (GEMMA, MAMBA) else versions(setup, model) for model in (read, written)]
    for name in {**kinds[0], **kinds[1]}:
        # A note says why one of them has no such version.
        rows: Sequence[Cell] = (None,) * 3
        texts: Sequence[Cell] = (None,) * 4
        if name in kinds[0]:
            rows = _read(setup, kinds[0][name])
        if name in kinds[1]:
            texts = _written(setup, kinds[1][name], written is not read)
        yield Table(title, columns, ((name, *rows, *texts),))


def _read(setup: Setup, model: Module) -> tuple[Cell, ...]:
    predictor = CachedPredictor(model)
    largest = float(predictor(setup.prompt(model), ()).abs().max())
    tolerance = error_bound(next(model.parameters()).dtype) * largest
    steps, longest = (8, 48) if setup.tiny else (20, 96)
    report = model_conformance(model, tolerance=tolerance, steps=steps, longest=longest)
    return predictor.feeding.name, report.holds, report.largest / largest


def _written(setup: Setup, model: Module, sure: bool) -> list[Cell]:
    prompt, size = setup.prompt(model), vocabulary_of(model)
    truth, _ = plain(model)(prompt, setup.new)
    fresh = stepping(lambda: autoregressive_step(UncachedPredictor(model), GREEDY, Dice()))
    told, first = partial(Told, prompt, truth, size), first_layers(model)
    if sure and first is not None:
        first = costing(told, first)  # their own are all right there: nothing would be gone back from
    texts = [
        drafting(model, told),
        drafting(model, partial(Told, prompt, truth, size, branches=2), 8),
        None if first is None else drafting(model, first),
        fresh,
    ]
    return [None if decode is None else _alike(decode(prompt, setup.new)[0], truth) for decode in texts]


def _alike(text: Tokens, truth: Tokens) -> str:
    """Whether a text is another's, or where it parts from it."""
    differing = next((i for i, (ours, theirs) in enumerate(zip(text, truth, strict=True)) if ours != theirs), None)
    return "same" if differing is None else f"parts at {differing}"


def captured(setup: Setup) -> Iterator[Found]:
    """`accelerate.fast`, its passes captured on CUDA, against the same eager, the given model and `generate`."""
    for shape in (LLAMA_1B, LLAMA_8B):
        yield from attempted(shape.name, partial(_captured, setup, shape))


def _captured(setup: Setup, shape: Shape) -> Iterator[Found]:
    model = setup.sure(shape, torch.bfloat16)
    prompt, decoders = setup.prompt(model), {"generate": generating(model)}
    for name, each in versions(setup, model).items():
        decoders[f"plain, {name}"] = plain(each)
        if isinstance(each, Captured):
            decoders["plain, the same not captured"] = plain(each.eager)
    yield from compared(setup, f"{shape.name}, {layers_of(model)} layers, bf16: one text", model, decoders, prompt)
    if setup.device.type == "cuda":
        used = torch.cuda.memory_allocated(setup.device) / 1e9, torch.cuda.memory_reserved(setup.device) / 1e9
        yield Table(f"{shape.name}: memory after it", ("GB in use", "GB reserved"), (used,))


def compiled(setup: Setup) -> Iterator[Found]:
    """The same against `generate` with a static cache, which transformers compiles on CUDA."""
    model = setup.sure(LLAMA_1B, torch.bfloat16)
    static = generating(model, cache_implementation="static")
    decoders = {"generate, static cache": static}
    decoders |= {f"plain, {name}": plain(each) for name, each in versions(setup, model).items()}
    title = f"llama 1B, {layers_of(model)} layers, bf16: `generate` with a static cache"
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
    columns = ("decoder", "ms a token, prompt and all", "times the first", "accepted", "tokens a pass", "text")
    yield Table(title, columns, tuple(rows))


def _tallied(tally: Tally) -> tuple[Cell, Cell]:
    return _accepted(tally), 1 + tally.accepted / tally.steps if tally.steps else None


def _accepted(tally: Tally) -> Cell:
    return tally.acceptance_rate if tally.drafted else None


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
LAUNCHES: Final = COPIES[-3:]
"""Those of them of which one at least comes in any text: a profiler that saw none saw nothing of the device."""
ON_HOST: Final = ("aten::_local_scalar_dense", "aten::copy_")
"""What stands for copies where there is no device."""


def copies(setup: Setup) -> Iterator[Found]:
    """What is copied between host and device in a step, told by the profiler from a short and a longer text."""
    model = setup.sure(LLAMA_1B, torch.bfloat16, most=4)
    prompt, size = setup.prompt(model), vocabulary_of(model)
    truth, _ = plain(model)(prompt, setup.new)
    names, proof = (COPIES, LAUNCHES) if setup.device.type == "cuda" else (ON_HOST, ON_HOST)
    for kind, each in versions(setup, model).items():
        rows: list[tuple[Cell, ...]] = []
        told = partial(Told, prompt, truth, size)
        decoders = {
            "plain": plain(each),
            "drafts": drafting(each, told),
            "tree": drafting(each, partial(Told, prompt, truth, size, branches=2), 8),
        }
        first = first_layers(each)
        if first is not None:
            decoders["drafts at the cost of first layers"] = drafting(each, costing(told, first))
        for name, decode in decoders.items():
            lengths = setup.new // 4, setup.new
            # Models are tried and passes captured; and a text finds the room that the one before it has left.
            for n in lengths * 2:
                decode(prompt, n)
            (few, before), (many, after) = (_counted(setup, decode, prompt, n) for n in lengths)
            if not (_saw(proof, few) and _saw(proof, many)):
                yield Failure(f"{kind}, {name}", UNSEEN)
                continue
            found = each_step(names, few, many, after.steps - before.steps)
            rows.append((f"{kind}, {name}", _accepted(after), *found))
        title = f"llama 1B, {layers_of(model)} layers, bf16: a step, on average"
        if rows:
            yield Table(title, ("decoder", "accepted", *names), tuple(rows))


UNSEEN: Final = "the profiler saw no launch: what it counts is nothing"


def _saw(names: Sequence[str], events: Counter[str]) -> bool:
    """Whether an event of one of these names came."""
    return any(name in event for event in events for name in names)


def each_step(names: Sequence[str], few: Counter[str], many: Counter[str], steps: int) -> list[float]:
    """How often what has each of these names comes in a step: by how much more often in a text with so many more.

    What comes less often in the longer text counts as that: a negative number says that the texts are not alike.
    """
    more = Counter(many)
    more.subtract(few)
    return [sum(count for event, count in more.items() if name in event) / max(1, steps) for name in names]


def _counted(setup: Setup, decode: Decode, prompt: Tokens, new: int) -> tuple[Counter[str], Tally]:
    """How often each event came in a text, and what was drafted for it."""
    activities = [ProfilerActivity.CPU]
    if setup.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        _, tally = decode(prompt, new)
    return Counter({event.key: event.count for event in record.key_averages()}), tally


def passes(setup: Setup) -> Iterator[Found]:
    """What a pass over k tokens takes after a text, in milliseconds: captured up to the longest, and the same eager."""
    lengths = (1, 2, 4, 8) if setup.tiny else (*range(1, 9), 10, 12, 16, 20, 24, 32, 33, 40, 48, 64)
    for shape in (LLAMA_1B, LLAMA_8B):
        yield from attempted(shape.name, partial(_passes, setup, shape, lengths))


def _passes(setup: Setup, shape: Shape, lengths: Sequence[int]) -> Iterator[Found]:
    model = setup.sure(shape, torch.bfloat16)
    before = 16 if setup.tiny else 512
    text, clock = arbitrary_text(before + max(lengths), vocabulary_of(model)), clock_for(model)
    kinds = dict(versions(setup, model))
    kinds |= {f"{name}, but eager": each.eager for name, each in kinds.items() if isinstance(each, Captured)}
    for name, each in kinds.items():
        predict, rows = CachedPredictor(each), list[tuple[Cell, ...]]()
        for k in [k for k in lengths if k <= max(PASSES) or not isinstance(each, Captured)]:
            taken = []
            for turn in range(2 + 2 * setup.repeats):
                began = clock()
                last_rows(predict, text[: before + k], k)
                if turn > 1:  # the first reads what comes before, the second may capture
                    taken.append(1e3 * (clock() - began))
            rows.append((k, median(taken)))
        title = f"{shape.name}, {layers_of(model)} layers, bf16: ms for a pass over k tokens after {before}"
        yield Table(title, ("k", name), tuple(rows))


def drafts(setup: Setup) -> Iterator[Found]:
    """Plain, chains, trees, and drafts of the model's own first layers."""
    for shape in (LLAMA_8B, LLAMA_1B):
        yield from attempted(shape.name, partial(_drafts, setup, shape))


def _drafts(setup: Setup, shape: Shape) -> Iterator[Found]:
    model = setup.sure(shape, torch.bfloat16)
    prompt, size = setup.prompt(model), vocabulary_of(model)
    for name, each in versions(setup, model).items():
        truth, _ = plain(each)(prompt, setup.new)
        told, tree = partial(Told, prompt, truth, size), partial(Told, prompt, truth, size, branches=2)
        decoders = {
            "plain": plain(each),
            f"{GAMMA} drafts, 80 % right": drafting(each, told),
            "as many as pay": pacing(each, told),
            "tree of 8, each 80 % right": drafting(each, tree, 8),
        }
        first = first_layers(each)
        if first is not None:
            # Told, too: those of its own are all right, as in a sure model the embedding says what follows.
            cost = f"the first {quarter(each)} of {layers_of(each)} layers"
            decoders[f"{GAMMA} drafts, 80 % right, at the cost of {cost}"] = drafting(each, costing(told, first))
        # So that the first that CostAware sees of a pass is not its capture, which it would long take for the rule.
        for gamma in (1, 3, 8):
            drafting(each, told, gamma)(prompt, setup.new)
        title = f"{shape.name}, {layers_of(model)} layers, bf16, {name} model"
        yield from compared(setup, title, model, decoders, prompt)


def batches(setup: Setup) -> Iterator[Found]:
    """Several texts at once: tokens a second of all of them."""
    model = setup.sure(LLAMA_1B, torch.bfloat16)
    for name, each in versions(setup, model).items():
        rows = tuple([_batch(setup, each, slots) for slots in ((1, 2) if setup.tiny else (1, 8, 32))])
        with_drafts = f"{GAMMA} drafts, 80 % right"
        rates = ("tokens/s, plain", "passes, plain", f"tokens/s, {with_drafts}", f"passes, {with_drafts}")
        columns = ("texts", *rates, "accepted", "same text")
        yield Table(f"llama 1B, {layers_of(model)} layers, bf16, {name} model: batches", columns, rows)


def _batch(setup: Setup, model: Module, slots: int) -> tuple[Cell, ...]:
    size, clock, passes = vocabulary_of(model), clock_for(model), list[object]()
    prompts = [setup.prompt(model, number) for number in range(slots)]

    def turn(compose: Callable[[Predictor, int], Step]) -> list[DecodeState]:
        target = BatchPredictor(model, slots)  # it would know the prompts of an earlier turn
        steps = [compose(target, number) for number in range(slots)]
        starts = [start(prompt, setup.new).unwrap() for prompt in prompts]
        ends = dict(together([partial(run, *pair) for pair in zip(steps, starts, strict=True)], slots))
        return [_ended(ends[number]).state for number in range(slots)]

    def rate(compose: Callable[[Predictor, int], Step]) -> tuple[list[DecodeState], float, int]:
        for _ in range(2):  # models are tried, and passes captured
            turn(compose)
        passes.clear()
        began = clock()
        ends = turn(compose)
        return ends, slots * setup.new / (clock() - began), len(passes)

    # More passes than one text takes tell that texts are read one by one. The hook makes another model of it, to be
    # tried: so it comes before the warm-ups.
    with model.register_forward_hook(lambda *_: passes.append(None)):
        plain_ends, *without = rate(lambda target, number: autoregressive_step(target, GREEDY, Dice()))
        drafters = [Told(end.request.prompt, end.output, size) for end in plain_ends]
        ends, *with_drafts = rate(
            lambda target, number: speculative_step(drafters[number], target, GREEDY, Dice(), Fixed(GAMMA))
        )
    same = sum(ours.output == theirs.output for ours, theirs in zip(ends, plain_ends, strict=True))
    accepted = _accepted(sum([end.tally for end in ends], Tally()))
    return slots, *without, *with_drafts, accepted, f"{same}/{slots}"


def _ended(end: Finished | Failed) -> Finished:
    if isinstance(end, Failed):
        raise end.error
    return end


def times(setup: Setup) -> Iterator[Found]:
    """Where the time of a step goes: into the target's passes, the drafter, and specflow."""
    model = setup.sure(LLAMA_1B, torch.bfloat16)
    prompt, size = setup.prompt(model), vocabulary_of(model)
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
        parts = ("µs a step", "in passes", "drafting", "specflow's own")
        columns = ("decoder", "accepted", "steps", "passes", "tokens read", *parts)
        yield Table(f"llama 1B, {layers_of(model)} layers, bf16: where the time goes", columns, tuple(rows))


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
        tally = run(going_on, rest).state.tally
        seconds = watch.clock() - began
    read = sum(one.seconds for one in watch.passes)
    fed = sum(one.fed for one in watch.passes)
    parts = (seconds, read, watch.drafting, seconds - read - watch.drafting)
    steps = tally.steps
    return _accepted(tally), steps, len(watch.passes), fed, *[1e6 * part / steps for part in parts]


def attention(setup: Setup) -> Iterator[Found]:
    """What cuDNN's attention costs a text whose passes have shapes that it has not met, and one where it has."""
    model = setup.sure(LLAMA_1B, torch.bfloat16)
    prompt, size, clock = setup.prompt(model), vocabulary_of(model), clock_for(model)

    def decoders(prompt: Tokens, new: int) -> Mapping[str, Decode]:
        truth, _ = plain(model)(prompt, new)
        return {"plain": plain(model), "drafts": drafting(model, partial(Told, prompt, truth, size))}

    timed, other, few = decoders(prompt, setup.new), prompt[: len(prompt) // 2], setup.new // 4
    for kind, choosing in (("not allowed", without_cudnn), ("first", cudnn_first)):
        rows: list[tuple[Cell, ...]] = []
        title = f"llama 1B, {layers_of(model)} layers, bf16, given model: attention, cuDNN {kind}"
        with choosing():
            for decode in decoders(other, few).values():  # warm, for other numbers of keys
                decode(other, few)
            for name, decode in timed.items():
                taken = []
                for _ in range(2):
                    began = clock()
                    decode(prompt, setup.new)
                    taken.append(1e3 * (clock() - began) / setup.new)
                events, _ = _counted(setup, decode, prompt, few)
                ran = sorted(event.removeprefix(OPERATOR) for event in events if event.startswith(OPERATOR))
                if not ran:
                    yield Failure(f"{title}: {name}", "the profiler saw no attention: what ran is not known")
                rows.append((name, *taken, ", ".join(ran) or None))
        columns = ("decoder", "ms a token, first text", "ms a token, the same text again", "what ran")
        yield Table(title, columns, tuple(rows))


Part: TypeAlias = Callable[[Setup], Iterator[Found]]
PARTS: Final[tuple[tuple[str, Part, float], ...]] = (
    ("Where", where, 0.05),
    ("Conformance and identity", conforms, 0.3),
    ("Captured passes", captured, 0.2),
    ("Copies a step", copies, 0.1),
    ("What a pass takes", passes, 0.15),
    ("Drafts and trees", drafts, 0.25),
    ("Batches", batches, 0.2),
    ("Where the time goes", times, 0.1),
    ("Attention, cuDNN first and not allowed", attention, 0.08),
    ("A static cache, compiled", compiled, 0.5),
)
"""By what they are worth; and the most of the budget that each may take."""
