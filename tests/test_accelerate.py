"""Accelerated models: the same numbers, the same bits, and the given model where neither can be had."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, Final, Protocol, cast

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache, PreTrainedModel
from typing_extensions import override

from specflow import (
    TEXT,
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Match,
    MultinomialProcessor,
    PointMass,
    Proposal,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    accelerate,
    autoregressive_step,
    chain,
    limits_of,
    run,
    speculative_generate,
    speculative_step,
    start,
)
from specflow.accelerate import build, family, linear
from specflow.accelerate.any_model import Replaced, is_linear
from specflow.accelerate.llama import Llama
from specflow.batch import BatchPredictor
from specflow.caches import KVCache
from specflow.models import Loaded, load
from specflow.origin import weights_of
from specflow.predictors import UncachedPredictor, last_rows
from specflow.randomness import Sampling
from specflow.stages import Adjust, Draft, Verify, advance, commit
from specflow.state import CertainDrafter
from specflow.testing import conformance, model_conformance, through_trees
from tests.architectures import NAMED, WINDOW, Architecture
from tests.test_captured import captured
from tests.toys import VOCABULARY, oracle, passes_of, tiny_gpt2, tiny_llama


class MakeModel(Protocol):
    """Makes a tiny model of a seed."""

    def __call__(self, seed: int = 0) -> PreTrainedModel: ...


def variant(kind: str, **changes: object) -> Architecture:
    """A tiny architecture with some of its config changed."""
    return evolve(NAMED[kind], config={**NAMED[kind].config, **changes})


def scaled(**rope: object) -> Mapping[str, object]:
    return {"rope_theta": 10000.0, **rope}


LOSSY: Final = (accelerate.lossy_bf16, accelerate.lossy_int8, accelerate.lossy_int4)

FAMILY: Final = {
    "llama": NAMED["llama"],
    "llama, tied": variant("llama", tie_word_embeddings=True),
    "llama, biases": variant("llama", attention_bias=True, mlp_bias=True),
    "llama, a head for each": variant("llama", num_key_value_heads=4),
    "llama, one key head": variant("llama", num_key_value_heads=1),
    "llama, wide heads": variant("llama", head_dim=24),
    "llama, linear rope": variant("llama", rope_parameters=scaled(rope_type="linear", factor=4.0)),
    "llama, rope of a part": variant(
        "llama", rope_parameters=scaled(rope_type="proportional", partial_rotary_factor=0.5)
    ),
    "llama, llama 3 rope": variant(
        "llama",
        rope_parameters=scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama, yarn": variant(
        "llama", rope_parameters=scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "mistral, window": NAMED["mistral"],
    "ministral, window in some": variant(
        "ministral", num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "cwm, window in some": NAMED["cwm"],
    "qwen 2": NAMED["qwen2"],
    "qwen 2, window": variant("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen 3": NAMED["qwen3"],
    "qwen 3, window": variant("qwen3", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "smollm 3, no positions in some": variant("smollm3", num_hidden_layers=4, no_rope_layer_interval=2),
    "smollm 3, window": variant(
        "smollm3", num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=WINDOW
    ),
    "seed oss": NAMED["seed_oss"],
}


one_process = pytest.mark.xdist_group("accelerate")
"""For tests that share what is made of the real model."""

QUESTIONS: Final = (
    "Repeat after me, three times: the quick brown fox jumps over the lazy dog.",
    "Write a limerick about a programmer.",
    "List the first ten square numbers, one a line.",
)


@pytest.fixture(scope="module")
def smollm2_bf16(smollm2: Loaded) -> Loaded:
    """The real model in bf16, whose package is there if fp32's is."""
    return load("smollm2", "bfloat16").unwrap()


@pytest.fixture(scope="module")
def short_fp32(short: Loaded) -> Module:
    """The first layers of the real model in fp32, their passes equal bit for bit."""
    return accelerate.bit_for_bit(short.model)


@pytest.fixture(scope="module")
def short_bf16(short: Loaded) -> Module:
    """They in bf16, their passes equal bit for bit."""
    return accelerate.bit_for_bit(deepcopy(short.model).to(torch.bfloat16))


@pytest.fixture(scope="module")
def written(smollm2: Loaded) -> tuple[Tokens, Tokens]:
    """A prompt, and what the given model goes on with."""
    prompt = smollm2.chat(QUESTIONS[1])
    return prompt, greedy(smollm2.model, prompt, 40)


@pytest.fixture(scope="module")
def steady_fp32(smollm2: Loaded) -> Module:
    """The real model in fp32, its passes equal bit for bit."""
    return accelerate.bit_for_bit(smollm2.model)


# The same numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_computes_what_the_given_model_computes(name: str, dtype: torch.dtype) -> None:
    """Whatever is read and gone back to over the new cache, the logits are those of a fresh pass of the given model."""
    model = evolve(FAMILY[name], dtype=dtype).build()
    fast = accelerate.fast(model)
    assert isinstance(fast, Llama)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    predictor = CachedPredictor(fast)
    report = conformance(
        predictor, UncachedPredictor(model), VOCABULARY, tolerance=tolerance, longest=5 * WINDOW, prune=predictor.prune
    )
    assert report.holds, report
    trees = through_trees(predictor, VOCABULARY)
    report = conformance(
        trees, UncachedPredictor(model), VOCABULARY, tolerance=tolerance, longest=5 * WINDOW, prune=predictor.prune
    )
    assert report.holds, report
    passes = passes_of(fast)
    predictor((1, 2, 3), ())
    passes.clear()
    predictor((1, 2, 3), [Proposal(5), Proposal(6, parent=TEXT), Proposal(7, parent=0)])
    assert len(passes) == 1
    assert limits_of(fast) == limits_of(model)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "phi3", "gemma2", "falcon", "opt", "bloom", "lfm2", "granite"])
