"""The memo: it saves work, and never changes a result."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import Embedding, Module
from transformers import PreTrainedModel
from typing_extensions import override

from specflow import (
    CachedPredictor,
    DecodeError,
    Dice,
    GreedyProcessor,
    LLMDrafter,
    autoregressive_step,
    chain,
    limits_of,
    run,
    speculative_step,
    start,
)
from specflow.predictors import UncachedPredictor, last_rows, path_by_path
from specflow.prefix import NEAR
from specflow.protocols import Limits
from specflow.testing import TableModel
from specflow.vocabulary import fitted
from tests.toys import Unrunnable, disturbed, oracle, passes_of, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_a_random_walk_over_texts_never_changes_a_result(model: PreTrainedModel) -> None:
    random = Random(1)
    cached, afresh = CachedPredictor(model), UncachedPredictor(model)
    text = [3, 4, 5]
    for _ in range(150):
        match random.randrange(4):
            case 0:
                text = text[: random.randint(1, len(text))]
            case 1:
                text = [random.randrange(64) for _ in range(random.randint(1, 20))]
            case _:
                text += [random.randrange(64) for _ in range(random.randint(1, 6))]
        text = text[:100]
        last = random.randint(1, len(text))
        ours, truth = last_rows(cached, tuple(text), last), last_rows(afresh, tuple(text), last)
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-11)
        if random.random() < 0.3:
            cached.prune(tuple(text[: random.randint(1, len(text))]))


def test_only_what_the_memo_does_not_cover_is_fed() -> None:
    model = tiny_llama()
    predict, fed = CachedPredictor(model), passes_of(model)
    predict((3, 4, 5), ())
    predict((3, 4, 5, 6), ())
    last_rows(predict, (3, 4, 5, 6, 7, 8), 3)  # two new tokens, and the logits behind one that was read before
    predict((3, 4, 5, 6, 9), ())  # 7 and 8 were rejected
    predict((3, 4, 5, 6, 9), ())  # stepping a state again reads its last token again
    predict((8,), ())
    assert fed == [3, 1, 3, 1, 1, 1]


def test_a_speculative_step_feeds_each_token_once_to_each_model() -> None:
    """γ + 1 tokens a pass for the target, one for the drafter, and what it did not read of full acceptances."""
    target, drafter = tiny_llama(), tiny_llama()
    fed, drafter_fed = passes_of(target), passes_of(drafter)
    predictors = CachedPredictor(target), CachedPredictor(drafter)
    draft = LLMDrafter(predictors[1], GreedyProcessor(), Dice())
    end = run(
        speculative_step(draft, predictors[0], GreedyProcessor(), Dice(), prune=predictors), start([3, 4], 24).unwrap()
    )
    assert end.state.tally.acceptance_rate == 1.0
    assert fed == [7, 6, 6, 6]
    assert drafter_fed == [2, 1, 1, 1, 1] + [2, 1, 1, 1, 1] * 3


def test_refused_drafts_cost_nothing_later() -> None:
    target, drafter = tiny_llama(0), tiny_llama(9)
    predictor, fed = CachedPredictor(target), passes_of(target)
    draft = LLMDrafter(CachedPredictor(drafter), GreedyProcessor(), Dice())
    end = run(speculative_step(draft, predictor, GreedyProcessor(), Dice()), start([3, 4], 24).unwrap())
    assert end.state.tally.acceptance_rate < 0.2
    assert fed[0] == 7
    assert set(fed[1:-5]) == {6}


def test_pruning_is_invisible() -> None:
    target, drafter = tiny_llama(0), disturbed(tiny_llama(0), 1, 0.02)
    texts = []
    for prune in (False, True):
        a, b = CachedPredictor(target), CachedPredictor(drafter)
        step = speculative_step(
            LLMDrafter(a, GreedyProcessor(), Dice()), b, GreedyProcessor(), Dice(), prune=(a, b) if prune else ()
        )
        texts.append(run(step, start([3, 4], 30).unwrap()).state)
    assert texts[0] == texts[1]


def test_pruning_frees_what_was_refused() -> None:
    model = tiny_llama()
    predict, fed = CachedPredictor(model), passes_of(model)
    predict((3, 4, 5, 6, 7), ())
    predict.prune((3, 4, 9))
    assert predict._memos._kept[0].past.length == 2
    predict((3, 4), ())
    predict((3, 4, 5), ())
    assert fed == [5, 1, 1]


def test_a_text_that_parts_where_pruning_does_not_look_is_read_rightly() -> None:
    model = tiny_llama()
    predict, afresh = CachedPredictor(model), UncachedPredictor(model)
    end = tuple(i % 5 for i in range(NEAR))
    predict((3, 4, *end, 6), ())
    predict.prune((3, 9, *end, 7))
    torch.testing.assert_close(predict((3, 9, *end, 7), ()), afresh((3, 9, *end, 7), ()), rtol=0, atol=1e-11)


def test_an_interrupted_pass_leaves_no_wrong_memo() -> None:
    class Interrupted(Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model, self.config, self.after = model, model.config, -1

        @override
        def forward(self, input_ids: Tensor, cache: object = None, use_cache: bool = True) -> object:
            output = self.model(input_ids, cache=cache, use_cache=use_cache)
            self.after -= 1
            if self.after == 0:
                raise KeyboardInterrupt  # the cache has been written to by now
            return output

    model = tiny_llama()
    interrupted = Interrupted(model)
    predict, afresh = CachedPredictor(interrupted), UncachedPredictor(model)
    predict((3, 4, 5), ())
    interrupted.after = 1
    with pytest.raises(KeyboardInterrupt):
        last_rows(predict, (3, 4, 5, 6, 7), 2)
    ours, truth = last_rows(predict, (3, 4, 5, 6, 7), 2), last_rows(afresh, (3, 4, 5, 6, 7), 2)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-11)


@pytest.mark.parametrize("returned", ["cache", "past_key_values"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_may_call_its_cache_by_either_of_transformers_names(name: str, returned: str) -> None:
    """As an argument and in what it returns; what was read is not read again."""

    class Output:
        def __init__(self, logits: Tensor, cache: object) -> None:
            self.logits = logits
            setattr(self, returned, cache)

    class Renamed(Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model, self.config, self.fed = model, model.config, list[int]()

        def answered(self, ids: Tensor, cache: object, use_cache: bool) -> Output:
            self.fed.append(ids.shape[-1])
            output = self.model(ids, cache=cache, use_cache=use_cache)
            return Output(output.logits, output.cache)

    class Cache(Renamed):
        @override
        def forward(self, input_ids: Tensor, cache: object = None, use_cache: bool = True) -> object:
            return self.answered(input_ids, cache, use_cache)

    class PastKeyValues(Renamed):
        @override
        def forward(self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = True) -> object:
            return self.answered(input_ids, past_key_values, use_cache)

    model = {"cache": Cache, "past_key_values": PastKeyValues}[name](tiny_llama())
    predict, afresh = CachedPredictor(model), UncachedPredictor(tiny_llama())
    predict((3, 4, 5), ())
    model.fed.clear()
    torch.testing.assert_close(predict((3, 4, 5, 6), ()), afresh((3, 4, 5, 6), ()), rtol=0, atol=1e-11)
    assert model.fed == [1]


def test_a_model_in_training_mode_decodes_without_dropout_and_stays_in_training_mode() -> None:
    model = tiny_gpt2()
    expected = oracle([3, 4, 5], model, 10)
    model.train()
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    step = autoregressive_step(CachedPredictor(model), GreedyProcessor(), Dice())
    assert list(run(step, start([3, 4, 5], 10).unwrap()).state.output) == expected
    assert all(module.training for module in model.modules())


def test_an_interrupt_while_a_model_is_put_into_evaluation_mode_leaves_it_in_training_mode() -> None:
    class Interrupted(torch.nn.Identity):
        @override
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "training" and value is False:
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    model = tiny_llama()
    model.last = Interrupted()
    model.train()
    with pytest.raises(KeyboardInterrupt):
        CachedPredictor(model)((3, 4, 5), ())
    assert all(module.training for module in model.modules())


class Bigram(Module):
    """The smallest language model: no config, no cache, one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Embedding(8, 8)

    @override
    def forward(self, input_ids: Tensor) -> object:
        return type("Output", (), {"logits": self.table(input_ids)})()


