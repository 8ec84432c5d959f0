"""Passes captured once and repeated: the numbers of the given model, at every place and in every text."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from random import Random
from time import sleep
from typing import final

import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from typing_extensions import get_protocol_members, override

from specflow import (
    TEXT,
    CachedPredictor,
    Dice,
    GreedyProcessor,
    LookupTree,
    Proposal,
    autoregressive_generate,
    chain,
    run,
    speculative_generate,
    speculative_step,
    start,
)
from specflow.accelerate import build, fast
from specflow.accelerate.build import FREE, NotAccelerated
from specflow.accelerate.captured import MOST, PASSES, Capture, Captured, CudaGraphs, Work
from specflow.accelerate.family import weights_of
from specflow.accelerate.linear import TOKENS, Plain
from specflow.accelerate.llama import ELEMENTS, Llama, _silu
from specflow.batch.texts import ReadsTexts, Text
from specflow.caches import BLOCK, KVCache
from specflow.errors import DecodeError
from specflow.predictors import Resumed, UncachedPredictor, early_exit, last_rows
from specflow.predictors.early import ShowsEnds
from specflow.predictors.skip import SkipsLayers
from specflow.testing import conformance, through_trees
from tests.architectures import NAMED, WINDOW
from tests.tape import CLEARED, FakeCuda, Graph, on_fake_cuda, on_tape
from tests.toys import VOCABULARY, passes_of, tiny_gpt2, tiny_llama


def captured(model: PreTrainedModel, capture: Capture = on_tape) -> Captured:
    """The model, its passes on tape."""
    return Captured(Llama(model.config, weights_of(model, model.dtype, model.dtype, Plain), FREE), lambda: capture)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "cwm", "smollm3"])
def test_captured_passes_compute_what_the_given_model_computes(name: str) -> None:
    model = evolve(NAMED[name], dtype=torch.float64).build()
    predictor = CachedPredictor(captured(model))
    report = conformance(
        predictor, UncachedPredictor(model), VOCABULARY, tolerance=1e-9, longest=5 * WINDOW, prune=predictor.prune
    )
    assert report.holds, report
    trees = through_trees(predictor, VOCABULARY)
    report = conformance(
        trees, UncachedPredictor(model), VOCABULARY, tolerance=1e-9, longest=5 * WINDOW, prune=predictor.prune
    )
    assert report.holds, report


def test_trees_of_any_shape_are_repetitions_of_one_pass() -> None:
    captures: list[int] = []

    def counting(work: Work) -> Work:
        captures.append(1)
        return on_tape(work)

    model = tiny_llama()
    made = captured(model, counting)
    predictor, truth = CachedPredictor(made), UncachedPredictor(model)
    predictor((1, 2, 3), (Proposal(4), Proposal(5, parent=TEXT)))  # the model is tried
    captures.clear()
    passes = passes_of(made)
    predictor((1, 2), ())  # its hook has made another model of it
    passes.clear()
    beside = Proposal(4), Proposal(5, parent=TEXT), Proposal(6, parent=TEXT)
    forked = Proposal(4), Proposal(5), Proposal(6, parent=0)
    for drafts in (beside, forked, chain((4, 5, 6))):
        for tokens in ((1, 2, 3), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 6)):
            assert (predictor(tokens, drafts) - truth(tokens, drafts)).abs().max() < 1e-9
    assert set(passes) == {4}
    assert len(passes) == 9
    assert len(captures) <= 1  # the trial may have taken a pass over 4 tokens before


def test_a_pass_is_captured_once_and_repeated_at_other_places() -> None:
    captures: list[int] = []

    def counting(work: Work) -> Work:
        captures.append(1)
        return on_tape(work)

    model = tiny_llama()
    predict, fresh = CachedPredictor(captured(model, counting)), UncachedPredictor(model)
    text = tuple(i % VOCABULARY for i in range(60))
    predict(text[:20], ())  # tried in passes over 1, 4 and 8 tokens
    captures.clear()
    for end, last in ((21, 1), (22, 1), (23, 1), (26, 3), (30, 4), (29, 2), (33, 3), (57, 24)):
        assert (last_rows(predict, text[:end], last) - last_rows(fresh, text[:end], last)).abs().max() < 1e-9
    assert len(captures) == len({2, 32})


def test_longer_passes_are_not_captured_and_buffers_grow() -> None:
    model = tiny_llama(context=4 * BLOCK)
    predict, fresh = CachedPredictor(captured(model)), UncachedPredictor(model)
    text = tuple(i * 7 % VOCABULARY for i in range(BLOCK + 200))
    for end in (BLOCK - 3, BLOCK - 2, BLOCK + 2, BLOCK + 2 + max(PASSES) + 1, BLOCK + 60, BLOCK + 61):
        assert (predict(text[:end], ()) - fresh(text[:end], ())).abs().max() < 1e-9


def test_a_text_takes_over_the_buffer_and_the_passes_of_one_that_is_gone() -> None:
    model = tiny_llama()
    made = captured(model)
    predictors = [CachedPredictor(made), CachedPredictor(made)]
    texts = tuple(range(20)), tuple(range(20, 0, -1))
    fresh = UncachedPredictor(model)
    for end in range(10, 20):  # in turns: neither may read what the other wrote
        for i, text in enumerate(texts):
            assert (predictors[i](text[:end], ()) - fresh(text[:end], ())).abs().max() < 1e-9
    assert len(made._tracks) == 2
    predictors[0] = CachedPredictor(made)  # the first of them is gone
    for end in range(10, 20):
        for i, text in enumerate(texts):
            assert (predictors[i](text[:end], ()) - fresh(text[:end], ())).abs().max() < 1e-9
    assert len(made._tracks) == 2


def test_threads_take_turns_over_captured_passes() -> None:
    """A graph reads and writes one memory: two texts at once, and one that takes over what another leaves."""
    model = tiny_llama()
    texts = [tuple(random.choices(range(VOCABULARY), k=30)) for random in map(Random, range(3))]
    expected = [last_rows(UncachedPredictor(model), text, 20) for text in texts]
    made = captured(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(i: int) -> list[Tensor]:
        found = []
        for _ in range(3):
            predict = CachedPredictor(made)
            predict(texts[i][:10], ())
            found.append(torch.cat([predict(texts[i][:end], ()) for end in range(11, 31)]))
        return found

    try:
        with ThreadPoolExecutor(3) as pool:
            for truth, found in zip(expected, pool.map(work, range(3)), strict=True):
                assert all((rows - truth).abs().max() < 1e-9 for rows in found)
    finally:
        sys.setswitchinterval(interval)


def test_a_batch_stays_in_its_slots_and_few_passes_are_captured() -> None:
    """Texts that ask at different times, begin and end: each pass is one of two, over all four slots."""
    captures: list[int] = []

    def counting(work: Work) -> Work:
        captures.append(1)
        return on_tape(work)

    model = tiny_llama(context=2 * BLOCK)
    made, fresh = captured(model, counting), UncachedPredictor(model)
    random = Random(5)
    texts = [random.choices(range(VOCABULARY), k=200) for _ in range(9)]
    caches = [made.new_cache() for _ in range(4)]
    playing, ends, following = [0, 1, 2, 3], [0, 0, 0, 0], 4

    def step(slots: Sequence[int], k: int) -> None:
        asked = [
            Text(torch.tensor(texts[playing[i]][ends[i] : ends[i] + k]), caches[i], None if k == 1 else (-1, 0, 0), 1)
            for i in slots
        ]
        rows = made(texts=asked).logits[0]
        for i, row in zip(slots, rows, strict=True):
            path = texts[playing[i]][: ends[i] + k]
            if k > 1:
                del path[-2]  # the last is the second's sibling
                caches[i].keep(ends[i], [0, 2])
                texts[playing[i]] = [*path, *texts[playing[i]][ends[i] + k :]]
            ends[i] = len(path)
            assert (row - fresh(tuple(path), ())[0]).abs().max() < 1e-9

    step(range(4), 1)
    step(range(4), 3)
    captures.clear()
    for turn in range(40):
        slots = sorted(random.sample(range(4), random.choice([2, 3, 4])))
        if turn % 12 == 11:  # a text ends, and another begins in its place
            playing[slots[0]], ends[slots[0]], following = following, 0, following + 1
            caches[slots[0]] = made.new_cache()
        slots = [i for i in range(4) if i in slots or max(slots) == 1]
        step(slots, random.choice([1, 3]))
    assert len(made._tracks) == 4
    assert len(captures) <= 2  # those of the first two slots alone
    assert {running for _, running, _ in made._passes} <= {(0, 1), (0, 1, 2, 3)}


def test_a_slot_without_room_stands_aside() -> None:
    model = tiny_llama(context=2 * BLOCK)
    made, fresh = captured(model), UncachedPredictor(model)
    text = [i * 7 % VOCABULARY for i in range(BLOCK + 3)]
    full, *others = caches = [made.new_cache() for _ in range(3)]
    made(texts=[Text(torch.tensor(text[:4]), cache, None, 1) for cache in caches])
    made(texts=[Text(torch.tensor(text[4:BLOCK]), full, None, 1)])
    assert full.length == full.buffer.shape[3] == BLOCK
    for end in range(5, 8):
        rows = made(texts=[Text(torch.tensor(text[end - 1 : end]), cache, None, 1) for cache in others]).logits[0]
        assert all((row - fresh(tuple(text[:end]), ())[0]).abs().max() < 1e-9 for row in rows)
    last = made(texts=[Text(torch.tensor(text[BLOCK:]), full, None, 1)]).logits[0]
    assert (last - fresh(tuple(text), ())).abs().max() < 1e-9


def test_many_tokens_of_many_texts_are_not_captured() -> None:
    captures: list[int] = []

    def counting(work: Work) -> Work:
        captures.append(1)
        return on_tape(work)

    model = tiny_llama()
    made, fresh = captured(model, counting), UncachedPredictor(model)
    text = tuple(range(max(PASSES)))
    asked = [Text(torch.tensor(text), made.new_cache(), None, 1) for _ in range(MOST // max(PASSES) + 1)]
    assert all((row - fresh(text, ())[0]).abs().max() < 1e-9 for row in made(texts=asked).logits[0])
    assert captures == []


def test_a_text_begun_in_inference_mode_goes_on_in_any() -> None:
    """What was made there could be written there alone."""
    model = tiny_llama()
    fresh, made = UncachedPredictor(model), captured(model)
    drafts = Proposal(4), Proposal(5, parent=TEXT), Proposal(6, parent=TEXT)
    for each in (made, made.eager):
        predict = CachedPredictor(each)
        with torch.inference_mode():
            predict((5, 9, 7), ())
            predict((5, 9, 7, 3), drafts)
        for tokens in ((5, 9, 7, 3, 6, 2), (5, 9, 7, 3, 6, 2, 5)):  # another draft than the first is kept
            assert (predict(tokens, drafts) - fresh(tokens, drafts)).abs().max() < 1e-9


def test_autocast_makes_no_difference_to_captured_passes() -> None:
    model, text = tiny_llama(dtype=torch.float32), tuple(range(1, 20))
    expected = last_rows(UncachedPredictor(model), text, 4)
    with torch.autocast("cpu", torch.bfloat16):
        predict = CachedPredictor(captured(model))
        predict(text[:-4], ())
        rows = torch.cat([predict(text[:end], ()) for end in range(16, 20)])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-4)


def test_another_models_cache_is_refused() -> None:
    made = captured(tiny_llama())
    with pytest.raises(DecodeError, match="not one of this model's"):
        made(texts=[Text(torch.tensor([1]), KVCache(torch.zeros(1, 2, 1, 0, 4)), None, 1)])


def test_first_layers_draft_over_captured_passes_too() -> None:
    """What looks at the ends of the layers sees them, and a pass that nobody looks at is captured."""
    captures: list[int] = []

    def counting(work: Work) -> Work:
        captures.append(1)
        return on_tape(work)

    model = tiny_llama(layers=4)
    made = captured(model, counting)
    early = early_exit(made, 2)
    target = Resumed(made, early)
    report = conformance(target, UncachedPredictor(model), VOCABULARY, tolerance=1e-9, prune=target.prune)
    assert report.holds, report
    first = CachedPredictor(made.without_layers(frozenset({2, 3})))
    assert (early((5, 9, 7), ()) - first((5, 9, 7), ())).abs().max() < 1e-9
    captures.clear()
    CachedPredictor(made.without_layers(frozenset({1})))((1, 2, 3), ())
    assert captures


@pytest.mark.parametrize("protocol", [ShowsEnds, SkipsLayers, ReadsTexts])
def test_what_a_model_can_do_is_seen_in_its_class(protocol: type) -> None:
    """From Python 3.12 on `isinstance` looks no further, and torch keeps submodules elsewhere."""
    for kind in (Llama, Captured):
        assert get_protocol_members(protocol) <= {*dir(kind)}


def test_a_copy_captures_passes_of_its_own() -> None:
    made = captured(tiny_llama())
    CachedPredictor(made)((1, 2, 3), ())
    other = deepcopy(made)
    assert other._tracks == []
    assert torch.equal(CachedPredictor(other)((1, 2, 3), ()), CachedPredictor(made)((1, 2, 3), ()))


def test_the_last_logits_that_are_wanted_and_a_cache_that_is_not() -> None:
    made = captured(tiny_llama())
    ids = torch.arange(12)[None]
    cache = made(ids[:, :5]).cache
    assert isinstance(cache, KVCache)
    whole = made(ids).logits
    kept = made(ids[:, 5:], cache=cache, use_cache=False, logits_to_keep=3)
    assert kept.cache is None
    assert cache.length == 12
    assert kept.logits.shape == (1, 3, whole.shape[-1])
    assert (kept.logits - whole[:, -3:]).abs().max() < 1e-9
    before = kept.logits.clone()
    cache.rollback(5)
    made(ids[:, :7] + 1, cache=cache)
    assert torch.equal(kept.logits, before)  # what was handed out is not written again


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """CUDA, made of a stream, a graph and a device that are the CPU's."""
    monkeypatch.setattr(build, "_devices", lambda model: ["cuda"])
    return on_fake_cuda(monkeypatch, [])


