"""The conformance kit finds what it is there to find."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, pairwise
from typing import final

import pytest
import torch
from attrs import frozen
from torch import Tensor
from torch.nn import Embedding, Module
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typing_extensions import override

from specflow import CachedPredictor, DecodeError, Tokens, along_paths
from specflow.predictors import last_rows, path_by_path
from specflow.state import Predictor
from specflow.testing import conformance, fresh_passes, model_conformance
from specflow.testing.conformance import FARTHEST, _longest, _special
from tests.toys import VOCABULARY, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("seed", range(4))
def test_a_memo_of_an_attention_model_conforms(seed: int) -> None:
    report = model_conformance(tiny_llama(), seed=seed)
    assert report.holds, report
    assert report.rows > report.steps == 60
    assert "differ by at most" in str(report)


def _level(vocab_size: int) -> Predictor:
    """All tokens are as likely everywhere."""
    return along_paths(lambda tokens: torch.zeros(vocab_size))


def test_the_script_depends_on_its_seed_alone() -> None:
    def texts(seed: int) -> list[tuple[Tokens, int]]:
        seen: list[tuple[Tokens, int]] = []

        def watch(tokens: Tokens, last: int) -> Tensor:
            seen.append((tokens, last))
            return torch.zeros(last, 4)

        conformance(path_by_path(watch), _level(4), 4, tolerance=0.0, seed=seed, longest=20)
        return seen

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert max(len(tokens) for tokens, _ in texts(1)) <= 20
    assert all(1 <= last <= len(tokens) for tokens, last in texts(1))


def test_a_memo_that_keeps_refused_tokens_is_found_and_named() -> None:
    model, right = tiny_gpt2(), CachedPredictor(tiny_gpt2())

    def stale(tokens: Tokens, last: int) -> Tensor:
        # The row of a rejected draft: right only where the text's last token is what was read before.
        return last_rows(right, (*tokens[:-2], 3, tokens[-1]) if len(tokens) > 9 else tokens, last)

    fresh = path_by_path(lambda tokens, last: model(torch.tensor([tokens])).logits[0, -last:])
    report = conformance(path_by_path(stale), fresh, 64, tolerance=1e-9)
    assert not report.holds
    first = report.divergences[0]
    assert first.position >= 9
    assert f"step {first.step} ({first.move.value}) after token {first.position}" in str(report)
    assert report.largest == max(divergence.difference for divergence in report.divergences)


def test_a_row_that_is_not_a_number_differs_and_equal_infinities_do_not() -> None:
    minus_infinity = along_paths(lambda tokens: torch.full((4,), -torch.inf))
    nan = along_paths(lambda tokens: torch.full((4,), torch.nan))

    assert conformance(minus_infinity, minus_infinity, 4, tolerance=0.0, steps=5).holds
    assert not conformance(nan, nan, 4, tolerance=1.0, steps=5).holds


# What a model says of its own: each row from a pass over its prefix, by a model that has read nothing before


@final
@frozen(eq=False)
class Answer:
    """What a model of one's own returns."""

    logits: Tensor


