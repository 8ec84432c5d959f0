"""A model that goes on from what its first layers have computed says what it says, and computes nothing twice."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from random import Random
from threading import Thread
from typing import Final
from unittest.mock import Mock
from weakref import ref

import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import logging

from specflow import (
    TEXT,
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Predictor,
    Proposal,
    Tokens,
    chain,
    run,
    speculative_step,
    start,
)
from specflow.accelerate import Given, bit_for_bit, build, fast
from specflow.predictors import Resumed, UncachedPredictor, early_exit, last_rows, layer_skip
from specflow.testing import conformance
from tests.architectures import NAMED, WINDOW
from tests.test_captured import captured
from tests.test_edges import DYNAMIC, made
from tests.toys import VOCABULARY, oracle, passes_of, tiny_gpt2, tiny_llama

PROMPT: Final = (5, 9, 5, 9, 7, 3, 5)

GREEDY: Final = GreedyProcessor()


def drafting(target: Resumed, seed: int) -> Predictor:
    """The target as it says something while its first layers draft, now along its text and now elsewhere."""
    random = Random(seed)

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        text = tokens + tuple([draft.token for draft in drafts])
        end = random.randrange(1, len(text) + 1)
        target.early(text[:end], chain([random.randrange(VOCABULARY) for _ in range(random.randrange(3))]))
        return target(tokens, drafts)

    return predict


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "bloom", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next"]
)
def test_it_says_what_a_fresh_pass_says_whatever_its_first_layers_read(kind: str) -> None:
    logging.set_verbosity_error()
    model = NAMED[kind].build()
    target = Resumed(model, early_exit(model, 1))
    tolerance = 1e-9 if kind in ("llama", "gpt2", "mistral", "gemma3_text") else 1e-4
    report = conformance(
        drafting(target, 1),
        UncachedPredictor(model),
        VOCABULARY,
        tolerance=tolerance,
        steps=40,
        longest=5 * WINDOW,
        prune=target.prune,
    )
    assert report.holds, report
    assert not any(model_hooks for module in model.modules() for model_hooks in hooks_of(module))


def hooks_of(module: Module) -> tuple[object, object]:
    return module._forward_hooks, module._forward_pre_hooks


@pytest.mark.parametrize("make", [fast, bit_for_bit], ids=["fast", "bits"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_accelerated_models_go_on_from_their_layers_too(make: Callable[[PreTrainedModel], Module], kind: str) -> None:
    model = evolve(NAMED[kind], dtype=torch.float32).build()
    made_of = make(model)
    target = Resumed(made_of, early_exit(made_of, 1))
    report = conformance(
        drafting(target, 2), UncachedPredictor(model), VOCABULARY, tolerance=1e-3, steps=25, longest=5 * WINDOW
    )
    assert report.holds, report
    if make is bit_for_bit:
        text = (*PROMPT, 2, 8)
        assert target(PROMPT, chain((2, 8)))[2].equal(CachedPredictor(made_of)(text, ())[0])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("model", [tiny_llama(layers=4), tiny_gpt2(layers=4)], ids=["llama", "gpt2"])
def test_self_speculation_is_the_models_own_greedy_text(model: PreTrainedModel, layers: int) -> None:
    early, dice = early_exit(model, layers), Dice()
    target = Resumed(model, early)
    step = speculative_step(LLMDrafter(early, GREEDY, dice), target, GREEDY, dice, Fixed(3), (early, target))
    end = run(step, start(PROMPT, 24).unwrap())
    assert end.state.output == tuple(oracle(PROMPT, model, 24))
    assert end.state.tally.drafted > 0


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Counter[int]]:
    """How many tokens each layer of the model is given, whichever copy of the layer reads them, over its weights."""
    stack = [layer for layer in model.modules() if isinstance(layer, LlamaDecoderLayer)]
    numbers = {id(layer.self_attn.q_proj.weight): i for i, layer in enumerate(stack)}
    counts = Counter[int]()

    def count(module: Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, LlamaDecoderLayer):
            counts[numbers[id(module.self_attn.q_proj.weight)]] += given[0].shape[1]

    handle = register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def test_each_layer_reads_each_draft_once() -> None:
    model, dice = tiny_llama(layers=4), Dice()
    early = early_exit(model, 3)
    target = Resumed(model, early)
    target((1, 2), ())  # tried
    step = speculative_step(LLMDrafter(early, GREEDY, dice), target, GREEDY, dice, Fixed(3), (target,))
    with counting(model) as counts:
        tally = run(step, start(PROMPT, 24).unwrap()).state.tally
    assert 0 < tally.accepted < tally.drafted
    assert counts == dict.fromkeys(range(4), len(PROMPT) + tally.drafted + tally.steps - 1)

    small, whole = CachedPredictor(layer_skip(model, (3,))), CachedPredictor(model)
    small((1, 2), ()), whole((1, 2), ())
    step = speculative_step(LLMDrafter(small, GREEDY, dice), whole, GREEDY, dice, Fixed(3), (small, whole))
    with counting(model) as twice:
        assert run(step, start(PROMPT, 24).unwrap()).state.tally == tally
    assert twice[3] == counts[3]
    assert twice[0] > 1.8 * counts[0]


def test_the_layers_above_are_not_run_for_a_draft() -> None:
    model = tiny_llama(layers=4)
    early = early_exit(model, 1)
    target = Resumed(model, early)
    target((1, 2), ())
    with counting(model) as counts:
        for end in range(1, 5):
            early(PROMPT[:end], ())
        assert counts == {0: 4}
        target(PROMPT[:4], chain(PROMPT[4:5]))
        assert counts == dict.fromkeys(range(4), 5)
        target(PROMPT[:4], chain((PROMPT[4], 1)))
        assert counts == {0: 6, 1: 8, 2: 8, 3: 8}  # rows that are wanted again begin from the states that are kept


def test_a_tree_is_read_by_the_whole_model() -> None:
    model = tiny_llama()
    target = Resumed(model, early_exit(model, 1))
    tree = (Proposal(4), Proposal(5, parent=TEXT), Proposal(6, parent=0))
    for tokens in (PROMPT, PROMPT[:4]):
        torch.testing.assert_close(target(tokens, tree), UncachedPredictor(model)(tokens, tree))
        torch.testing.assert_close(target(tokens, chain((4, 6))), UncachedPredictor(model)(tokens, chain((4, 6))))


def test_beyond_a_horizon_where_the_model_reads_otherwise() -> None:
    model = made("llama", max_position_embeddings=30, rope_parameters=DYNAMIC)
    target, fresh, text = Resumed(model, early_exit(model, 1)), UncachedPredictor(model), tuple(range(1, 41))
    for end in (20, 29, 30, 31, 40, 25):
        torch.testing.assert_close(last_rows(target, text[:end], 4), last_rows(fresh, text[:end], 4))


def test_what_is_interrupted_leaves_no_wrong_memo() -> None:
    model = tiny_llama(layers=4)
    target, fresh = Resumed(model, early_exit(model, 2)), UncachedPredictor(model)
    for stop_at in range(6):
        text = (*PROMPT, stop_at, 4, 4)
        target(text[:-3], ())
        left = stop_at

        def interrupt(module: Module, given: object) -> None:
            nonlocal left
            if isinstance(module, LlamaDecoderLayer):
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1

        handle = register_module_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt) if stop_at < 4 else pytest.raises(DecodeError):
                target(text if stop_at < 4 else (*text[:-1], VOCABULARY), ())
        finally:
            handle.remove()
        for tokens in (text, text[:-1]):
            torch.testing.assert_close(last_rows(target, tokens, 3), last_rows(fresh, tokens, 3))


def test_threads_share_it() -> None:
    model = tiny_llama()
    early = early_exit(model, 1, memos=2)
    target = Resumed(model, early, memos=2)
    outputs: dict[int, Tokens] = {}

    def decode(seed: int) -> None:
        step = speculative_step(LLMDrafter(early, GREEDY, Dice()), target, GREEDY, Dice(), Fixed(3), (early, target))
        outputs[seed] = run(step, start((*PROMPT, seed), 10).unwrap()).state.output

    threads = [Thread(target=decode, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {seed: tuple(oracle((*PROMPT, seed), model, 10)) for seed in range(4)}


def test_weights_that_change_are_noticed() -> None:
    model = tiny_llama()
    target = Resumed(model, early_exit(model, 1))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        before = target(PROMPT, ())
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        after = target(PROMPT, ())
        assert not after.allclose(before)
        torch.testing.assert_close(after, UncachedPredictor(model)(PROMPT, ()))
    # The first layers keep their weight, and the model has another.
    model.get_submodule("model.layers.0.mlp").up_proj = torch.nn.Linear(32, 48, bias=False).double()
    with pytest.raises(DecodeError, match="not over the weights that it has now") as raised:
        target(PROMPT, ())
    assert raised.value.parameter == "early"


def test_weights_that_change_by_little_are_noticed() -> None:
    """In half precision what the layers say of them is within rounding of what they said."""
    model = tiny_llama(dtype=torch.bfloat16)
    target = Resumed(model, early_exit(model, 1))
    target(PROMPT, ())
    model.load_state_dict({name: weight * 1.01 for name, weight in model.state_dict().items()}, assign=True)
    for _ in range(2):
        with pytest.raises(DecodeError, match="first layers are not over the weights that it has now") as raised:
            target(PROMPT, ())
        assert raised.value.parameter == "early"
    torch.testing.assert_close(Resumed(model, early_exit(model, 1))(PROMPT, ()), CachedPredictor(model)(PROMPT, ()))


def test_weights_that_the_model_held_before_are_let_go() -> None:
    model = tiny_llama()
    target, layer = Resumed(model, early_exit(model, 1)), model.get_submodule("model.layers.1.mlp.up_proj")
    for drafts in ((), (Proposal(4), Proposal(5, parent=TEXT))):
        target(PROMPT, drafts)
    before = ref(layer.weight)
    layer.weight = torch.nn.Parameter(layer.get_parameter("weight").detach() * 2)
    torch.testing.assert_close(target(PROMPT, ()), UncachedPredictor(model)(PROMPT, ()))
    gc.collect()
    assert before() is None


def test_a_model_that_was_not_taken_apart_in_time_is_taken_apart_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    target, layer = Resumed(model, early_exit(model, 1)), model.get_submodule("model.layers.1.mlp.up_proj")
    for drafts in ((), (Proposal(4), Proposal(5, parent=TEXT))):
        target(PROMPT, drafts)
        layer.load_state_dict({"weight": layer.get_parameter("weight").detach() * 2}, assign=True)
        with monkeypatch.context() as patch:
            patch.setattr("specflow.predictors.early.Rest.of", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                target(PROMPT, drafts)
        torch.testing.assert_close(target(PROMPT, drafts), UncachedPredictor(model)(PROMPT, drafts))


def test_a_prompt_that_was_read_for_a_tree_is_not_read_again_for_the_next() -> None:
    model = tiny_llama()
    fed, target = passes_of(model), Resumed(model, early_exit(model, 1))
    tree = (Proposal(4), Proposal(5, parent=TEXT))
    target(PROMPT, tree)
    target((*PROMPT, 4), ())
    fed.clear()
    target((*PROMPT, 4), tree)
    assert sum(fed) <= 1 + len(tree)


@pytest.mark.parametrize(
    "make", [fast, lambda model: build._settled(model, captured(model), Given.KEPT)], ids=["fast", "tape"]
)
def test_weights_of_an_accelerated_model_that_have_changed_are_refused(
    make: Callable[[PreTrainedModel], Module],
) -> None:
    model = tiny_llama(dtype=torch.float32)
    accelerated = make(model)
    target = Resumed(accelerated, early_exit(accelerated, 1))
    target(PROMPT, ())
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(2)
    for predict in (target, target.early, CachedPredictor(deepcopy(accelerated))):
        with pytest.raises(DecodeError, match="weights have changed since it was accelerated"):
            predict(PROMPT, ())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: early_exit(tiny_llama(7, layers=3), 1),
        lambda model: CachedPredictor(layer_skip(model, (0,)), features=lambda m: [m.model.layers[-1]]),
        lambda model: CachedPredictor(layer_skip(model, (1, 2)), features=(1,)),
        lambda model: CachedPredictor(layer_skip(model, (1, 2)), features=(0, 1)),
    ],
    ids=["of another model", "of other layers", "behind the norm", "of another width"],
)
def test_what_is_not_made_of_the_first_layers_is_refused(make: Callable[[Module], CachedPredictor]) -> None:
    model = tiny_llama(layers=3)
    target = Resumed(model, make(model))
    for _ in range(2):
        with pytest.raises(DecodeError) as raised:
            target(PROMPT, ())
        assert raised.value.parameter == "early"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("minimax", "the layers above keep more than keys and values"),
        ("mamba", "fed one token at a time"),
        ("openai-gpt", "fed the whole text afresh"),
        ("dory", "did not show one row"),
        ("gemma3n_text", "cannot read ids alone"),
        ("hrm_text", "the layers of the model were not found"),
    ],
)
def test_models_that_cannot_be_gone_on_from(kind: str, reason: str) -> None:
    logging.set_verbosity_error()
    model = NAMED[kind].build()
    with pytest.raises(DecodeError, match=reason):
        Resumed(model, early_exit(model, 1))(PROMPT, ())


@pytest.mark.parametrize("layers", [0, 3, -1, 1.5, None, True])
def test_exits_that_are_not_there(layers: object) -> None:
    with pytest.raises(DecodeError, match="layers"):
        early_exit(tiny_llama(), layers)  # type: ignore[arg-type]


def test_what_has_nothing_to_go_on_from_is_refused() -> None:
    model = tiny_llama()
    for early in (early_exit(model, 2), CachedPredictor(layer_skip(model, (1,))), UncachedPredictor(model), None):
        with pytest.raises(DecodeError):
            Resumed(model, early)  # type: ignore[arg-type]