@pytest.fixture
def graphs(cuda: FakeCuda) -> list[Graph]:
    """The graphs that it captures."""
    return cuda.graphs


def test_speculation_over_captured_passes(graphs: list[Graph]) -> None:
    """The whole way that a model on CUDA goes."""
    model, drafter = tiny_llama(), tiny_llama(seed=1)
    made = fast(model)
    assert isinstance(made, Captured)
    assert isinstance(made._capture, CudaGraphs)
    prompt = [5, 9, 7, 3]
    expected = autoregressive_generate(prompt, model, 40)
    assert autoregressive_generate(prompt, made, 40, use_cache=True) == expected
    assert speculative_generate(prompt, fast(drafter), made, max_gen_len=40, use_cache=True)[0] == expected
    predictor = CachedPredictor(made)
    step = speculative_step(LookupTree(), predictor, GreedyProcessor(), Dice(), prune=(predictor,))
    assert list(run(step, start(prompt, 40).unwrap()).state.output) == expected

    other = tiny_gpt2()
    with pytest.warns(NotAccelerated, match="only the llama family"):
        assert fast(other) is other


def test_graphs_are_captured_on_the_models_device_and_share_its_memory(graphs: list[Graph]) -> None:
    """What is launched on another device than the current one would not be captured, and nothing would say so."""
    first, second = fast(tiny_llama()), fast(tiny_llama(seed=1))
    assert isinstance(first, Captured)
    models = [first, second, deepcopy(first), first.without_layers(frozenset({0}))]
    pools = []
    for model in models:
        graphs.clear()
        predict = CachedPredictor(model)
        for end in (3, 4, 6, 10, 19, 36):
            predict(tuple(range(end)), ())
        assert len(graphs) > 1
        assert {graph.device for graph in graphs} == {torch.device("cpu")}
        pools.append({graph.pool for graph in graphs})
    assert all(len(pool) == 1 for pool in pools)
    assert len(set.union(*pools)) == len(models)  # threads take turns over a model, not over several