def test_other_models_get_faster_linear_layers(kind: str) -> None:
    model = evolve(NAMED[kind], dtype=torch.float32).build()
    fast = accelerate.fast(model)
    assert type(fast) is type(model)
    assert any(isinstance(module, Replaced) for module in fast.modules())
    assert not any(isinstance(module, Replaced) for module in model.modules())
    report = conformance(
        CachedPredictor(fast), UncachedPredictor(model), VOCABULARY, tolerance=2e-4, steps=30, longest=5 * WINDOW
    )
    assert report.holds, report


@pytest.mark.parametrize("kind", ["mamba", "deepseek_v32"])
def test_models_that_look_at_their_weights_still_find_them(kind: str) -> None:
    model = evolve(NAMED[kind], dtype=torch.float32).build()
    assert accelerate.fast(model) is not model


def test_a_longer_text_than_the_first_buffers_and_angles() -> None:
    model = tiny_llama(context=2048)
    text = tuple(torch.randint(0, VOCABULARY, (1300,)).tolist())
    predict, truth = CachedPredictor(accelerate.fast(model)), UncachedPredictor(model)
    for length, last in ((500, 1), (520, 20), (1290, 700), (1300, 10), (515, 30)):
        assert (last_rows(predict, text[:length], last) - last_rows(truth, text[:length], last)).abs().max() < 1e-9


def test_what_a_pass_leaves_behind_are_ordinary_tensors() -> None:
    model, cache = accelerate.fast(tiny_llama(context=2048)), None
    assert isinstance(model, Llama)
    for length in (3, 1, 700, 1):
        output = model(torch.zeros(1, length, dtype=torch.long), cache=cache)
        cache = output.cache
        kept = [output.logits, cache.buffer, *model.angles.between(0, 1)]
        assert not any(tensor.is_inference() for tensor in kept)


@one_process
def test_the_real_model(smollm2: Loaded, fast_smollm2: Module, written: tuple[Tokens, Tokens]) -> None:
    prompt, answer = written
    text = prompt + answer[:8]
    truth = last_rows(UncachedPredictor(smollm2.model), text, len(text))
    predict = CachedPredictor(fast_smollm2)
    parts = ((text[: len(prompt)], len(prompt)), (text[:-3], 5), (text, 3))
    ours = torch.cat([last_rows(predict, part, last) for part, last in parts])
    assert (ours - truth).abs().max() < 1e-3
    assert greedy(fast_smollm2, prompt, 40) == answer


def test_the_real_model_in_bf16_is_as_near_to_fp32_as_the_given_one(smollm2: Loaded, smollm2_bf16: Loaded) -> None:
    """Both round, and differently; the new one rounds a little less often."""
    text = smollm2.chat("Write a haiku about autumn leaves.")
    models = smollm2.model, smollm2_bf16.model, accelerate.fast(smollm2_bf16.model)
    truth, theirs, ours = (last_rows(UncachedPredictor(model), text, len(text)).float() for model in models)
    assert (ours - truth).abs().mean() < 1.1 * (theirs - truth).abs().mean()


def greedy(model: Module, prompt: Tokens, n: int) -> Tokens:
    step = autoregressive_step(CachedPredictor(model), GreedyProcessor(), Dice())
    return run(step, start(prompt, n).unwrap()).state.output


# What becomes of the given model


def test_the_given_model_stays_as_it_is() -> None:
    model = tiny_llama(dtype=torch.float32)
    model.train()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    accelerate.fast(model)
    accelerate.bit_for_bit(model)
    accelerate.lossy_bf16(model)
    accelerate.lossy_int8(model)
    accelerate.lossy_int4(model)
    assert all(module.training for module in model.modules())
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())


@pytest.mark.parametrize("make", [accelerate.fast, accelerate.bit_for_bit])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_is_taken_over_is_freed_and_says_so(make: object, tied: bool) -> None:
    model = evolve(variant("llama", tie_word_embeddings=tied), dtype=torch.float32).build()
    text = (5, 9, 7, 3)
    truth = last_rows(UncachedPredictor(model), text, 4)
    assert callable(make)
    taking = make(model, accelerate.Given.TAKEN)
    assert sum(weight.numel() for weight in model.parameters()) == 0
    assert (last_rows(UncachedPredictor(taking), text, 4) - truth).abs().max() < 1e-4
    with pytest.raises(DecodeError, match="taken over"):
        last_rows(UncachedPredictor(model), text, 4)


def test_another_model_that_is_taken_over() -> None:
    model = tiny_gpt2().float()
    text = (5, 9, 7, 3)
    truth = last_rows(UncachedPredictor(model), text, 4)
    taking = accelerate.fast(model, accelerate.Given.TAKEN)
    assert (last_rows(UncachedPredictor(taking), text, 4) - truth).abs().max() < 1e-4
    assert sum(weight.numel() for weight in model.parameters()) == 0


def test_models_that_compute_in_another_way_have_another_name() -> None:
    given, finer = tiny_llama(dtype=torch.float32), tiny_llama(dtype=torch.float32)
    with torch.no_grad():
        finer.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(2)  # the embeddings are the same
    made = [make(model) for make in (accelerate.fast, accelerate.bit_for_bit, *LOSSY) for model in (given, finer)]
    fast = made[0]
    assert isinstance(fast, Llama)
    shorter = [fast.without_layers(frozenset({i})) for i in (0, 1)]
    others = [make(tiny_gpt2().float()) for make in (accelerate.fast, *LOSSY)]
    models = [given, finer, *made, *shorter, *others]
    assert len({weights_of(model) for model in models}) == len(models)
    assert weights_of(accelerate.fast(given)) == weights_of(fast) == weights_of(deepcopy(fast))


