"""Greedy decoding through any drafter equals the oracle, token for token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from transformers import PreTrainedModel

from specflow import GreedyProcessor, autoregressive_generate, speculative_generate
from specflow.models import Loaded
from tests.toys import VOCABULARY, disturbed, oracle, tiny_gpt2, tiny_llama

TARGETS = {
    "llama": tiny_llama(0),
    "llama fp32": tiny_llama(3, layers=1, dtype=torch.float32),
    "gpt2": tiny_gpt2(0, layers=1),
}
DRAFTERS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "itself": lambda target: target,
    "close": lambda target: disturbed(target, 1, 0.02) if target.config.to_dict()["model_type"] == "llama" else target,
    "stranger": lambda target: tiny_llama(9, layers=1),
    "gpt2": lambda target: tiny_gpt2(5, layers=1),
}
PROMPTS = ([3], [3, 4, 5], [7, 7, 7, 7, 7, 7], list(range(40)))


@cache
def drafting(drafter: str, target: PreTrainedModel) -> PreTrainedModel:
    """One of `DRAFTERS`."""
    return DRAFTERS[drafter](target)


@cache
def greedy(target: PreTrainedModel, number: int) -> list[int]:
    """The oracle's 25 tokens after one of `PROMPTS`."""
    return oracle(PROMPTS[number], target, 25)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_autoregressive_equals_oracle_and_transformers(target: PreTrainedModel, use_cache: bool) -> None:
    for number, prompt in enumerate(PROMPTS):
        expected = greedy(target, number)
        assert autoregressive_generate(prompt, target, 25, eos_tokens_id=[], use_cache=use_cache) == expected
        ids = torch.tensor([prompt])
        theirs = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=25,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(prompt) :].tolist() == expected


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(("use_cache", "first_target"), list(product([False, True], repeat=2)))
def test_speculative_equals_oracle(target: PreTrainedModel, drafter: str, use_cache: bool, first_target: bool) -> None:
    draft_model = drafting(drafter, target)
    for number, (prompt, gamma) in enumerate(zip(PROMPTS, (1, 2, 5, 9), strict=True)):
        output, rate = speculative_generate(
            prompt,
            draft_model,
            target,
            gamma=gamma,
            max_gen_len=25,
            eos_tokens_id=[],
            use_cache=use_cache,
            first_target=first_target,
        )
        assert output == greedy(target, number)
        assert 0.0 <= rate <= 1.0
        assert rate == 1.0 or drafter != "itself"


def test_a_close_drafter_is_partly_accepted() -> None:
    """The matrix above would prove little if its drafters were always rejected or always accepted."""
    target = TARGETS["llama"]
    _, rate = speculative_generate([3, 4, 5], disturbed(target, 1, 0.02), target, eos_tokens_id=[], use_cache=True)
    assert 0.2 < rate < 0.9


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("gamma", [1, 3, 30])
def test_eos_anywhere_in_a_block(gamma: int, use_cache: bool) -> None:
    """Each token of the text is once the eos: first, inside, last of a block, and the bonus token."""
    target = TARGETS["llama"]
    text, close = oracle([3, 4, 5], target, 20), disturbed(target, 1, 0.02)
    for eos in sorted(set(text)):
        expected = text[: text.index(eos) + 1]
        for drafter, first_target in product((target, close), (False, True)):
            output, rate = speculative_generate(
                [3, 4, 5], drafter, target, gamma=gamma, max_gen_len=20, eos_tokens_id=eos, use_cache=use_cache,
                first_target=first_target,
            )  # fmt: skip
            assert output == expected
            assert rate <= 1.0


def test_the_first_of_several_eos_ids_ends_the_text() -> None:
    target = TARGETS["llama"]
    text = oracle([3, 4, 5], target, 20)
    late, early = text[9], text[4]
    expected = text[: min(text.index(late), text.index(early)) + 1]
    for ids in ([late, early], [early, late]):
        assert autoregressive_generate([3, 4, 5], target, 20, eos_tokens_id=ids, use_cache=True) == expected
        assert (
            speculative_generate([3, 4, 5], target, target, gamma=12, max_gen_len=20, eos_tokens_id=ids)[0] == expected
        )


