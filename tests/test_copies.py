"""What is copied from a device to the host, which is once for a draft; and drafting by blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, StaticCache
from typing_extensions import override

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    Predictor,
    SharedNoise,
    Step,
    Tokens,
    autoregressive_step,
    run,
    seed_coupled_step,
    speculative_step,
    start,
)
from specflow.drafters import GreedyBlockDrafter, SampledBlockDrafter
from specflow.paths import last_rows
from specflow.testing import CASES, TableModel, World, certify
from tests.toys import disturbed, oracle, passes_of, tiny_gpt2, tiny_llama

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("copies")  # in one process, so that `tests.copies` runs once


@pytest.fixture(scope="module")
def copies() -> dict[str, Any]:
    """What `tests.copies` found, in a process of its own, as it registers a device."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.copies"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "draft", "verification"),
    [
        ("greedy, by blocks", 1, 1),
        ("greedy, token by token", 4, 1),
        ("greedy, suffix", 0, 1),
        ("greedy, a tree without branches", 0, 1),
        ("greedy, a tree", 0, 2),  # once more where the target leaves the likeliest path for another
        ("sampled, by blocks", 1, 2),  # the probabilities of the drafts, and the token behind them
        ("sampled, from greedy blocks", 1, 2),
        ("sampled, token by token", 4, 2),
        ("sampled, suffix", 0, 2),
        ("sampled, block verification", 1, 3),  # the masses left over behind all prefixes too
        ("seed-coupled", 1, 2),  # the target's samples, and the token behind them where all are the drafts
        ("seed-coupled, a tree", 0, 3),  # the samples of two paths, and the token behind them
    ],
)
def test_copies_to_the_host(copies: dict[str, Any], name: str, draft: int, verification: int) -> None:
    found = copies[name]
    assert len(found["drafts"]) > 5
    assert max(found["drafts"]) == draft
    assert max(found["verifications"]) <= verification
    assert found["accepted"] > 0


def test_what_is_decoded_on_a_device_is_what_is_decoded_on_the_host(copies: dict[str, Any]) -> None:
    model = tiny_llama(3)
    expected = oracle([3, 4, 5, 3, 4], model, 40)
    for name in ("greedy, by blocks", "greedy, token by token", "greedy, suffix"):
        assert copies[name]["text"] == expected
    blocks, tokens = copies["greedy, by blocks"], copies["greedy, token by token"]
    assert (blocks["drafted"], blocks["accepted"]) == (tokens["drafted"], tokens["accepted"])
    noise, sampling = SharedNoise(7), MultinomialProcessor(1.0)
    drafter = SampledBlockDrafter(CachedPredictor(disturbed(model, 1, 0.05)), sampling, noise, 4)
    step = seed_coupled_step(drafter, CachedPredictor(model), sampling, noise, Fixed(4))
    assert list(run(step, start([3, 4, 5, 3, 4], 40).unwrap()).state.output) == copies["seed-coupled"]["text"]
    step = autoregressive_step(CachedPredictor(model), MultinomialProcessor(0.1), noise)
    assert list(run(step, start([3, 4, 5, 3, 4], 40).unwrap()).state.output) == copies["seed-coupled, a tree"]["text"]


def test_the_function_of_the_spec_drafts_by_blocks_on_a_device(copies: dict[str, Any]) -> None:
    greedy, sampled = copies["generated"]
    assert greedy["text"] == oracle([3, 4, 5, 3, 4], tiny_llama(3), 40)
    assert 10 < greedy["copies"] <= 2 * greedy["passes"]
    assert 10 < sampled["copies"] <= 3 * sampled["passes"]


def test_logits_on_a_device_that_are_not_finite_are_noticed_where_a_token_of_them_arrives(
    copies: dict[str, Any],
) -> None:
    assert len(copies["refused"]) == 4
    for sentence in copies["refused"]:
        assert "NaN or infinity after the token at the last position" in sentence


def test_on_a_device_a_seed_has_one_text_however_far_is_drafted(copies: dict[str, Any]) -> None:
    """What was drawn there for drafts that nobody asked for is taken back."""
    texts = copies["one seed"]
    assert len(set(texts[0])) > 3
    assert texts == [texts[0]] * 4


def test_what_is_drawn_ahead_for_nothing_is_taken_back_where_some_laws_are_certain(copies: dict[str, Any]) -> None:
    one_by_one, ahead = copies["taken back"]
    assert len({tokens[-1] for tokens in one_by_one}) == 4  # after none, one, two and three draws
    assert ahead == one_by_one


def test_a_law_on_a_device_that_is_none_names_the_processor_and_the_position(copies: dict[str, Any]) -> None:
    assert "the law of masked is not valid: received probabilities that sum to 0" in copies["no law"]
    assert "after the token at position 7;" in copies["no law"]


def test_on_a_device_too_an_answer_ends_where_a_wish_leaves_nothing_of_its_grammar(copies: dict[str, Any]) -> None:
    assert copies["dead ends"] == [5, 5, 5, 5]