def test_an_accelerated_model_is_not_converted_by_accident() -> None:
    fast = accelerate.fast(tiny_llama(dtype=torch.float32))
    with pytest.raises(DecodeError, match="stays"):
        fast.to(torch.bfloat16)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_an_accelerated_model_is_a_copy_and_notices_that_its_original_has_changed(build: MakeModel) -> None:
    """What `.data` hides from every version counter changes nothing; anything else is refused, with the remedy."""
    text = (5, 9, 7, 3)

    def fresh() -> tuple[PreTrainedModel, Module, Tensor]:
        model = build().float()
        fast = accelerate.fast(model)
        return model, fast, last_rows(CachedPredictor(fast), text, 4).clone()

    def step(model: PreTrainedModel) -> None:
        model.requires_grad_(True)
        model(torch.tensor([text])).logits.sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()

    def load(model: PreTrainedModel) -> None:
        model.load_state_dict(build(seed=1).float().state_dict())

    def cast(model: PreTrainedModel) -> None:
        model.bfloat16()

    def assign(model: PreTrainedModel) -> None:
        model.load_state_dict(build(seed=1).float().state_dict(), assign=True)

    def replace(model: PreTrainedModel) -> None:
        head = model.get_submodule("lm_head")
        head.weight = torch.nn.Parameter(head.get_parameter("weight").detach() * 2)

    def add(model: PreTrainedModel) -> None:
        model.get_submodule("lm_head").bias = torch.nn.Parameter(torch.ones(64))

    def swap(model: PreTrainedModel) -> None:
        model.set_submodule("lm_head", torch.nn.Linear(32, 64, bias=False))

    for change in (step, load, cast, assign, replace, add, swap):
        model, fast, _ = fresh()
        change(model)
        with pytest.raises(DecodeError, match="changed since it was accelerated"):
            last_rows(CachedPredictor(fast), text, 4)

    model, fast, before = fresh()
    for parameter in model.parameters():
        parameter.data.mul_(-3)
    for buffer in model.buffers():
        buffer.mul_(2)
    assert torch.equal(last_rows(CachedPredictor(fast), text, 4), before)
    model, fast, before = fresh()
    model.set_submodule("lm_head", torch.nn.Sequential(model.get_submodule("lm_head")))  # as an adapter wraps it
    assert torch.equal(last_rows(CachedPredictor(fast), text, 4), before)
    norm = next(module for module in model.modules() if "Norm" in type(module).__name__)
    norm.weight = torch.nn.Parameter(norm.get_parameter("weight").detach() * 2)
    with pytest.raises(DecodeError, match="changed since it was accelerated"):
        last_rows(CachedPredictor(fast), text, 4)
    model, fast, before = fresh()
    del model
    assert torch.equal(last_rows(CachedPredictor(fast), text, 4), before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft's
def test_adapters_on_the_given_model() -> None:
    """What is active when it is accelerated is in the copy; switching and adding adapters afterwards is not."""
    text, config = (5, 9, 7, 3), peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    plain = tiny_llama(dtype=torch.float32)
    fast, before = accelerate.fast(plain), last_rows(UncachedPredictor(plain), text, 4)
    adapted = peft.get_peft_model(plain, config).eval()
    truth = last_rows(UncachedPredictor(adapted), text, 4)
    assert (truth - before).abs().max() > 0.1
    assert (last_rows(CachedPredictor(fast), text, 4) - before).abs().max() < 1e-4
    for given in (adapted, adapted.get_base_model()):
        assert family.strangeness(given) is not None
        made = accelerate.fast(given)
        assert made is not given
        assert (last_rows(CachedPredictor(made), text, 4) - truth).abs().max() < 1e-4
        adapted.disable_adapter_layers()
        assert (last_rows(UncachedPredictor(adapted), text, 4) - before).abs().max() < 1e-4
        assert (last_rows(CachedPredictor(made), text, 4) - truth).abs().max() < 1e-4
        adapted.enable_adapter_layers()
    with pytest.raises(DecodeError, match="not known to be of the llama family"):
        accelerate.bit_for_bit(adapted)


def test_a_model_in_training_and_its_dropout() -> None:
    """The copy is in evaluation mode, whatever the given model is in and goes into."""
    for kind in ("llama", "gpt2"):
        model = evolve(variant(kind, attention_dropout=0.5, attn_pdrop=0.5), dtype=torch.float32).build()
        truth = last_rows(UncachedPredictor(model), (5, 9, 7, 3), 4)
        model.train()
        fast = accelerate.fast(model)
        assert not any(module.training for module in fast.modules())
        for _ in range(2):
            assert (last_rows(CachedPredictor(fast), (5, 9, 7, 3), 4) - truth).abs().max() < 1e-4
        model.activation_checkpointing_enable()  # by hooks
        with pytest.warns(accelerate.NotAccelerated, match="hooks"):
            assert accelerate.fast(model) is model


@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_two_threads_decode_over_one_accelerated_model(name: str) -> None:
    """Each text has a cache of its own; all that is shared are weights, and angles, which grow while they are read."""
    model = evolve(FAMILY[name], dtype=torch.float32).build()
    texts = [tuple(torch.randint(0, VOCABULARY, (1400,), generator=torch.Generator().manual_seed(i))) for i in range(3)]
    texts = [tuple(map(int, text)) for text in texts]
    expected = [last_rows(UncachedPredictor(model), text, 3) for text in texts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(2):
            fast = accelerate.fast(model)  # its angles reach 512

            def work(i: int, fast: Module = fast) -> Tensor:
                predict = CachedPredictor(fast)
                return [last_rows(predict, texts[i][:end], 3) for end in (300, 700, 1300, 1400)][-1]

            with ThreadPoolExecutor(3) as pool:
                got = list(pool.map(work, range(3)))
            assert all((ours - theirs).abs().max() < 1e-3 for ours, theirs in zip(got, expected, strict=True))
    finally:
        sys.setswitchinterval(interval)


# Configs that say odd things


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"sliding_window": 30}),
        ("llama", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
        ("seed_oss", {"sliding_window": 30}),
        ("mistral", {"sliding_window": 30, "layer_types": ["full_attention", "sliding_attention"]}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 30}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 30, "layer_types": ["full_attention"] * 2}),
        ("llama", {"pretraining_tp": 2, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("llama", {"max_position_embeddings": 20}),
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("stablelm", {"partial_rotary_factor": 0.25}),
        ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    ],
)
def test_odd_configs(kind: str, changes: Mapping[str, object]) -> None:
    """The same logits as the given model's fresh passes, at every length up to 60, or the given model and a note."""
    model = evolve(variant(kind, **changes), dtype=torch.float32).build()
    text = tuple(torch.randint(0, VOCABULARY, (60,)).tolist())
    fast = accelerate.fast(model)
    assert fast is not model
    truth = torch.empty(0)
    for read in (1, 4, 15, 29, 31, 47, 60):
        truth = deepcopy(model)(torch.tensor([text[:read]])).logits[0, -1]
        assert (deepcopy(fast)(torch.tensor([text[:read]])).logits[0, -1] - truth).abs().max() < 2e-4
    model.config.sliding_window = 3  # what the config says later changes nothing
    if isinstance(fast, Llama):
        assert (fast(torch.tensor([text])).logits[0, -1] - truth).abs().max() < 2e-4


