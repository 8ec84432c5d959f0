"""What layers held at each token is a function of the text, whatever was read, rejected or forked before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from threading import Thread
from typing import Final

import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils import logging

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Proposal,
    run,
    speculative_step,
    start,
)
from specflow.accelerate import bit_for_bit, fast
from specflow.batch import BatchPredictor, Failed, together
from specflow.predictors import UncachedPredictor, last_rows, layer_skip
from specflow.predictors.reader import layers_of
from specflow.state import TEXT, Tokens, chain
from specflow.testing import conformance, model_conformance, through_trees, with_features
from tests.architectures import ARCHITECTURES, WINDOW
from tests.test_captured import captured
from tests.toys import VOCABULARY, oracle, passes_of, tiny_gpt2, tiny_llama

NAMED: Final = {architecture.kind: architecture for architecture in ARCHITECTURES}

TEXT_OF_TWELVE: Final = tuple(range(3, 15))

COUNTED: Final = ("falcon_mamba", "mamba", "mamba2", "rwkv")
"""Models that count hidden states from what leaves the first layer."""

OTHERWISE: Final = {
    "dory": "its layers are not given hidden states alone",
    "gemma3n_text": "between its layers there are four streams",
    "hrm_text": "it has no list of its layers",
    "longcat_flash": "each of its layers is two",
    "modernbert-decoder": "it has no config of how many layers there are",
}
"""Where features by number are refused."""


def hidden_states(model: Module, tokens: Tokens) -> tuple[Tensor, ...]:
    """What transformers says the layers held, by a copy that may keep hooks."""
    with torch.no_grad():
        output = deepcopy(model)(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return tuple(state[0] for state in output.hidden_states)


@pytest.mark.parametrize("kind", [kind for kind in NAMED if kind not in OTHERWISE and kind not in COUNTED])
def test_features_are_transformers_hidden_states(kind: str) -> None:
    logging.set_verbosity_error()
    model = NAMED[kind].build()
    states, last = hidden_states(model, TEXT_OF_TWELVE), layers_of(model)
    assert last is not None
    numbers = (0, 1, last)
    memo = CachedPredictor(model, features=numbers)
    memo(TEXT_OF_TWELVE[:5], chain((7, 7)))
    expected = torch.cat([states[k] for k in (0, 1, -1)], dim=-1)
    torch.testing.assert_close(memo.features(TEXT_OF_TWELVE, 12), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*OTHERWISE, *COUNTED])
def test_other_models_are_refused_or_counted_by_their_layers(kind: str) -> None:
    logging.set_verbosity_error()
    model = NAMED[kind].build()
    if kind in COUNTED:
        leaving: list[Tensor] = []
        first = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
        first.register_forward_hook(lambda module, given, output: leaving.append(output))
        features = UncachedPredictor(model, features=(1,)).features(TEXT_OF_TWELVE, 12)
        output: object = leaving[-1]
        held = output[0] if isinstance(output, tuple) else output
        assert isinstance(held, Tensor)
        torch.testing.assert_close(features, held[0], atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(DecodeError) as raised:
            CachedPredictor(model, features=(1,)).features(TEXT_OF_TWELVE, 12)
        assert raised.value.parameter == "features"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "mistral", "mamba", "bamba", "gpt_oss", "opt"])
def test_a_memo_never_changes_features(kind: str) -> None:
    logging.set_verbosity_error()
    report = model_conformance(NAMED[kind].build(), features=(1, 2), steps=40, longest=5 * WINDOW)
    assert report.holds, report


Make = Callable[[PreTrainedModel], Module]


@pytest.mark.parametrize(
    "make", [lambda model: model, fast, bit_for_bit, captured], ids=["stock", "fast", "bits", "tape"]
)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_features_along_trees_and_of_accelerated_models(make: Make, kind: str) -> None:
    model = evolve(NAMED[kind], dtype=torch.float32).build()
    memo, fresh = CachedPredictor(make(model), features=(0, 2)), UncachedPredictor(model, features=(0, 2))
    trees = with_features(through_trees(memo, VOCABULARY), memo)
    report = conformance(
        trees, with_features(fresh, fresh), VOCABULARY, tolerance=1e-3, steps=25, longest=5 * WINDOW, prune=memo.prune
    )
    assert report.holds, report


@pytest.mark.parametrize("make", [lambda model: model, fast], ids=["stock", "fast"])
def test_features_in_batches(make: Make) -> None:
    model = tiny_llama()
    target, fresh = BatchPredictor(make(model), 3, features=(1, 2)), UncachedPredictor(model, features=(1, 2))
    shared = (5, 9, 5, 9, 7, 3) * 7

    def decode(number: int) -> float:
        script = with_features(through_trees(target, VOCABULARY, seed=number), target)
        begun = with_features(target, target)((*shared, number), ())
        other = with_features(fresh, fresh)((*shared, number), ())
        report = conformance(script, with_features(fresh, fresh), VOCABULARY, tolerance=1e-9, seed=number, steps=12)
        return max(report.largest, float((begun - other).abs().max()))

    ends = dict(together([partial(decode, number) for number in range(5)], slots=3))
    for end in ends.values():
        assert not isinstance(end, Failed), end
        assert end < 1e-4


@pytest.mark.filterwarnings("ignore:some texts")
@pytest.mark.parametrize("of", [CachedPredictor, BatchPredictor])
def test_modules_that_are_never_called_are_named_and_nothing_is_shown_instead(
    of: type[CachedPredictor] | type[BatchPredictor],
) -> None:
    predictor = of(fast(tiny_llama(dtype=torch.float32)), features=lambda model: [model.embedding])
    with pytest.raises(DecodeError, match="Embedding did not show"):
        predictor.features((1, 2, 3), 1)


def test_what_the_target_read_is_not_read_again() -> None:
    model = tiny_llama()
    target, passes = CachedPredictor(model, features=(1,)), passes_of(model)
    seen: list[int] = []

    def draft(tokens: Tokens, /) -> list[Proposal]:
        before = len(passes)
        assert target.features(tokens[:-1], len(tokens) - 1).shape[0] == len(tokens) - 1
        seen.append(len(passes) - before)
        return [Proposal(1), Proposal(2, parent=TEXT), Proposal(tokens[-2], parent=0)]

    step = speculative_step(lambda tokens: iter(draft(tokens)), target, GreedyProcessor(), Dice())
    end = run(step, start((5, 9, 5, 9), 16).unwrap())
    assert len(end.state.output) == 16
    assert seen[0] == 1
    assert set(seen[1:]) == {0}


def test_a_model_is_left_as_it_was() -> None:
    model, other = tiny_llama(), tiny_llama()
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    predictor = CachedPredictor(model, features=lambda m: [m.model.layers[0].mlp, m.model.norm])
    held = predictor.features((1, 2, 3), 2)
    width = model.get_input_embeddings().weight.shape[1]
    assert held.shape == (2, 2 * width)
    assert held[:, width:].equal(CachedPredictor(other, features=(2,)).features((1, 2, 3), 2))
    with pytest.raises(DecodeError, match="vocabulary"):
        predictor.features((1, 10**6), 1)
    assert not any(hooks_of for pair in hooks for hooks_of in pair)


def test_asking_for_a_copy() -> None:
    predictor = CachedPredictor(tiny_llama(), features=(1,))
    kept = predictor.features((1, 2, 3), 2)
    before = kept.clone()
    for text in ((1, 2), (1, 2, 5, 6), (1, 7)):
        predictor.features(text, 1)
    assert kept.equal(before)


def test_other_threads_may_call_the_model_meanwhile() -> None:
    model = tiny_llama()
    predictor, expected = CachedPredictor(model, memos=1, features=(1,)), CachedPredictor(model, features=(1,))
    wanted = {text: expected.features(text, 3) for text in ((1, 2, 3), (4, 5, 6))}
    stop = False

    def call() -> None:
        while not stop:
            with torch.no_grad():
                model(torch.tensor([[1, 2, 3]]))

    thread = Thread(target=call)
    thread.start()
    try:
        for _ in range(30):
            for text, rows in wanted.items():
                assert torch.allclose(predictor.features(text, 3), rows, atol=1e-6)
    finally:
        stop = True
        thread.join()


def test_modes_do_not_matter() -> None:
    predictor = CachedPredictor(tiny_llama(), features=(1,))
    with torch.inference_mode():
        predictor.features((1, 2, 3), 1)
    after = predictor.features((1, 2, 3, 4), 4)
    with torch.inference_mode():
        predictor.features((1, 2, 3, 4, 5), 1)
    assert not after.requires_grad
    assert after.clone().add_(1).shape[0] == 4


@pytest.mark.parametrize(
    "features",
    [
        (),
        (3,),
        (-1,),
        (1.0,),
        (True,),
        "1",
        [1],
        1,
        lambda model: [],
        lambda model: [torch.nn.Linear(2, 2)],
        lambda m: 3,
    ],
)
def test_what_is_no_layer_is_refused_before_the_model_runs(features: object) -> None:
    for of in (CachedPredictor, UncachedPredictor, BatchPredictor):
        with pytest.raises(DecodeError) as raised:
            of(tiny_llama(), features=features)  # type: ignore[arg-type]
        assert raised.value.parameter == "features"


def test_no_features_were_asked_for() -> None:
    for of in (CachedPredictor, UncachedPredictor, BatchPredictor):
        predictor = of(tiny_gpt2())
        with pytest.raises(DecodeError, match="without features"):
            predictor.features((1, 2), 1)
        with pytest.raises(DecodeError, match="at least one row"):
            of(tiny_gpt2(), features=(1,)).features((1, 2), 0)


def test_logits_are_the_same_with_features() -> None:
    model = tiny_llama()
    text = (5, 9, 5, 9, 7)
    assert last_rows(CachedPredictor(model), text, 3).equal(last_rows(CachedPredictor(model, features=(1,)), text, 3))


def test_a_compiled_model_shows_nothing_rather_than_something_else() -> None:
    compiled: Module = torch.compile(tiny_llama(), backend="eager")  # type: ignore[assignment] # it is a module
    for features in ((1,), lambda m: [m._orig_mod.model.norm]):
        with pytest.raises(DecodeError, match="compiled"):
            CachedPredictor(compiled, features=features)


@pytest.mark.parametrize("make", [lambda model: model, fast, captured], ids=["stock", "fast", "tape"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_a_model_without_some_layers_is_the_model_whose_layers_they_are(make: Make, kind: str) -> None:
    model = evolve(NAMED[kind], dtype=torch.float32).build()
    whole = make(model)
    first, text = layer_skip(whole, (1,)), TEXT_OF_TWELVE
    held = CachedPredictor(first, features=(0, 1))
    through = CachedPredictor(whole, features=(0, 1))
    width = held.features(text, 12).shape[1] // 2
    torch.testing.assert_close(held.features(text, 12)[:, :width], through.features(text, 12)[:, :width])
    # Its last layer's output goes through the norm and the head of the whole model.
    shown = CachedPredictor(first, features=(1,)).features(text, 12)
    head = model.get_output_embeddings()
    assert head is not None
    torch.testing.assert_close(head(shown), last_rows(held, text, 12), atol=1e-4, rtol=1e-4)
    report = conformance(
        CachedPredictor(first), UncachedPredictor(first), VOCABULARY, tolerance=1e-4, steps=25, longest=5 * WINDOW
    )
    assert report.holds, report
    assert last_rows(CachedPredictor(layer_skip(whole, ())), text, 3).equal(last_rows(CachedPredictor(whole), text, 3))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neo", "gemma3_text", "gpt_oss", "mamba", "bamba"])
@pytest.mark.parametrize("skip", [(0,), (1,)])
def test_self_speculation_is_the_models_own_greedy_text(kind: str, skip: tuple[int, ...]) -> None:
    logging.set_verbosity_error()
    model = NAMED[kind].build()
    prompt, greedy, dice = (5, 9, 5, 9, 7, 3, 5), GreedyProcessor(), Dice()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    drafts, target = CachedPredictor(layer_skip(model, skip)), CachedPredictor(model)
    step = speculative_step(LLMDrafter(drafts, greedy, dice), target, greedy, dice, Fixed(3), (drafts, target))
    end = run(step, start(prompt, 12).unwrap())
    assert end.state.output == tuple(oracle(prompt, model, 12))
    assert end.state.tally.drafted > 0
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert layers_of(model) == 2


def test_skipping_follows_the_weights_of_the_model() -> None:
    model = tiny_llama()
    drafts = CachedPredictor(layer_skip(model, (1,)))
    before = drafts((1, 2, 3), ())
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(2)
    assert not drafts((1, 2, 3), ()).allclose(before)


@pytest.mark.parametrize("skip", [(2,), (-1,), ("a",), 1, None, (0.5,), "0", b"\0", {2}])
def test_layers_that_cannot_be_skipped(skip: object) -> None:
    with pytest.raises(DecodeError, match="; give numbers from 0 to 1") as raised:
        layer_skip(tiny_llama(), skip)  # type: ignore[arg-type]
    assert raised.value.parameter == "skip"


def test_a_model_without_layers_is_none() -> None:
    with pytest.raises(DecodeError, match="no layer is left"):
        layer_skip(tiny_llama(), (0, 1))


@pytest.mark.parametrize("skip", [{1}, frozenset({1}), (i for i in [1, 1]), range(1, 2), {1: ""}, torch.tensor([1])])
def test_the_layers_that_are_skipped_come_in_whatever_holds_them(skip: Iterable[int]) -> None:
    model = tiny_llama()
    expected = CachedPredictor(layer_skip(model, (1,)))((1, 2), ())
    assert CachedPredictor(layer_skip(model, skip))((1, 2), ()).equal(expected)


def test_models_whose_layers_are_not_found() -> None:
    for model in (torch.nn.Linear(2, 2), NAMED["hrm_text"].build()):
        with pytest.raises(DecodeError) as raised:
            layer_skip(model, (0,))
        assert raised.value.parameter == "model"


def test_a_model_that_cannot_be_copied_cannot_skip_layers() -> None:
    model = tiny_llama()
    vars(model)["lines"] = (line for line in ("", ""))  # a generator cannot be copied
    with pytest.raises(DecodeError, match="the model cannot be copied"):
        layer_skip(model, (0,))