@pytest.mark.parametrize(
    ("first", "second"), [(None, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, None)]
)
def test_what_was_read_under_another_autocast_is_read_again(
    first: torch.dtype | None, second: torch.dtype | None
) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    predict, passes = CachedPredictor(model), passes_of(model)
    text = tuple(range(3, 20))
    for dtype, end in ((first, 15), (second, 16), (second, 17)):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            predict(text[:end], ())
    assert 16 in passes
    assert passes[-1] == 1


def test_any_module_whose_call_gives_logits() -> None:
    model = Bigram()
    assert limits_of(model) == Limits(None, None)
    for predict in (CachedPredictor(model), UncachedPredictor(model)):
        assert torch.equal(last_rows(predict, (3, 4, 5), 2), model.table.weight[4:6])


def test_a_model_without_logits_is_refused() -> None:
    class Headless(Module):
        @override
        def forward(self, input_ids: Tensor) -> object:
            return (input_ids,)

    with pytest.raises(
        DecodeError, match=r"returned no logits: received tuple; give a model with a language-model head"
    ):
        CachedPredictor(Headless())((1,), ())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_naming_the_position(bad: float) -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.weight[6, 2] = bad
    for predict in (CachedPredictor(model), UncachedPredictor(model)):
        with pytest.raises(DecodeError, match="NaN or infinity after the token at position 3; check the weights"):
            last_rows(predict, (3, 4, 5, 6, 7), 4)


def test_masked_logits_are_fine() -> None:
    predict = fitted(path_by_path(lambda tokens, last: torch.zeros(last, 5)), 7)
    assert predict((1,), ()).tolist() == [[0.0] * 5 + [-torch.inf] * 2]
    assert fitted(predict, 3)((1,), chain((2,))).tolist() == [[0.0] * 3] * 2


def test_rows_may_be_asked_for_by_a_small_number_of_numpy() -> None:
    predict, text = TableModel(5, seed=1), (1,) * 300
    assert torch.equal(last_rows(predict, text, numpy.uint8(2)), last_rows(predict, text, 2))  # type: ignore[arg-type]
    model, many = tiny_llama(), tuple([3 + i % 9 for i in range(100)])
    rows = CachedPredictor(model, features=(1,)).features(many, numpy.int8(2))  # type: ignore[arg-type]
    assert torch.equal(rows, CachedPredictor(model, features=(1,)).features(many, 2))


def test_limits_are_read_without_running() -> None:
    assert limits_of(Unrunnable(tiny_gpt2(context=32))) == Limits(64, 32)