def test_parts_that_are_not_transformers_own_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(type(tiny_llama().get_submodule("model.layers.0.self_attn"))):  # type: ignore[misc] # of a tiny llama
        def forward(self, *arguments: object, **named: object) -> object:
            attended, weights = super().forward(*arguments, **named)
            return attended * (1 if attended.shape[1] < 30 else 0.5), weights

    def attention(model: PreTrainedModel) -> None:
        model.get_submodule("model.layers.1.self_attn").__class__ = Half

    def not_causal(model: PreTrainedModel) -> None:
        model.config.is_causal = False

    def not_causal_inside(model: PreTrainedModel) -> None:
        vars(model.get_submodule("model.layers.1.self_attn"))["is_causal"] = False

    def registered(model: PreTrainedModel) -> None:
        model.config._attn_implementation = "mine"

    def fewer_layers(model: PreTrainedModel) -> None:
        model.config.num_hidden_layers = 1

    def head(model: PreTrainedModel) -> None:
        model.set_output_embeddings(torch.nn.Sequential(model.get_submodule("lm_head")))

    def bounded(model: PreTrainedModel) -> None:
        model.get_input_embeddings().max_norm = 1.0

    def norms(model: PreTrainedModel) -> None:
        vars(model.get_submodule("model.norm"))["variance_epsilon"] = 0.1

    class Weight(torch.nn.Parameter):
        pass

    def quantised(model: PreTrainedModel) -> None:
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        vars(layer)["_parameters"]["weight"] = Weight(layer.get_parameter("weight").data, requires_grad=False)

    for change, because in (
        (attention, "built of other modules"),
        (not_causal, "not causal"),
        (not_causal_inside, "not causal"),
        (registered, "not one of transformers' own"),
        (fewer_layers, "another number of layers"),
        (head, "head is not a plain"),
        (bounded, "not a plain table"),
        (norms, "epsilon"),
        (quantised, "not plain tensors"),
    ):
        model = tiny_llama(dtype=torch.float32)
        assert family.strangeness(model) is None
        change(model)
        assert because in (family.strangeness(model) or "")
        with pytest.raises(DecodeError, match=because):
            accelerate.bit_for_bit(model)
        assert is_linear(model.get_submodule("model.layers.0.mlp.up_proj")) == (change is not quantised)

    patched = tiny_llama(dtype=torch.float32)
    mlp = type(patched.get_submodule("model.layers.0.mlp"))
    monkeypatch.setattr(mlp, "forward", lambda self, x: self.down_proj(x))
    assert "built of other modules" in (family.strangeness(patched) or "")


def test_a_hook_for_all_modules_is_a_hook() -> None:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, output: None)
    try:
        with pytest.warns(accelerate.NotAccelerated, match="hooks"):
            accelerate.fast(tiny_llama(dtype=torch.float32))
    finally:
        handle.remove()


def test_a_vocabulary_in_the_config_that_is_not_the_embeddings() -> None:
    for lie in (1000, 3):
        model = tiny_llama(dtype=torch.float32)
        model.config.vocab_size = lie
        assert isinstance(accelerate.fast(model), Llama)
        assert isinstance(accelerate.bit_for_bit(model), Llama)


