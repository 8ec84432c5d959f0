"""Caches of every kind under one memo: what it costs, what fits, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Module
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from typing_extensions import override

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    PointMass,
    Proposal,
    Tokens,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.caches import RECORD, LossyCache
from specflow.loop import once
from specflow.predictors import UncachedPredictor, last_rows
from specflow.predictors.cached import REREAD
from specflow.testing import model_conformance
from tests.architectures import NAMED, WINDOW
from tests.toys import oracle, tiny_llama

PROMPT = (5, 9, 5, 9, 7, 3, 5, 9, 7, 3, 5)


class Counted(Module):
    """A model that counts its passes and the tokens that it reads."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        CachedPredictor(model)(PROMPT, ())
        self.passes: list[int] = []
        model.register_forward_pre_hook(lambda module, inputs: self.passes.append(inputs[0].shape[1]))


def knowing(text: list[int], wrong: int) -> Callable[[Tokens], Iterator[Proposal[PointMass]]]:
    """Drafts the true text, but for every token at a multiple of `wrong`."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        for i in range(len(tokens), len(text)):
            token = (text[i] + 1) % 64 if i % wrong == 0 else text[i]
            yield Proposal(token)

    return draft


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next", "lfm2", "falcon_h1", "gemma3_text", "llama"])
def test_refused_drafts_cost_no_extra_target_pass(kind: str) -> None:
    model = NAMED[kind].build()
    text = [*PROMPT, *oracle(PROMPT, model, 24)]
    predictor = CachedPredictor(model)
    predictor((1, 2, 3), ())  # finds out how it can be fed
    counted = Counted(model)
    step = speculative_step(knowing(text, 3), predictor, GreedyProcessor(), Dice(), Fixed(4), (predictor,))
    first = autoregressive_step(predictor, GreedyProcessor(), Dice())
    state = run(once(first, step), start(PROMPT, 24).unwrap()).state
    assert list(state.tokens) == text
    assert state.tally.accepted < state.tally.drafted
    assert len(counted.passes) == state.tally.steps
    assert max(counted.passes[1:]) <= REREAD + 5


def test_a_text_read_again_and_again_is_moved_up_in_few_passes_of_its_own() -> None:
    model = NAMED["mamba2"].build()
    text = [*PROMPT, *oracle(PROMPT, model, 120)]
    CachedPredictor(model)(PROMPT, ())
    predictor, counted = CachedPredictor(model), Counted(model)
    step = speculative_step(knowing(text, 1), predictor, GreedyProcessor(), Dice(), Fixed(2))
    state = run(step, start(PROMPT, 120).unwrap()).state
    assert list(state.tokens) == text
    assert state.tally.accepted == 0
    assert len(counted.passes) <= state.tally.steps + 1 + 120 // REREAD
    assert max(counted.passes) <= 2 * REREAD + 3


def test_a_model_is_tried_once() -> None:
    model = NAMED["mamba2"].build()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].shape[1]))
    CachedPredictor(model)(PROMPT, ())
    assert len(passes) > 30
    passes.clear()
    CachedPredictor(model)(PROMPT, ())
    assert passes == [len(PROMPT)]
    model.to(torch.bfloat16)
    CachedPredictor(model)(PROMPT, ())
    assert len(passes) > 10


def test_the_state_behind_the_prompt_is_kept_for_the_next_sample() -> None:
    model = NAMED["mamba2"].build()
    counted, predictor = Counted(model), CachedPredictor(model)
    first = autoregressive_step(predictor, GreedyProcessor(), Dice())
    run(first, start(PROMPT, 10).unwrap())
    counted.passes.clear()
    predictor((*PROMPT, 1), ())
    assert counted.passes == [1]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mistral", "gpt_oss", "qwen3_5_text", "falcon_h1", "mamba2"])
def test_a_static_cache_conforms(kind: str) -> None:
    architecture = NAMED[kind]
    model = architecture.build()
    predictor = CachedPredictor(model, lambda: StaticCache(model.config, max_cache_len=5 * WINDOW))
    report = model_conformance(model, predictor=predictor, steps=60, longest=5 * WINDOW)
    assert report.holds, report


def test_a_text_that_outgrows_a_static_cache_is_refused_before_the_model_runs() -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model, lambda: StaticCache(model.config, max_cache_len=16))
    assert predictor.limits.context == 16
    expected = oracle(PROMPT, model, 5)
    step = autoregressive_step(predictor, GreedyProcessor(), Dice())
    assert list(run(step, start(PROMPT, 50, (), predictor.limits).unwrap()).state.output) == expected
    counted = Counted(model)
    predictor((*PROMPT, *expected), ())
    counted.passes.clear()
    with pytest.raises(DecodeError, match="outgrows a cache of 16 tokens: received 17; make a larger cache"):
        predictor((*PROMPT, *expected, 1), ())
    assert counted.passes == []
    predictor((*PROMPT, *expected), ())
    assert counted.passes == [1]  # the memo is still there


def test_a_window_that_is_longer_than_its_static_cache_does_not_become_shorter() -> None:
    model = NAMED["mistral"].build()
    predictor = CachedPredictor(model, lambda: StaticCache(model.config, max_cache_len=WINDOW - 2))
    assert predictor.limits.context == WINDOW - 2
    assert CachedPredictor(model, lambda: StaticCache(model.config, max_cache_len=99)).limits.context == 256


def test_the_same_cache_handed_out_twice_is_refused() -> None:
    model = tiny_llama()
    cache = DynamicCache(config=model.config)
    with pytest.raises(DecodeError, match="a new cache is not empty"):
        CachedPredictor(model, lambda: cache)((1, 2, 3), ())


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The numbers of so many bits that bytes hold, the lowest bits of all of them first."""
    return torch.cat([(packed >> bits * i) & (2**bits - 1) for i in range(8 // bits)])


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_a_quantized_cache_is_used_only_where_it_is_called_lossy(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "quanto":  # its own kernel is C++ that is compiled at its first use, for a minute
        kernels = SimpleNamespace(unpack=unpack)
        monkeypatch.setattr("optimum.quanto.library.extensions.cpp.ext._lib", kernels)
    model = tiny_llama(dtype=torch.float32)
    sizes: dict[str, int] = {} if backend == "fp8" else {"q_group_size": 8, "residual_length": 8}

    def make() -> QuantizedCache:
        return QuantizedCache(backend, model.config, **sizes)

    with pytest.raises(DecodeError, match=r"not those of a fresh pass: received QuantizedCache; .*LossyCache"):
        CachedPredictor(model, make)(PROMPT, ())
    report = model_conformance(model, predictor=CachedPredictor(model, LossyCache(make)))
    assert not report.holds
    assert median(divergence.difference for divergence in report.divergences) < 1.0  # rounded: the logits reach 8
    step = speculative_step(
        knowing([*PROMPT, *oracle(PROMPT, model, 20)], 3),
        CachedPredictor(model, LossyCache(make)),
        GreedyProcessor(),
        Dice(),
    )
    assert len(run(step, start(PROMPT, 20).unwrap()).state.output) == 20


def offloaded(config: PreTrainedConfig) -> list[Callable[[], object]]:
    return [
        lambda: DynamicCache(config=config, offloading=True),
        lambda: StaticCache(config, max_cache_len=40, offloading=True),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["dynamic", "static"])
def test_an_offloaded_cache_is_refused_where_there_is_nothing_to_offload_from(which: int) -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model, offloaded(model.config)[which])
    counted = Counted(model)
    for _ in range(2):  # the same whenever it is asked
        with pytest.raises(DecodeError, match="only from CUDA: received a model on cpu; make it without offloading"):
            predictor(PROMPT, ())
    assert counted.passes == []


def test_a_sliding_window_records_what_a_draft_may_take_back_and_not_much_more() -> None:
    model = NAMED["mistral"].build()
    counted, predictor = Counted(model), CachedPredictor(model)
    text = tuple(torch.randint(0, 64, (240,)).tolist())
    longest = 0
    for end in range(1, 240):
        predictor(text[:end], ())
        past = predictor._memos._kept[0].past
        assert isinstance(past.cache, DynamicCache)
        (layer, _) = past.cache.layers
        assert isinstance(layer, DynamicSlidingWindowLayer)
        assert layer.keys is not None
        longest = max(longest, layer.keys.shape[-2])
    assert WINDOW + RECORD < longest <= WINDOW + 2 * RECORD
    counted.passes.clear()
    predictor((*text[: 239 - RECORD // 2], 1), ())
    assert counted.passes == [1]  # cropped
    predictor((*text[:20], 1), ())
    assert counted.passes == [1, 21]  # read again


class Bigram(Module):
    """Sums embeddings over all that came before: its cache holds a row for each token, however it lays them out."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 6).double()
        self.head = nn.Linear(6, 16, dtype=torch.float64)
        self.transposed = transposed

    @override
    def forward(
        self,
        input_ids: Tensor,
        past_key_values: tuple[tuple[Tensor, Tensor], ...] | None = None,
        use_cache: bool = True,
    ) -> Output:
        new = self.embedding(input_ids)[:, None]
        if past_key_values is not None:
            old = past_key_values[0][0]
            new = torch.cat([old.transpose(-1, -2) if self.transposed else old, new], dim=-2)
        hidden = new.cumsum(dim=-2)[:, 0, -input_ids.shape[1] :].tanh()
        kept = new.transpose(-1, -2) if self.transposed else new
        return Output(self.head(hidden), ((kept, kept),) if use_cache else None)


class Output:
    def __init__(self, logits: Tensor, past_key_values: object | None) -> None:
        self.logits = logits
        self.past_key_values = past_key_values


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cache_of_tuples_is_cropped_where_it_has_rows_and_marked_where_it_has_not(transposed: bool) -> None:
    model = Bigram(transposed=transposed)
    predictor = CachedPredictor(model)
    report = model_conformance(model, predictor=predictor, longest=24)
    assert report.holds, report
    assert predictor.feeding is not None
    assert predictor.feeding.name == "any pieces"
    for end in (5, 6, 7):  # at 6 tokens the transposed tensors look like rows, too
        predictor(PROMPT[:end], ())
        assert predictor._memos._kept[0].past.needs_marks == transposed or end == 5


class Faulty(Module):
    """A model that goes wrong in a way of its own when it is fed over a cache."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.inner = tiny_llama()
        self.fault = fault

    @override
    def forward(self, input_ids: Tensor, cache: DynamicCache | None = None, use_cache: bool = True) -> object:
        pieces = input_ids.shape[1]
        if cache is not None and self.fault == "raises for pieces" and pieces > 1:
            raise RuntimeError("one token at a time, please")
        forgets = {"forgets for pieces": pieces > 1, "forgets for one": pieces == 1, "forgets always": True}
        if forgets.get(self.fault, False):
            cache = None
        return self.inner(input_ids, cache=cache, use_cache=use_cache)


@pytest.mark.parametrize(
    ("fault", "feeding"),
    [
        ("none", "any pieces"),
        ("raises for pieces", "one token at a time"),
        ("forgets for pieces", "one token at a time"),
        ("forgets for one", "two tokens or more"),
        ("forgets always", "the whole text afresh"),
    ],
)
def test_how_a_model_can_be_fed_is_found_out(fault: str, feeding: str) -> None:
    model = Faulty(fault)
    predictor = CachedPredictor(model)
    report = model_conformance(model, predictor=predictor, tolerance=1e-9)
    assert report.holds, report
    assert predictor.feeding is not None
    assert predictor.feeding.name == feeding


@pytest.mark.parametrize("edge", [13, 16, 17, 18, 20, 22, 27, 31])
@pytest.mark.parametrize("cached", [True, False])
def test_a_text_that_crosses_the_edge_of_a_longrope_is_read_afresh_there(cached: bool, edge: int) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 256 / edge,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 9.0, 30.0],
    }
    config = AutoConfig.for_model(
        "phi3", **{**NAMED["phi3"].config, "rope_parameters": rope, "original_max_position_embeddings": edge}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.float64)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    expected = oracle(PROMPT, model, 24)
    predictor = CachedPredictor(model) if cached else UncachedPredictor(model)
    step = speculative_step(
        knowing([*PROMPT, *expected], 4), predictor, GreedyProcessor(), Dice(), Fixed(5), (predictor,)
    )
    assert list(run(step, start(PROMPT, 24).unwrap()).state.output) == expected
    for end in (25, edge, edge + 1, edge - 1, 30):
        text = (*PROMPT, *expected)[:end]
        fresh = torch.cat([model(torch.tensor([text[: end - back]])).logits[0, -1:] for back in (2, 1, 0)])
        assert torch.allclose(last_rows(predictor, text, 3), fresh, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "mamba2", "falcon_h1", "lfm2", "rwkv"])
def test_gross_faults_are_found_in_half_precision_and_rounding_is_none(kind: str, dtype: torch.dtype) -> None:
    model = NAMED[kind].build()
    model.to(dtype)
    predictor = CachedPredictor(model)
    predictor(PROMPT, ())
    assert predictor.feeding is not None
    assert predictor.feeding.name == NAMED[kind].feeding


@pytest.mark.parametrize(
    ("room", "feeding"), [(12, "one token at a time"), (8, "one token at a time"), (7, "the whole text afresh")]
)
def test_a_model_that_reads_few_tokens_is_tried_on_as_few(room: int, feeding: str) -> None:
    class Narrow(Faulty):
        @override
        def forward(self, input_ids: Tensor, cache: DynamicCache | None = None, use_cache: bool = True) -> object:
            assert input_ids.shape[1] + (0 if cache is None else cache.get_seq_length()) <= room
            return super().forward(input_ids, cache, use_cache)

        @property
        def config(self) -> GPT2Config:
            return GPT2Config(n_positions=room)

    model = Narrow("forgets for pieces")
    predictor = CachedPredictor(model)
    predictor((1, 2), ())
    assert predictor.feeding is not None
    assert predictor.feeding.name == feeding


def test_a_cache_for_a_model_that_takes_none_is_refused() -> None:
    model = NAMED["openai-gpt"].build()
    with pytest.raises(DecodeError, match="the model takes no cache"):
        CachedPredictor(model, lambda: DynamicCache(config=model.config))


def test_a_pass_that_fails_leaves_no_memo() -> None:
    model = NAMED["qwen3_next"].build()
    predictor = CachedPredictor(model)
    predictor(PROMPT, ())
    with pytest.raises(DecodeError, match="outside the vocabulary of 64: received 1000"):
        last_rows(predictor, (*PROMPT, 1, 2, 1000), 3)
    fresh = last_rows(CachedPredictor(model), (*PROMPT, 1, 2, 3), 3)
    assert torch.allclose(last_rows(predictor, (*PROMPT, 1, 2, 3), 3), fresh, atol=1e-4)
