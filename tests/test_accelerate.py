"""Accelerated models: the same numbers, the same bits, and the given model where neither can be had."""

from __future__ import annotations

import warnings
from random import Random
from typing import Protocol

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel
from typing_extensions import override

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    GreedyProcessor,
    UncachedPredictor,
    autoregressive_generate,
    autoregressive_step,
    run,
    speculative_generate,
    speculative_step,
    start,
)
from specflow.accelerate import Given, NotAccelerated, bit_for_bit, check, fast, lossy_bf16
from specflow.drafters import SuffixDrafter
from specflow.models import Loaded, load
from tests.architectures import ARCHITECTURES
from tests.toys import oracle, tiny_gpt2, tiny_llama

FAMILY = ["llama", "mistral", "qwen2", "qwen3", "smollm3"]


def tiny(name: str) -> PreTrainedModel:
    """A tiny random model of this architecture in fp64."""
    return next(architecture for architecture in ARCHITECTURES if architecture.kind == name).build()


def norm_in_fp64(self: RMSNorm, hidden_states: Tensor) -> Tensor:
    """What transformers' norms compute, but not in fp32."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class RMSNorm(Protocol):
    """What transformers' norms have."""

    weight: Tensor
    variance_epsilon: float


def made(model: Module) -> Module:
    """The model made fast, and not merely handed back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotAccelerated)
        return fast(model)


@pytest.mark.parametrize("name", FAMILY)
def test_the_same_numbers_over_any_walk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name)
    norms = {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    assert norms
    for norm in norms:
        monkeypatch.setattr(norm, "forward", norm_in_fp64)
    cached, truth = CachedPredictor(made(model)), UncachedPredictor(model)
    random, text = Random(2), [3, 4, 5]
    for _ in range(60):
        if random.random() < 0.3:
            text = text[: random.randint(1, len(text))]
        text = (text + [random.randrange(30) for _ in range(random.randint(1, 6))])[:90]
        last = random.randint(1, len(text))
        torch.testing.assert_close(cached(tuple(text), last), truth(tuple(text), last), rtol=0, atol=1e-9)


def test_the_same_text_as_the_given_model_which_stays_as_it_was() -> None:
    model = tiny_llama()
    before = [parameter.clone() for parameter in model.parameters()]
    quick = made(model)
    assert quick is not model
    for prompt in ([3], [3, 4, 5], list(range(40))):
        assert autoregressive_generate(prompt, quick, 30, eos_tokens_id=[], use_cache=True) == oracle(prompt, model, 30)
        output, _ = speculative_generate(prompt, quick, model, max_gen_len=30, eos_tokens_id=[], use_cache=True)
        assert output == oracle(prompt, model, 30)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_that_is_taken_over_refuses_to_be_called() -> None:
    model = tiny_llama(dtype=torch.float32)
    expected = oracle([3, 4], model, 10)
    quick = fast(model, Given.TAKEN)
    assert autoregressive_generate([3, 4], quick, 10, eos_tokens_id=[], use_cache=True) == expected
    with pytest.raises(DecodeError, match="its weights were taken over"):
        model(torch.tensor([[3]]))


def test_another_family_gets_faster_linear_layers_or_is_handed_back() -> None:
    model = tiny_gpt2().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotAccelerated)
        quick = fast(model)
    assert autoregressive_generate([3, 4], quick, 20, eos_tokens_id=[], use_cache=True) == oracle([3, 4], model, 20)


def test_what_cannot_be_made_faster_is_handed_back_with_a_note() -> None:
    class Odd(Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Linear(4, 8)

        @override
        def forward(self, input_ids: Tensor) -> object:
            raise RuntimeError("no")

    odd = Odd()
    with pytest.warns(NotAccelerated, match="Odd is not accelerated"):
        assert fast(odd) is odd
    hooked = tiny_llama()
    hooked.register_forward_hook(lambda module, inputs, output: output)
    with pytest.warns(NotAccelerated, match="hooks"):
        assert fast(hooked) is hooked
    with pytest.raises(DecodeError, match="cannot be made equal bit for bit"):
        bit_for_bit(tiny_gpt2())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_on_a_tiny_model(dtype: torch.dtype) -> None:
    report = check(bit_for_bit(tiny_llama(dtype=dtype)), lengths=(1, 40), passes=(2, 3, 7, 8, 9, 17, 32))
    assert report.equal, str(report)
    assert report.elements > 0


def test_the_check_sees_what_is_not_equal() -> None:
    report = check(tiny_llama(dtype=torch.bfloat16), lengths=(40,), passes=(2, 5, 16))
    assert not report.equal
    assert "logits differ" in str(report)


@pytest.fixture(scope="module")
def smollm2_bf16() -> Loaded:
    return load("smollm2", "bfloat16").unwrap()


def test_the_real_model_bit_for_bit_in_bf16(smollm2: Loaded, smollm2_bf16: Loaded) -> None:
    model = bit_for_bit(smollm2_bf16.model)
    report = check(model, lengths=(40, 505), passes=(2, 3, 6, 11, 32))
    assert report.equal, str(report)
    processor, dice = GreedyProcessor(), Dice()
    for message in ("Repeat after me: one two three, one two three.", "What is a prime number?"):
        state = start(smollm2_bf16.chat(message), 48, smollm2_bf16.stop).unwrap()
        alone = run(autoregressive_step(CachedPredictor(model), processor, dice), state)
        drafted = run(speculative_step(SuffixDrafter(), CachedPredictor(model), processor, dice), state)
        assert drafted.state.tokens == alone.state.tokens
        assert drafted.state.tally.drafted > 0


def test_the_real_model_in_fp32(smollm2: Loaded) -> None:
    quick = made(smollm2.model)
    prompt = smollm2.chat("Name three rivers.")
    off = CachedPredictor(quick)(prompt, 20) - CachedPredictor(smollm2.model)(prompt, 20)
    assert off.abs().max() < 1e-3
    eos = list(smollm2.stop)
    expected = autoregressive_generate(list(prompt), smollm2.model, 32, eos_tokens_id=eos, use_cache=True)
    assert autoregressive_generate(list(prompt), quick, 32, eos_tokens_id=eos, use_cache=True) == expected
    drafter = lossy_bf16(smollm2.model)
    output, rate = speculative_generate(list(prompt), drafter, quick, max_gen_len=32, eos_tokens_id=eos, use_cache=True)
    assert output == expected
    assert rate > 0.8