def test_the_given_model_reads_nothing_that_it_could_remember() -> None:
    class Counting(Module):
        """Counts the calls of itself."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.embedding, self.head = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, VOCABULARY)

        @override
        def forward(self, input_ids: Tensor) -> object:
            self.calls += 1
            return SimpleNamespace(logits=self.head(self.embedding(input_ids)))

    model = Counting()
    made = accelerate.fast(model)
    assert isinstance(made.get_submodule("head"), Replaced)
    assert model.calls == 0


# Wrong values


@pytest.mark.parametrize("wrong", [None, "smollm2", 3, torch.zeros(2), torch.nn.Linear, [tiny_llama]])
def test_what_is_no_model_is_refused(wrong: object) -> None:
    for make in (accelerate.fast, accelerate.bit_for_bit, *LOSSY):
        with pytest.raises(DecodeError, match="model is not a Module"):
            make(wrong)  # type: ignore[arg-type] # as a caller without types would
    with pytest.raises(DecodeError, match="model is not a Module"):
        accelerate.check(wrong)  # type: ignore[arg-type] # as a caller without types would


@pytest.mark.parametrize("wrong", [None, "KEPT", True, 0, accelerate.Given])
def test_what_is_to_become_of_the_given_model_is_one_of_two(wrong: object) -> None:
    for make in (accelerate.fast, accelerate.bit_for_bit):
        with pytest.raises(DecodeError, match="given is not a Given"):
            make(tiny_llama(), wrong)  # type: ignore[arg-type] # as a caller without types would


def test_the_numbers_of_a_check() -> None:
    model = tiny_llama(context=64)
    wrongs: tuple[object, ...] = (None, 3, "40", (), [], (0,), (-1,), (1.5,), (True,), (None,))
    for wrong in (*wrongs, torch.tensor(3), torch.tensor([0.5])):
        for name in ("lengths", "passes"):
            with pytest.raises(DecodeError, match=name):
                accelerate.check(model, **{name: cast(Any, wrong)})
    with pytest.raises(DecodeError, match="leaves room"):
        accelerate.check(model, lengths=(60,), passes=(8,))
    with pytest.raises(DecodeError, match="the model has no weights"):
        accelerate.check(tiny_llama().to("meta"))
    for right in (range(7, 8), np.array([7]), torch.tensor([7]), {7}, iter([7])):
        assert accelerate.check(model, lengths=right, passes=(2, 3)).lengths == (7,)


def test_no_ids_are_refused_by_an_accelerated_model() -> None:
    for made in (accelerate.fast(tiny_llama()), captured(tiny_llama())):
        for arguments in ((torch.zeros(1, 0, dtype=torch.long),), ()):
            with pytest.raises(DecodeError, match="one text at a time"):
                made(*arguments)


def test_calls_of_an_accelerated_model_with_other_things() -> None:
    fast, other = accelerate.fast(tiny_llama()), accelerate.fast(tiny_llama(layers=3))
    cache = other(torch.tensor([[1, 2]])).cache
    for ids in (None, [[1, 2]], torch.tensor(1), torch.tensor([1, 2]), torch.tensor([[1], [2]])):
        with pytest.raises(DecodeError, match="one text at a time"):
            fast(ids)
    for wrong in (cache, DynamicCache(), 3):
        with pytest.raises(DecodeError, match="not one of this model's"):
            fast(torch.tensor([[1, 2]]), cache=wrong)


def test_what_is_accelerated_is_not_accelerated_again_and_what_has_no_linear_layers_not_at_all() -> None:
    model = tiny_llama(dtype=torch.float32)
    for made in (accelerate.fast(model), accelerate.fast(tiny_gpt2().float())):
        with pytest.warns(accelerate.NotAccelerated, match="accelerated already"):
            assert accelerate.fast(made) is made
        report = model_conformance(made, steps=15)
        assert report.holds, report
    with pytest.warns(accelerate.NotAccelerated, match="plain linear layer"):
        accelerate.fast(torch.nn.Embedding(4, 4))


# Where it cannot be done


def test_what_cannot_be_accelerated_comes_back_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(model: Module, because: str) -> None:
        weights = [(parameter, parameter.clone()) for parameter in model.parameters()]
        with pytest.warns(accelerate.NotAccelerated, match=because):
            assert accelerate.fast(model, accelerate.Given.TAKEN) is model
        assert all(torch.equal(now, then) for now, then in weights if not now.is_meta)

    noted(tiny_llama().to("meta"), "on meta, not on the CPU")
    noted(tiny_gpt2(), "no faster linear layers")
    noted(torch.nn.Flatten(), "no device")
    noted(torch.nn.Linear(3, 3), "Linear is not accelerated")
    hooked = tiny_llama()
    hooked.get_submodule("model.layers.0").register_forward_hook(lambda module, given, output: output)
    noted(hooked, "hooks")
    odd = tiny_llama()
    vars(odd.get_submodule("model.layers.1.self_attn"))["scaling"] = 0.1
    noted(odd, "logits would differ")
    noted(evolve(NAMED["mamba"], dtype=torch.float32).build(), "MambaForCausalLM")  # it looks at weights
    monkeypatch.setattr(build, "has_layers", lambda dtype: False)
    noted(tiny_gpt2().float(), "no faster linear layers")


def test_a_subclass_with_a_forward_of_its_own_is_not_of_the_family() -> None:
    class Louder(type(tiny_llama())):  # type: ignore[misc] # the class of a tiny llama
        def forward(self, *arguments: object, **named: object) -> object:
            output = super().forward(*arguments, **named)
            output.logits = 2 * output.logits
            return output

    model = tiny_llama(dtype=torch.float32)
    model.__class__ = Louder
    fast = accelerate.fast(model)
    assert type(fast) is Louder
    text = (5, 9, 7, 3)
    truth = last_rows(UncachedPredictor(model), text, 4)
    assert (last_rows(UncachedPredictor(fast), text, 4) - truth).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"hidden_act": "gelu"}, "SiLU"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "length of the text"),
    ],
)
def test_what_looks_like_the_family_and_is_not(change: Mapping[str, object], because: str) -> None:
    model = evolve(variant("llama", **change), dtype=torch.float32).build()
    assert because in (family.strangeness(model) or "")
    assert any(isinstance(module, Replaced) for module in accelerate.fast(model).modules())


def test_without_the_private_operations_the_family_is_still_read_by_its_own_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "can_pack", lambda dtype: False)
    model = tiny_llama(dtype=torch.float32)
    fast = accelerate.fast(model)
    assert isinstance(fast, Llama)
    assert isinstance(fast.weights.head, linear.Plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("halves", "kind"), [(True, linear.Half), (False, linear.Packed)])
def test_without_products_in_half_precision_a_model_is_computed_in_fp32(
    dtype: torch.dtype, halves: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "can_pack", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(linear, "can_halve", lambda: halves)
    model = tiny_llama(dtype=dtype)
    exact = tiny_llama(dtype=dtype).float()
    text = tuple(range(20))
    fast, steady = accelerate.fast(model), accelerate.bit_for_bit(model)
    truth = last_rows(CachedPredictor(exact), text, 20)
    for made in (fast, steady):
        assert (last_rows(CachedPredictor(made), text, 20) - truth).abs().max() < 1e-4
    assert isinstance(fast, Llama)
    assert isinstance(fast.weights.head, kind)
    assert accelerate.check(steady, lengths=(7, 90), passes=(2, 3, 8, 31)).equal

    other = accelerate.fast(tiny_gpt2().to(dtype))
    assert isinstance(other.get_submodule("transformer.h.0.mlp.c_fc"), Replaced)
    assert CachedPredictor(other)(text, ()).dtype == dtype


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
@pytest.mark.parametrize("make", [accelerate.fast, accelerate.bit_for_bit])
def test_autocast_makes_no_difference_to_an_accelerated_model(
    make: Callable[[Module], Module], held: torch.dtype
) -> None:
    """Whatever its weights are kept in; made within its block, too."""
    model, text = tiny_llama(dtype=held).float(), tuple(range(1, 20))
    made = make(model)
    expected = last_rows(UncachedPredictor(made), text, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for each in (made, make(model)):
            assert isinstance(each, Llama)
            for predict in (CachedPredictor(each), UncachedPredictor(each), BatchPredictor(each)):
                torch.testing.assert_close(last_rows(predict, text, 4), expected, rtol=0, atol=1e-4)
        assert torch.is_autocast_enabled("cpu")


def test_weights_that_fp16_holds_are_kept_in_it() -> None:
    """Half the memory to read, and within fp32's own rounding, whatever the weights' size."""
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((48, 32), (5, 32), (48,)))
    for scale in (1.0, 2.0**-16, 2.0**-40, 2.0**30):
        for rounded in ((weight * scale).bfloat16(), (weight * scale).bfloat16().float()):
            layer = linear.fast_linear(rounded, (bias * scale).bfloat16().to(rounded.dtype))
            if linear.computing(rounded.dtype) != torch.float32:
                continue  # this processor has products in bf16
            assert isinstance(layer, linear.Half)
            exact = F.linear(x.double(), rounded.double(), (bias * scale).bfloat16().double())
            assert (layer(x) - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_weights_that_fp16_cannot_hold_are_not_kept_in_it() -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    assert linear.exact_in_half(weight) is None
    assert linear.exact_in_half(torch.zeros(2, 2)) is None
    assert linear.exact_in_half(torch.tensor([[1.0, torch.inf]])) is None
    assert linear.exact_in_half(torch.tensor([[1.0, torch.nan]])) is None
    assert linear.exact_in_half(torch.tensor([[1.0, 2.0**-40]])) is None  # too far apart
    assert linear.exact_in_half(torch.tensor([[1.0, 2.0**-38]])) == 2.0**14
    assert linear.half_linear(weight, None) is None
    assert not isinstance(linear.fast_linear(weight, None), linear.Half)


@pytest.mark.skipif(not linear.can_halve(), reason="this build of torch has no layers with weights in fp16")
@pytest.mark.parametrize(("out", "inner"), [(48, 32), (33, 7), (576, 1536), (3072, 576)])
def test_layers_in_fp16_are_padded_until_rows_do_not_depend_on_their_number(out: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = linear.steady_linear(torch.randn(out, inner, generator=generator).half().float(), None)
    rows = linear.steady_rows(out, inner, torch.get_num_threads())
    assert layer.rows == rows if isinstance(layer, linear.Padded) else rows is None
    x = torch.randn(linear.TOKENS, inner, generator=generator)
    alone = torch.cat([layer(row[None]) for row in x])
    assert all(torch.equal(layer(x[:count]), alone[:count]) for count in range(1, linear.TOKENS + 1))


@pytest.mark.skipif(not linear.can_pack(torch.float32), reason="this build of torch has no packed layers in fp32")
def test_layers_whose_rows_no_padding_makes_alike_are_laid_out_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "steady_rows", lambda out, inner, threads: None)
    generator = torch.Generator().manual_seed(1)
    weight, bias, x = (torch.randn(shape, generator=generator).half().float() for shape in ((48, 32), (48,), (5, 32)))
    layer = linear.steady_linear(weight, bias)
    assert isinstance(layer, linear.Packed | linear.Summed)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("broken", [AttributeError("no such op"), RuntimeError("not here"), None])
def test_a_private_operation_that_is_missing_or_wrong_is_not_used(broken: Exception | None) -> None:
    def make(weight: Tensor, bias: Tensor | None) -> linear.Linear:
        if broken is not None:
            raise broken
        return linear.Plain(weight, None)  # it forgets the bias

    for dtype in (torch.float32, torch.bfloat16):
        assert not linear.is_right(make, dtype, 2**-6)
        assert linear.is_right(linear.Plain, dtype, 2**-6)


def test_one_text_at_a_time() -> None:
    fast = accelerate.fast(tiny_llama())
    with pytest.raises(DecodeError, match="one text at a time"):
        fast(torch.zeros(2, 3, dtype=torch.long))


def test_rollback_is_a_number() -> None:
    cache = KVCache(torch.empty(1, 2, 1, 0, 4))
    cache.reserve(700)
    assert cache.buffer.shape[3] == 1024
    cache.length = 5
    for bad in (-1, 6):
        with pytest.raises(DecodeError, match="the cache holds 5 tokens"):
            cache.rollback(bad)
    cache.rollback(2)
    assert cache.length == 2


def test_predictors_that_share_a_model_share_no_text() -> None:
    model = tiny_llama()
    fast, truth = accelerate.fast(model), UncachedPredictor(model)
    one, other = CachedPredictor(fast), CachedPredictor(fast)
    text, another = (5, 9, 7, 3, 8), (1, 2, 3, 4, 5)
    for length in range(1, 6):
        assert (one(text[:length], ()) - truth(text[:length], ())).abs().max() < 1e-9
        assert (other(another[:length], ()) - truth(another[:length], ())).abs().max() < 1e-9


# Bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_passes_are_equal_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Across a border of the keys, over the most tokens that are read at once, and after a random script."""
    model = evolve(FAMILY[name], dtype=dtype).build()
    steady = accelerate.bit_for_bit(model)
    report = accelerate.check(steady, lengths=(1, 7, 30), passes=(2, 3, 4, 8, 16, 31, 32))
    assert report.lengths == (1, 7, 30)
    assert report.equal, report
    random = conformance(
        CachedPredictor(steady), UncachedPredictor(steady), VOCABULARY, tolerance=0.0, longest=5 * WINDOW
    )
    assert random.holds, random


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 40, 600])
def test_borders_of_the_keys_and_of_the_passes(sliding_window: int | None, dtype: torch.dtype) -> None:
    model = evolve(variant("mistral", sliding_window=sliding_window, max_position_embeddings=2048), dtype=dtype).build()
    report = accelerate.check(accelerate.bit_for_bit(model), lengths=(100, 505, 1020, 1500), passes=(2, 7, 32, 150))
    assert report.equal, report