def adding(x: Tensor) -> Work:
    """Some work over one tensor."""
    return lambda: (x + 1, x + 2)


def test_a_graph_bakes_no_workspace_in_that_anybody_frees(cuda: FakeCuda) -> None:
    """All captures are on one stream, each with workspaces of the graph's own pool."""
    x, capture, before = torch.zeros(2), CudaGraphs(torch.device("cpu")), cuda.stream
    repeats = [capture(adding(x)) for _ in range(2)]
    x.fill_(5)
    assert all(repeat()[1].tolist() == [7.0, 7.0] for repeat in repeats)
    ran, *rest = cuda.asked
    assert rest == [before, CLEARED, ran, CLEARED, ran, before, CLEARED, ran, CLEARED]
    assert ran is not before
    assert cuda.stream is before


def test_a_capture_that_fails_leaves_nothing_behind(cuda: FakeCuda) -> None:
    x, capture, before = torch.zeros(2), CudaGraphs(torch.device("cpu")), cuda.stream
    cuda.breaks = True
    with pytest.raises(RuntimeError, match="invalidated"):
        capture(adding(x))
    assert cuda.stream is before
    assert cuda.taking == []
    assert gc.isenabled()
    cuda.breaks = False
    assert capture(adding(x))()[0].tolist() == [1.0, 1.0]
    failed, second = cuda.graphs
    assert failed.pool is not second.pool  # what is in there belongs to nobody