@pytest.mark.parametrize("model", [tiny_llama(3), tiny_gpt2(3)], ids=["llama", "gpt2"])
def test_a_block_is_what_token_by_token_drafting_proposes(model: PreTrainedModel) -> None:
    one_by_one, predictor, fed = (
        LLMDrafter(CachedPredictor(model), GreedyProcessor(), Dice()),
        CachedPredictor(model),
        passes_of(model),
    )
    by_blocks = GreedyBlockDrafter(predictor, 6)
    for tokens in ((3, 4, 5), (3, 4, 5, 6, 7), (3, 4), (9,)):
        fed.clear()
        block = list(by_blocks(tokens))
        passes = list(fed)
        assert len(passes) == 6
        assert passes[1:] == [1] * 5
        for mine, other in zip(block, one_by_one(tokens), strict=False):
            assert mine.token == other.token
            assert mine.logits is not None
            assert other.logits is not None
            torch.testing.assert_close(mine.logits, other.logits, rtol=0, atol=1e-11)


def test_what_was_drafted_in_a_block_is_not_read_again() -> None:
    target, model = tiny_llama(3), tiny_llama(3)
    fed, predictors = passes_of(model), (CachedPredictor(target), CachedPredictor(model))
    step = speculative_step(
        GreedyBlockDrafter(predictors[1]), predictors[0], GreedyProcessor(), Dice(), prune=predictors
    )
    end = run(step, start([3, 4], 18).unwrap()).state
    assert list(end.output) == oracle([3, 4], target, 18)
    assert end.tally.acceptance_rate == 1.0
    assert fed == [2, 1, 1, 1, 1] + [2, 1, 1, 1, 1] * 2


def test_a_block_ends_where_the_drafter_does() -> None:
    model = tiny_llama(3, context=8)
    assert [len(list(GreedyBlockDrafter(CachedPredictor(model), 5)((3,) * k))) for k in (2, 5, 8, 9)] == [5, 4, 1, 0]
    static = CachedPredictor(tiny_llama(3), lambda: StaticCache(model.config, max_cache_len=8))
    assert len(list(GreedyBlockDrafter(static, 5)((3,) * 6))) == 3
    small = GreedyBlockDrafter(CachedPredictor(tiny_llama(3, vocab_size=60)), 2, vocab_size=64)
    assert [len(proposal.logits) for proposal in small((3, 4)) if proposal.logits is not None] == [64, 64]
    assert list(small((3, 63))) == []
    with pytest.raises(DecodeError, match="ahead is below 1"):
        GreedyBlockDrafter(CachedPredictor(model), 0)


def test_a_block_that_is_not_finite_is_refused_and_leaves_no_wrong_memo() -> None:
    model = tiny_llama(3)
    predictor = CachedPredictor(model)
    expected = [proposal.token for proposal in GreedyBlockDrafter(predictor, 3)((3, 4))]
    head = dict(model.named_parameters())["lm_head.weight"]
    before = head.clone()
    head.fill_(torch.inf)
    with pytest.raises(DecodeError, match="NaN or infinity after the token at position 2"):
        list(GreedyBlockDrafter(predictor, 3)((3, 4, 5)))
    head.copy_(before)
    assert [proposal.token for proposal in GreedyBlockDrafter(predictor, 3)((3, 4))] == expected


class Table(Module):
    """A predictor as a model with a cache: the text that it has read."""

    def __init__(self, predict: Predictor) -> None:
        super().__init__()
        self.predict = predict

    @override
    def forward(self, input_ids: Tensor, state: tuple[int, ...] | None = None, use_cache: bool = True) -> object:
        new = tuple(input_ids[0].tolist())
        tokens = (state or ()) + new
        return Output(last_rows(self.predict, tokens, len(new))[None], tokens)


class Output:
    """Logits, and the cache."""

    def __init__(self, logits: Tensor, state: Tokens) -> None:
        self.logits, self.state = logits, state


@pytest.mark.parametrize("ahead", [1, 2])
def test_drafting_by_blocks_is_exact(ahead: int) -> None:
    @cache
    def cached(drafter: Predictor) -> CachedPredictor:
        """One for all branches of a case: what it remembers must not show, and to try it takes long."""
        return CachedPredictor(Table(drafter))

    def greedy(world: World) -> Step:
        drafter = GreedyBlockDrafter(cached(world.drafter), ahead)
        return speculative_step(drafter, world.target, world.processor, world.rng, Fixed(2))

    def sampled(world: World) -> Step:
        drafter = SampledBlockDrafter(cached(world.drafter), MultinomialProcessor(1.0), world.rng, ahead)
        return speculative_step(drafter, world.target, world.processor, world.rng, Fixed(2))

    assert len(list(GreedyBlockDrafter(CachedPredictor(Table(TableModel(3))), ahead)((0, 1)))) == ahead
    certify(greedy)
    certify(sampled, cases=CASES[:4])