@one_process
def test_passes_over_layers_of_the_real_model_are_equal_bit_for_bit(short_fp32: Module, short_bf16: Module) -> None:
    """Over all of its layers they are in `test_the_check_can_fail`."""
    for steady, dtype in ((short_fp32, torch.float32), (short_bf16, torch.bfloat16)):
        report = accelerate.check(steady, lengths=(40, 500), passes=(2, 5, 11, 32))
        assert report.equal, report
        assert report.dtype == str(linear.computing(dtype))
        assert "equal bit for bit" in str(report)


def test_the_check_can_fail(smollm2: Loaded, steady_fp32: Module) -> None:
    """The given model's passes differ, and so do accelerated ones with any of the three provisions taken away."""

    def differs(model: Module) -> bool:
        report = accelerate.check(model, lengths=(40,), passes=(2, 8))
        assert report.equal == (report.differing == ())
        assert report.equal or "logits differ" in str(report)
        return not report.equal

    steady = steady_fp32
    assert isinstance(steady, Llama)
    assert not differs(steady)
    assert differs(smollm2.model)
    assert differs(Llama(steady.config, steady.weights, build.FREE))
    assert differs(Llama(steady.config, evolve(steady.weights, head=_dependent(steady.weights.head)), build.FIXED))


def _dependent(layer: linear.Linear) -> linear.Linear:
    """A layer whose last bits depend on how many rows there are."""
    return lambda x: layer(x) * (1 + 2**-23 * (len(x) > 1))


