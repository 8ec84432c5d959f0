"""The spec's processors, and the law that each draws from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from specflow import (
    Categorical,
    GreedyProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    PointMass,
    TopKNucleusProcessor,
    TopKProcessor,
    autoregressive_generate,
    speculative_generate,
)
from specflow.distribution import BlackBox, max_fn
from specflow.processors import LogitsProcessor
from tests.toys import oracle, tiny_llama

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.5, 1.0]])
ALL = [
    GreedyProcessor(0.7),
    MultinomialProcessor(0.7),
    TopKProcessor(0.7, 2),
    NucleusProcessor(0.7, 0.8),
    TopKNucleusProcessor(0.7, 3, 0.9),
]


@pytest.mark.parametrize("processor", ALL, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_shapes_and_an_untouched_input(processor: LogitsProcessor, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    before = logits.clone()
    probs = processor(logits)
    assert torch.equal(logits, before)
    assert probs.shape == logits.shape
    torch.testing.assert_close(probs.sum(-1), torch.ones(shape[:-1]))
    assert processor.sample(probs).shape == (*shape[:-1], 1)


def test_greedy_gives_the_softmax_and_samples_the_argmax() -> None:
    processor = GreedyProcessor(0.5)
    probs = processor(LOGITS)
    torch.testing.assert_close(probs, torch.softmax(LOGITS / 0.5, -1))
    assert processor.sample(probs).tolist() == [[0], [2]]
    assert processor.laws((), LOGITS) == (PointMass(0), PointMass(2))


def test_greedy_tells_apart_what_softmax_rounds_together() -> None:
    logits = torch.tensor([[0.01, torch.nextafter(torch.tensor(0.01), torch.tensor(1.0)).item()]])
    probs = GreedyProcessor()(logits)
    assert probs[0, 0] == probs[0, 1]
    assert GreedyProcessor().laws((), logits) == (PointMass(1),)


def test_top_k_keeps_exactly_k() -> None:
    probs = TopKProcessor(1.0, 2)(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert (probs > 0).sum() == 2
    torch.testing.assert_close(probs.max(), torch.tensor(0.5))
    torch.testing.assert_close(TopKProcessor(1.0, 99)(LOGITS), torch.softmax(LOGITS, -1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_nucleus_is_the_smallest_set_that_reaches_p(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for top_p in (0.01, 0.3, 0.5, 0.9, 0.999, 1.0):
        logits = torch.randn(50, generator=generator, dtype=torch.float64)
        plain = torch.softmax(logits / temperature, -1)
        kept = NucleusProcessor(temperature, top_p)(logits) > 0
        assert plain[kept].sum() >= min(top_p, 1 - 1e-12)
        if kept.sum() > 1:
            assert plain[kept].sum() - plain[kept].min() < top_p
        assert plain[kept].min() >= plain[~kept].max() if (~kept).any() else top_p > 0.99


def test_the_nucleus_is_never_empty() -> None:
    for top_p in (1e-45, 1e-46, 5e-324):
        for processor in (NucleusProcessor(1.0, top_p), TopKNucleusProcessor(1.0, 2, top_p)):
            assert processor(LOGITS).tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def test_top_k_and_nucleus_together() -> None:
    both = TopKNucleusProcessor(1.0, 3, 0.6)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    torch.testing.assert_close(both(logits), torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]))


def test_half_precision_logits_give_fp32_probabilities() -> None:
    assert MultinomialProcessor(1.0)(LOGITS.bfloat16()).dtype == torch.float32
    assert MultinomialProcessor(1.0)(LOGITS.double()).dtype == torch.float64


def test_known_laws() -> None:
    for processor in ALL[1:]:
        laws = processor.laws((), LOGITS)
        assert all(isinstance(law, Categorical) for law in laws)
        torch.testing.assert_close(
            torch.stack([law.probs for law in laws if isinstance(law, Categorical)]), processor(LOGITS)
        )


class Banned(MultinomialProcessor):
    """A user's: it edits its input in place, as people do, and keeps our sampler."""

    @override
    def _process(self, logits: Tensor) -> Tensor:
        logits[..., 0] = -torch.inf
        return logits


class Nudged(MultinomialProcessor):
    """A user's: what it adds is less than what is between two numbers of 16 bits."""

    @override
    def _process(self, logits: Tensor) -> Tensor:
        logits[..., 1] += 0.06
        return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_computed_in_16_bits(dtype: torch.dtype) -> None:
    logits = torch.tensor([20.0, 20.0])
    assert torch.equal(Nudged(1.0)(logits.to(dtype)), Nudged(1.0)(logits))


class SecondBest(LogitsProcessor):
    """A user's: only `_process` and `sample`, and a sampler whose law nobody knows."""

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return logits

    @override
    def sample(self, probs: Tensor) -> Tensor:
        return probs.topk(2, dim=-1).indices[..., 1:]


def test_a_subclass_that_keeps_our_sampler_has_a_known_law() -> None:
    (first, _) = Banned(1.0).laws((), LOGITS)
    assert isinstance(first, Categorical)
    assert first.of(0) == 0.0
    assert LOGITS[0, 0] == 2.0


@pytest.mark.parametrize("use_cache", [False, True])
def test_an_unknown_sampler_is_used_as_it_is(use_cache: bool) -> None:
    target, drafter = tiny_llama(0), tiny_llama(0, dtype=torch.float32)
    assert all(isinstance(law, BlackBox) for law in SecondBest().laws((), LOGITS))
    processor = SecondBest()
    expected = autoregressive_generate([3, 4], target, 20, processor, eos_tokens_id=[], use_cache=use_cache)
    assert expected != oracle([3, 4], target, 20)
    output, rate = speculative_generate(
        [3, 4], drafter, target, logits_processor=processor, max_gen_len=20, eos_tokens_id=[], use_cache=use_cache
    )
    assert output == expected
    assert rate > 0.9
    output, _ = speculative_generate(
        [3, 4], tiny_llama(7), target, logits_processor=processor, max_gen_len=20, eos_tokens_id=[], use_cache=use_cache
    )
    assert output == expected


def test_sampling_follows_the_default_generator() -> None:
    target, drafter = tiny_llama(0), tiny_llama(1)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(speculative_generate([3], drafter, target, logits_processor=MultinomialProcessor(1.0))[0])
    assert texts[0] == texts[1] != texts[2]


def test_max_fn() -> None:
    p, q = torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.4, 0.3, 0.3])
    torch.testing.assert_close(max_fn(p - q), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(
        max_fn(torch.tensor([[1.0, 3.0, -9.0], [0.0, 2.0, 2.0]])), torch.tensor([[0.25, 0.75, 0], [0, 0.5, 0.5]])
    )
    assert max_fn(p - p).tolist() == [0.0, 0.0, 0.0]
