"""Nothing of the user's is changed: weights, buffers, configs, modes, tokenizer, processors, prompts."""

from __future__ import annotations

import copy
import pickle
from hashlib import sha256

import pytest
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
)
from transformers.modeling_outputs import CausalLMOutput
from typing_extensions import override

from specflow import (
    CachedPredictor,
    Dice,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    autoregressive_generate,
    run,
    speculative_generate,
    speculative_step,
    start,
)
from specflow.interop import Generate, ProcessorList
from specflow.models import Loaded
from specflow.paths import last_rows
from specflow.predictors import UncachedPredictor
from specflow.testing import model_conformance
from tests.architectures import NAMED
from tests.toys import tiny_llama


def fingerprint(model: PreTrainedModel) -> dict[str, object]:
    """Everything of a model that its user could miss, hash by hash."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "tensors": {
            name: (sha256(tensor.numpy().tobytes()).hexdigest(), tensor.requires_grad)
            for name, tensor in tensors.items()
        },
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mamba", "mamba2", "rwkv", "qwen3_next", "minimax"])
def test_a_model_is_as_it_was(kind: str) -> None:
    target, drafter = NAMED[kind].build(), NAMED[kind].build(noise=0.1)
    target.train()
    list(target.modules())[-1].eval()  # a mixture of modes, put back as it was
    before = fingerprint(target), fingerprint(drafter)
    prompt = [5, 9, 5, 9, 7]
    kept = list(prompt)
    for cached in (False, True):
        autoregressive_generate(prompt, target, 8, use_cache=cached, eos_tokens_id=2)
        speculative_generate(prompt, drafter, target, max_gen_len=8, use_cache=cached, eos_tokens_id=2)
        sampler = MultinomialProcessor(0.7)
        speculative_generate(
            prompt, drafter, target, max_gen_len=8, use_cache=cached, logits_processor=sampler, eos_tokens_id=2
        )
    assert (fingerprint(target), fingerprint(drafter)) == before
    assert prompt == kept
    model_conformance(drafter, steps=20)
    assert fingerprint(drafter) == before[1]


def test_what_is_handed_to_generate_is_as_it_was() -> None:
    target = tiny_llama()
    before = fingerprint(target)
    config = GenerationConfig(max_new_tokens=8, do_sample=True, repetition_penalty=1.2, pad_token_id=0)
    settings = config.to_dict()
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)])
    states = [copy.deepcopy(vars(processor)) for processor in processors]
    ids = torch.tensor([[0, 5, 9], [5, 9, 5]])
    mask = (ids > 0).long()
    drafter = LLMDrafter(CachedPredictor(tiny_llama(1)), GreedyProcessor(), Dice())
    target.generate(ids, config, custom_generate=Generate(drafter), attention_mask=mask, logits_processor=processors)
    assert fingerprint(target) == before
    assert config.to_dict() == settings
    assert [vars(processor) for processor in processors] == states
    assert ids.tolist() == [[0, 5, 9], [5, 9, 5]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_static_cache_and_a_processor_leave_the_model_alone() -> None:
    target = tiny_llama()
    before = fingerprint(target)
    predictor = CachedPredictor(target, lambda: StaticCache(target.config, max_cache_len=40))
    drafter = LLMDrafter(CachedPredictor(tiny_llama(1)), GreedyProcessor(), Dice())
    processor = ProcessorList(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)]))
    step = speculative_step(drafter, predictor, processor, Dice(), prune=(predictor,))
    run(step, start([5, 9, 5], 12, (), predictor.limits).unwrap())
    assert fingerprint(target) == before


def test_a_tokenizer_is_as_it_was(smollm2: Loaded) -> None:
    before = pickle.dumps(smollm2.tokenizer), smollm2.tokenizer.chat_template
    prompt = list(smollm2.chat("Hello."))
    speculative_generate(
        prompt,
        smollm2.model,
        smollm2.model,
        smollm2.tokenizer,
        max_gen_len=4,
        use_cache=True,
        eos_tokens_id=2,
        debug=True,
    )
    assert (pickle.dumps(smollm2.tokenizer), smollm2.tokenizer.chat_template) == before


def skips(key: str) -> bool:
    """Whether torch skips what it does under this key now."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(getattr(torch._C.DispatchKey, key))


class Keeping(Module):
    """A model that keeps a tensor which it made in a pass, as some rotary embeddings do, and tells what it sees."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = Parameter(weight)
        self.kept = torch.zeros(0)
        self.skips_autograd = self.skips_views = self.folds = False

    @override
    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        self.skips_autograd, self.skips_views = map(skips, ("AutogradFunctionality", "ADInplaceOrView"))
        self.folds = self.weight.t().requires_grad
        self.kept = self.weight.detach().square()
        return CausalLMOutput(logits=(self.weight * self.kept)[input_ids])


def test_what_a_model_keeps_from_a_pass_can_be_trained_on() -> None:
    model = Keeping(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    logits = UncachedPredictor(model)((3,), ())
    assert (model.skips_autograd, model.skips_views) == (True, True)
    assert not skips("AutogradFunctionality") | skips("ADInplaceOrView")
    model.kept.mul_(2.0)
    logits.add_(1.0)
    (gradient,) = torch.autograd.grad((model.weight * model.kept).sum(), [model.weight])
    torch.testing.assert_close(gradient, 2.0 * model.weight.detach().square())


def test_a_pass_over_several_tokens_copies_no_weights() -> None:
    """torch would copy a weight whose view does not require a gradient, for rows that do not lie together."""
    model = Keeping(torch.randn(16, 16))
    last_rows(UncachedPredictor(model), (3, 4, 5), 2)
    assert (model.skips_autograd, model.skips_views, model.folds) == (True, False, True)


@pytest.mark.parametrize("tokens", [1, 4])
def test_what_autocast_has_cast_for_a_pass_can_be_trained_on(tokens: int) -> None:
    model = tiny_llama(dtype=torch.float32)
    model.requires_grad_(True)
    predict = UncachedPredictor(model)
    with torch.autocast("cpu", torch.bfloat16):
        predict((1, 2, 3, 4)[:tokens], ())
        loss = model(torch.tensor([[1, 2, 3, 4]])).logits.float().logsumexp(-1).sum()
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


class Sharded(Parameter):
    """A weight that is no plain tensor."""


def test_weights_that_are_no_plain_tensors_keep_autograd() -> None:
    model = Keeping(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    expected = UncachedPredictor(model)((3,), ())
    model.weight = Sharded(model.weight.detach())
    assert UncachedPredictor(model)((3,), ()).equal(expected)
    assert (model.skips_autograd, model.skips_views) == (False, False)