def test_what_is_not_equal_bit_for_bit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, because in (
        (tiny_llama(), "torch.float64"),
        (tiny_gpt2().float(), "not known to be of the llama family"),
        (tiny_llama().to("meta"), "meta"),
    ):
        with pytest.raises(DecodeError, match=because):
            accelerate.bit_for_bit(model)
    with monkeypatch.context() as patch:
        patch.setattr(build, "steady_linear", lambda weight, bias: _dependent(linear.fast_linear(weight, bias)))
        with pytest.raises(DecodeError, match="logits differ"):
            accelerate.bit_for_bit(tiny_llama(dtype=torch.float32))


def test_an_inner_dimension_is_cut_until_rows_do_not_depend_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a product that adds in another order from the third row on, where there are more than 8 inputs."""

    def uneven(weight: Tensor, bias: Tensor | None) -> linear.Linear:
        def product(x: Tensor) -> Tensor:
            turned = x.shape[1] > 8 and len(x) > 2
            terms = x[:, None] * weight
            total = torch.zeros(len(x), len(weight), dtype=x.dtype)
            for term in reversed(terms.unbind(-1)) if turned else terms.unbind(-1):
                total = total + term
            return total

        return product

    for dtype in (torch.float32, torch.bfloat16):
        assert linear.steady_parts(5, 24, dtype, threads=-1, make=uneven) == 3
        assert linear.steady_parts(5, 8, dtype, threads=-1, make=uneven) == 1
        with pytest.raises(DecodeError, match="from 37 to 5"):
            linear.steady_parts(5, 37, dtype, threads=-1, make=uneven)


# What follows from it


def bigram(most: int) -> CertainDrafter:
    """Drafts what followed the last token when it was last seen."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        for end in reversed(range(1, len(tokens))):
            if tokens[end - 1] == tokens[-1]:
                yield from chain(tokens[end : end + most], "bigram")
                return

    return draft