@pytest.mark.parametrize("max_gen_len", [0, 1, 2, 3])
@pytest.mark.parametrize("first_target", [False, True])
def test_short_lengths(max_gen_len: int, first_target: bool) -> None:
    target = TARGETS["llama"]
    expected = oracle([3, 4, 5], target, max_gen_len)
    assert autoregressive_generate([3, 4, 5], target, max_gen_len, eos_tokens_id=[]) == expected
    output, rate = speculative_generate(
        [3, 4, 5], target, target, gamma=50, max_gen_len=max_gen_len, eos_tokens_id=[], first_target=first_target
    )
    assert output == expected
    assert rate == (1.0 if max_gen_len > 1 + first_target else 0.0)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("missing", [0, 1, 2, 7])
def test_the_text_fills_the_context_and_no_more(
    make: Callable[..., PreTrainedModel], missing: int, use_cache: bool
) -> None:
    target = make(0, context=32)
    prompt = [token % VOCABULARY for token in range(5, 5 + 32 - missing)]
    expected = oracle(prompt, target, missing)
    assert autoregressive_generate(prompt, target, 40, eos_tokens_id=[], use_cache=use_cache) == expected
    output, _ = speculative_generate(prompt, target, target, max_gen_len=40, eos_tokens_id=[], use_cache=use_cache)
    assert output == expected


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_drafter_whose_context_is_full_stops_proposing(use_cache: bool) -> None:
    target, drafter = tiny_llama(0), tiny_gpt2(4, context=16)
    output, rate = speculative_generate(
        [3] * 10, drafter, target, max_gen_len=30, eos_tokens_id=[], use_cache=use_cache
    )
    assert output == oracle([3] * 10, target, 30)
    assert rate < 1.0


@pytest.mark.parametrize(("target_size", "drafter_size"), [(64, 72), (72, 64)])
def test_differently_padded_vocabularies(target_size: int, drafter_size: int) -> None:
    target, drafter = tiny_llama(0, vocab_size=target_size), tiny_llama(1, vocab_size=drafter_size)
    for use_cache in (False, True):
        output, _ = speculative_generate([3, 4], drafter, target, max_gen_len=30, eos_tokens_id=[], use_cache=use_cache)
        assert output == oracle([3, 4], target, 30)


def test_drafter_and_target_of_different_dtypes() -> None:
    target, drafter = tiny_llama(0), tiny_llama(0, dtype=torch.bfloat16)
    output, rate = speculative_generate([3, 4, 5], drafter, target, max_gen_len=30, eos_tokens_id=[], use_cache=True)
    assert output == oracle([3, 4, 5], target, 30)
    assert rate > 0.5


def test_greedy_temperature_and_skipped_adjustment_change_nothing() -> None:
    target, drafter = tiny_llama(0), tiny_llama(1)
    expected = oracle([3, 4, 5], target, 20)
    for temperature in (0.1, 5.0):
        processor = GreedyProcessor(temperature)
        assert autoregressive_generate([3, 4, 5], target, 20, processor, eos_tokens_id=[]) == expected
        output, _ = speculative_generate(
            [3, 4, 5], drafter, target, logits_processor=processor, max_gen_len=20, eos_tokens_id=[],
            skip_sample_adjustment=True,
        )  # fmt: skip
        assert output == expected


def test_nothing_the_caller_passed_in_is_changed() -> None:
    target, drafter = tiny_llama(0), tiny_llama(1)
    inputs, eos = [3, 4, 5], [1, 2]
    before = [parameter.clone() for parameter in target.parameters()]
    config = target.config.to_dict()
    speculative_generate(inputs, drafter, target, eos_tokens_id=eos, use_cache=True)
    assert (inputs, eos) == ([3, 4, 5], [1, 2])
    assert target.config.to_dict() == config
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))


def test_real_model_equals_generate(smollm2: Loaded) -> None:
    prompt = smollm2.chat("List three fruits, then list them again.")
    ids = torch.tensor([prompt])
    theirs = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32)
    expected = theirs[0, len(prompt) :].tolist()
    eos = list(smollm2.stop)
    assert autoregressive_generate(list(prompt), smollm2.model, 32, eos_tokens_id=eos, use_cache=True) == expected
    output, rate = speculative_generate(
        list(prompt), smollm2.model, smollm2.model, max_gen_len=32, eos_tokens_id=eos, use_cache=True
    )
    assert output == expected
    assert rate == 1.0