def test_captures_in_several_threads_take_turns(cuda: FakeCuda) -> None:
    """As torch asks: the fake refuses two at once."""

    def slow() -> tuple[Tensor, Tensor]:
        sleep(0.02)
        return torch.ones(1), torch.ones(1)

    with ThreadPoolExecutor(3) as pool:
        repeats = [*pool.map(lambda i: CudaGraphs(torch.device("cpu"))(slow), range(3))]
    assert all(repeat()[0].item() == 1 for repeat in repeats)


@final
class Silus(TorchDispatchMode):  # type: ignore[no-untyped-call] # of torch
    """While it is entered: how many rows each SiLU is over."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # of torch
        self.rows: list[int] = []

    @override
    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made: object = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.silu.default:
            assert isinstance(made, Tensor)
            self.rows.append(len(made))
        return made


def test_a_device_is_given_a_prompt_in_few_pieces(cuda: FakeCuda) -> None:
    """There each piece reads all weights again, and each part of an elementwise operation is a kernel of its own."""
    text = tuple([i * 7 % VOCABULARY for i in range(TOKENS + 40)])
    model = tiny_llama(context=2 * len(text))
    made = fast(model)
    predict = CachedPredictor(made)
    predict(text[:3], ())  # the model is tried
    with Silus() as silus:
        rows = predict(text[3:], ())
    assert (rows - UncachedPredictor(model)(text[3:], ())).abs().max() < 1e-9
    assert silus.rows == 2 * [len(text) - 3]
    with FakeTensorMode(), Silus() as silus:
        _silu(torch.empty(64, ELEMENTS, device="cuda"))
    assert silus.rows == [64]