def speculated(steady: Module, prompt: Tokens) -> None:
    """Greedy speculation is greedy decoding, and some drafts are accepted."""
    expected = greedy(steady, prompt, 48)
    for drafter in (bigram(3), SuffixDrafter()):
        step = speculative_step(drafter, CachedPredictor(steady), GreedyProcessor(), Dice(), Fixed(10))
        state = run(step, start(prompt, 48).unwrap()).state
        assert state.output == expected
        assert state.tally.accepted > 0


@one_process
def test_greedy_speculation_in_bf16_is_greedy_decoding(smollm2: Loaded, short_bf16: Module) -> None:
    for question in QUESTIONS:
        speculated(short_bf16, smollm2.chat(question))


def test_greedy_speculation_over_the_whole_model_in_bf16(smollm2_bf16: Loaded) -> None:
    speculated(accelerate.bit_for_bit(smollm2_bf16.model), smollm2_bf16.chat(QUESTIONS[0]))


@one_process
def test_sampling_by_seed_in_bf16_does_not_depend_on_the_drafter(smollm2: Loaded, short_bf16: Module) -> None:
    processor = MultinomialProcessor(temperature=0.7)
    for seed, question in enumerate(QUESTIONS):
        prompt, noise = smollm2.chat(question), SharedNoise(seed)
        texts = []
        for draft in (bigram(3), SuffixDrafter(), _nothing):
            verify = Verify(CachedPredictor(short_bf16), processor, Match(noise))
            step = _composed(Draft(draft, Fixed(8)), verify, Adjust(noise))
            texts.append(run(step, start(prompt, 40).unwrap()).state.output)
        assert texts[0] == texts[1] == texts[2]


def _nothing(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    yield from ()


def _composed(draft: Draft, verify: Verify[Sampling], adjust: Adjust[SharedNoise]) -> Step:
    return lambda state: state.then(draft).then(verify).then(adjust).then(commit).then(advance)


# A model as its own drafter


@one_process
@pytest.mark.parametrize("make", LOSSY)
def test_a_coarse_copy_drafts_for_its_model(
    make: object, smollm2: Loaded, fast_smollm2: Module, written: tuple[Tokens, Tokens]
) -> None:
    assert callable(make)
    prompt, expected = written
    output, rate = speculative_generate(
        list(prompt), make(smollm2.model), fast_smollm2, gamma=4, max_gen_len=40, eos_tokens_id=[], use_cache=True
    )
    assert output == list(expected)
    assert rate > (0.5 if make is accelerate.lossy_int4 else 0.8)


@pytest.mark.parametrize("inner", [64, 40, 1])
def test_weights_of_8_bits(inner: int) -> None:
    weight, bias, x = torch.randn(50, inner), torch.randn(50), torch.randn(5, inner + 1).bfloat16()[:, 1:]
    layer = linear.Int8.of(weight, bias)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    held = layer.weight[:, :inner] * layer.scales.float()[:, None]
    assert ((held - weight).abs() <= 1.5 * step).all()  # half a step, and up to one for the scale's own rounding
    for rows in (x, x[1:2]):
        truth = F.linear(rows.float(), weight, bias)
        assert (layer(rows) - truth).abs().max() < 0.03 * truth.abs().max()
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("inner", [64, 40, 1])
def test_weights_of_4_bits(inner: int) -> None:
    weight, bias = torch.randn(50, inner), torch.randn(50)
    weight[:, -1] = weight[:, 0]  # a group of one weight, or of equal ones, has no extent
    layer = linear.Int4.of(weight, bias)
    groups = F.pad(weight, (0, -inner % 32)).view(50, -1, 32)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    held = torch.cat([layer(row[None]) for row in torch.eye(inner)]).float().T - bias[:, None]
    off = F.pad(held - weight, (0, -inner % 32)).view(50, -1, 32).abs()
    rounding = 2**-7 * torch.maximum(least.abs(), most.abs()) + 2**-7 * bias.abs()[:, None, None]
    assert (off <= (most - least) / 30 + rounding).all()  # half a step, and what bf16 rounds of all of them
    x = torch.randn(5, inner + 1).bfloat16()[:, 1:]
    for rows in (x, x[1:2]):
        truth = F.linear(rows.float(), weight, bias)
        assert layer(rows).shape == truth.shape
        assert (layer(rows) - truth).abs().max() < 0.2 * truth.abs().max()
    assert layer.packed.numel() == 64 * max(32, -(-inner // 32) * 32) // 2  # two weights in a byte


@pytest.mark.parametrize("make", [accelerate.lossy_int8, accelerate.lossy_int4])
def test_another_model_in_few_bits_drafts_too(make: Callable[[Module], Module]) -> None:
    model = tiny_gpt2().float()
    drafter = make(model)
    greedy_draft = LLMDrafter(CachedPredictor(drafter), GreedyProcessor(), Dice())
    step = speculative_step(greedy_draft, CachedPredictor(model), GreedyProcessor(), Dice(), Fixed(4))
    state = run(step, start((5, 9, 7), 20).unwrap()).state
    assert list(state.output) == oracle((5, 9, 7), model, 20)
    assert next(model.parameters()).dtype == torch.float32
    assert state.tally.acceptance_rate > 0.5