class Own(Module):
    """A model of somebody's own: what it embeds, or that in some way that a test is about."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Embedding(VOCABULARY, VOCABULARY)

    @override
    def forward(self, input_ids: Tensor) -> Answer:
        return Answer(self.table(input_ids) * self.scale(input_ids.shape[1]))

    def scale(self, length: int) -> Tensor:
        """What each of the tokens is multiplied by, [n, 1]."""
        return torch.ones(length, 1)


class Counting(Own):
    """How often it was called."""

    calls = 0

    @override
    def scale(self, length: int) -> Tensor:
        self.calls += 1
        return torch.full((length, 1), float(self.calls))


class Longest(Own):
    """The longest text that it has seen; it shows only from 20 tokens on."""

    longest = 20

    @override
    def scale(self, length: int) -> Tensor:
        self.longest = max(self.longest, length)
        return torch.full((length, 1), float(self.longest))


class FromTheEnd(Own):
    """Positions that count from the end."""

    @override
    def scale(self, length: int) -> Tensor:
        return torch.arange(length, 0, -1.0)[:, None]


@pytest.mark.parametrize("kind", [Own, Counting, Longest, FromTheEnd])
def test_fresh_passes_are_of_each_prefix_and_by_a_model_that_has_read_nothing(kind: type[Own]) -> None:
    model = kind()
    fresh = fresh_passes(model, VOCABULARY, longest=40)
    text = tuple(range(40))
    for end, last in ((40, 3), (5, 5), (40, 1), (30, 12)):
        rows = [_like(model)(torch.tensor([text[:at]])).logits[0, -1:] for at in range(end - last + 1, end + 1)]
        assert torch.equal(last_rows(fresh, text[:end], last), torch.cat(rows))
    assert vars(model).keys() & {"calls", "longest"} == set()  # the given one has read nothing either


def _like(model: Own) -> Own:
    other = type(model)()
    other.table = model.table
    return other


def test_a_pass_that_is_a_function_of_its_prefixes_is_done_once() -> None:
    """And a model that looks ahead has a pass for each row."""
    passes = count()

    class Counted(Own):
        @override
        def forward(self, input_ids: Tensor) -> Answer:
            next(passes)
            return super().forward(input_ids)

    class Ahead(Counted, FromTheEnd):
        pass

    def taken(model: Module) -> int:
        fresh = fresh_passes(model, VOCABULARY)
        before = next(passes)
        last_rows(fresh, tuple(range(30)), 7)
        return next(passes) - before - 1

    assert taken(Counted()) == 1
    assert taken(Ahead()) == 7


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Own()
    vars(model)["lines"] = (line for line in ("", ""))  # a generator cannot be copied
    with pytest.raises(DecodeError, match="cannot be copied"):
        fresh_passes(model, VOCABULARY)


def test_nothing_conforms_in_a_script_without_readings() -> None:
    with pytest.raises(DecodeError, match="give one reading at least"):
        conformance(_level(4), along_paths(lambda tokens: torch.ones(4)), 4, tolerance=0.0, steps=0)
    with pytest.raises(DecodeError, match="give one reading at least"):
        model_conformance(tiny_llama(), steps=0)


def _memo(model: Module) -> Predictor:
    """A memo that believes in plain caches, as ours once did: the kit must see what is wrong with that."""
    held: list[tuple[Tokens, object]] = []

    @torch.no_grad()
    def predict(tokens: Tokens, last: int) -> Tensor:
        begun = (pair for pair in held if tokens[:-last][: len(pair[0])] == pair[0])
        covered, cache = next(begun, ((), None))
        held.clear()
        output = model(torch.tensor([tokens[len(covered) :]]), cache=cache, use_cache=True)
        held.append((tokens, output.cache))
        rows: Tensor = output.logits[0, -last:]
        return rows

    return path_by_path(predict)


def _odd_models() -> Iterator[tuple[str, PreTrainedModel]]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    context = {"max_position_embeddings": 70, "vocab_size": VOCABULARY, "initializer_range": 0.3}
    yield "dynamic rope", LlamaForCausalLM(LlamaConfig(**sizes, **context, rope_parameters=rope))
    yield "window in the config", LlamaForCausalLM(LlamaConfig(**sizes, **context, sliding_window=90))
    yield "not causal", LlamaForCausalLM(LlamaConfig(**sizes, **context, is_causal=False))
    roberta = AutoConfig.for_model(
        "roberta", **sizes, **context, is_decoder=True, hidden_dropout_prob=0.0, pad_token_id=0
    )
    yield "positions from elsewhere", AutoModelForCausalLM.from_config(roberta)


@pytest.mark.parametrize("which", range(4))
def test_the_kit_sees_what_a_memo_must_not_believe(which: int) -> None:
    """Behind a context of 70, a window of 90, ahead, and in the first rows: all with the kit's own choice of texts."""
    torch.manual_seed(0)
    name, model = list(_odd_models())[which]
    model.double().eval()
    longest = _longest(model, VOCABULARY)
    fresh = fresh_passes(model, VOCABULARY, longest=longest)
    report = conformance(
        _memo(model), fresh, VOCABULARY, tolerance=1e-6, steps=80, longest=longest, often=_special(model, VOCABULARY)
    )
    assert not report.holds, name
    assert longest > {"dynamic rope": 70, "window in the config": 90}.get(name, 60)


def test_the_texts_go_past_what_the_config_names_and_hold_its_ids() -> None:
    def longest(**config: object) -> int:
        sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        return _longest(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **config)), 50)

    assert longest(max_position_embeddings=100) > 100
    assert longest(max_position_embeddings=4096) == 64
    assert longest(max_position_embeddings=4096, sliding_window=200) > 200
    assert longest(max_position_embeddings=4096, sliding_window=FARTHEST + 1) == 64
    assert longest(max_position_embeddings=4096, attention_windows=[30, 200]) > 200
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 77}
    assert longest(max_position_embeddings=308, rope_parameters=rope) > 308
    assert _longest(tiny_gpt2(context=48), VOCABULARY) == 48  # it has no positions behind that
    assert _special(tiny_gpt2(), VOCABULARY) == (1,)
    ends = tiny_gpt2()
    ends.config.eos_token_id = [7, VOCABULARY]
    assert _special(ends, VOCABULARY) == (1, 7)

    seen: list[Tokens] = []

    def watch(tokens: Tokens, last: int) -> Tensor:
        seen.append(tokens)
        return torch.zeros(last, 4)

    conformance(path_by_path(watch), _level(4), 4, tolerance=0.0, often=(77,))
    assert 0.05 < sum(text.count(77) for text in seen) / sum(map(len, seen)) < 0.25


def test_two_conversations_take_turns() -> None:
    seen: list[Tokens] = []

    def watch(tokens: Tokens, last: int) -> Tensor:
        seen.append(tokens)
        return torch.zeros(last, 99)

    conformance(path_by_path(watch), _level(99), 99, tolerance=0.0, steps=200)
    firsts = [text[:2] for text in seen]
    assert len({*firsts}) < 40
    assert sum(before != after for before, after in pairwise(firsts)) > 8
