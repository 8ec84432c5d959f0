"""Beam search: against every text there is, against transformers, against greedy decoding, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from io import StringIO
from itertools import product
from math import inf
from types import SimpleNamespace

import numpy
import pytest
import torch
from attrs import evolve
from returns.pipeline import flow
from rich.console import Console
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from typing_extensions import override

from specflow import DecodeError, autoregressive_generate, beam_search_generate
from specflow.beam import (
    Beam,
    BeamPredictor,
    Beams,
    CachedBeamPredictor,
    Expand,
    Expanded,
    LengthPenalty,
    Select,
    Selected,
    ShowBeams,
    advance_beams,
    beam_step,
)
from specflow.models import Loaded
from specflow.state import Finished, Reason, Request, Tokens
from tests.architectures import ARCHITECTURES
from tests.toys import Unrunnable, oracle, passes_of, tiny_gpt2, tiny_llama

EOS = [1, 2]


class Table(Module):
    """A model over `size` tokens whose logits depend on the last two; only the first `possible` tokens ever come."""

    def __init__(self, seed: int, size: int, possible: int, rounded: bool = False) -> None:
        super().__init__()
        logits = torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
        logits[:, :, possible:] = -inf
        self.logits = logits.round() if rounded else logits

    @override
    def forward(self, input_ids: Tensor) -> object:
        before = torch.cat([torch.zeros_like(input_ids[:, :1]), input_ids[:, :-1]], dim=1)
        return SimpleNamespace(logits=self.logits[before, input_ids])


class Cacheless(Module):
    """The same model, without its cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    @override
    def forward(self, input_ids: Tensor) -> object:
        return self.model(input_ids, use_cache=False)


def texts(vocabulary: Collection[int], length: int, eos: Collection[int]) -> Iterator[Tokens]:
    """Every text that ends: with its first eos, or at `length`."""
    for size in range(1, length + 1):
        for text in product(vocabulary, repeat=size):
            if not set(text[:-1]) & set(eos) and (text[-1] in eos or size == length):
                yield text


def log_prob(model: Module, prompt: Sequence[int], text: Tokens) -> float:
    logits: Tensor = model(torch.tensor([[*prompt, *text]])).logits
    return float(logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(text)), text].sum())


def score(log_p: float, length: int, min_length: float, alpha: float) -> float:
    penalty: float = ((min_length + length) / (min_length + 1)) ** alpha
    return log_p / penalty


def optimum(
    model: Module, vocabulary: Collection[int], length: int, eos: Collection[int], min_length: float, alpha: float
) -> Tokens:
    return max(
        texts(vocabulary, length, eos),
        key=lambda text: score(log_prob(model, [3], text), len(text), min_length, alpha),
    )


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.6, 1.2, 4.0])
@pytest.mark.parametrize(("min_length", "eos"), [(5.0, [1]), (0.0, [1]), (-0.5, [0, 2]), (2.0, [])])
def test_wide_beams_find_the_best_of_all_texts(alpha: float, min_length: float, eos: list[int]) -> None:
    found = set()
    for seed in range(6):
        model = Table(seed, size=81, possible=3)
        best = optimum(model, range(3), 4, eos, min_length, alpha)
        ours = beam_search_generate(
            [3], model, 4, num_beams=81, top_k=81, min_length=min_length, alpha=alpha, eos_tokens_id=eos
        )
        assert tuple(ours) == best
        found.add(best)
    assert len(found) > 1


def test_beams_as_wide_as_all_texts_are_more_than_there_are_tokens() -> None:
    for seed in range(6):
        model = tiny_llama(seed, vocab_size=4)
        best = optimum(model, range(4), 3, [1], 5.0, 1.2)
        assert tuple(beam_search_generate([3], model, 3, num_beams=64, top_k=4, eos_tokens_id=1)) == best


def test_top_k_is_all_tokens_where_there_are_fewer_than_its_default() -> None:
    for model in (tiny_llama(0, vocab_size=2), Table(0, 2, 2)):
        ours = beam_search_generate([1], model, 4, eos_tokens_id=[])
        assert ours == beam_search_generate([1], model, 4, top_k=2, eos_tokens_id=[])
        with pytest.raises(DecodeError, match="top_k is larger than the vocabulary of 2"):
            beam_search_generate([1], model, 4, top_k=4, eos_tokens_id=[])


def test_the_penalty_decides_how_long_the_best_text_is() -> None:
    """So the test above sees texts that end early and texts that do not."""
    lengths = {
        alpha: [len(optimum(Table(seed, 81, 3), range(3), 4, [1], 5.0, alpha)) for seed in range(6)]
        for alpha in (-2.0, 4.0)
    }
    assert sum(lengths[-2.0]) < sum(lengths[4.0])


def test_two_tokens_of_a_llama_are_the_best_two() -> None:
    model = tiny_llama(0, vocab_size=12)
    for eos in ([1], [1, 5, 7]):
        ours = beam_search_generate([3], model, 2, num_beams=12, top_k=12, eos_tokens_id=eos)
        assert tuple(ours) == optimum(model, range(12), 2, eos, 5.0, 1.2)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.7, 1.2])
@pytest.mark.parametrize("num_beams", [2, 3, 7])
def test_transformers_finds_the_same_text(alpha: float, num_beams: int) -> None:
    """Its score is log P / |Y|^length_penalty, which is ours at min_length = 0."""
    ended = 0
    for model, prompt in product((tiny_llama(0), tiny_llama(5), tiny_gpt2(0)), ([3], [3, 4, 5, 9, 9])):
        eos = [1, 2, 7, 11, 19, 30, 41, 52]
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=12,
            length_penalty=alpha,
            early_stopping="never",
            eos_token_id=eos,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        ours = beam_search_generate(
            prompt, model, 12, num_beams=num_beams, top_k=64, min_length=0.0, alpha=alpha, eos_tokens_id=eos
        )
        assert ours == theirs[: len(ours)]
        assert theirs[len(ours) :] == []
        ended += ours[-1] in eos
    assert ended > 0


def test_the_real_model_and_transformers_find_the_same_text(smollm2: Loaded) -> None:
    prompt = list(smollm2.chat("Name a colour."))
    ids = torch.tensor([prompt])
    theirs = smollm2.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        do_sample=False,
        max_new_tokens=10,
        length_penalty=1.0,
        early_stopping="never",
    )
    ours = beam_search_generate(
        prompt, smollm2.model, 10, num_beams=3, top_k=3, min_length=0.0, alpha=1.0, eos_tokens_id=list(smollm2.stop)
    )
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.2])
def test_one_beam_and_one_branch_is_greedy(make: Callable[[int], PreTrainedModel], alpha: float) -> None:
    model = make(0)
    for eos in ([], [oracle([3, 4], model, 20)[9]], [oracle([3, 4], model, 20)[0]]):
        ours = beam_search_generate([3, 4], model, 20, num_beams=1, top_k=1, alpha=alpha, eos_tokens_id=eos)
        assert ours == oracle([3, 4], model, 20, eos)


def test_equal_logits_are_decided_as_greedy_decoding_does() -> None:
    for seed in range(20):
        model = Table(seed, size=9, possible=9, rounded=True)
        ours = beam_search_generate([3], model, 20, num_beams=1, top_k=1, eos_tokens_id=[])
        assert ours == autoregressive_generate([3], model, 20, eos_tokens_id=[])


@pytest.mark.parametrize(("num_beams", "top_k"), [(1, 3), (2, 1), (4, 3), (6, 40)])
def test_a_cache_changes_nothing_and_one_token_of_each_beam_is_fed(num_beams: int, top_k: int) -> None:
    for model, eos in product((tiny_llama(0), tiny_gpt2(0)), ([], EOS)):
        fed = passes_of(model)
        ours = beam_search_generate([3, 4, 5, 6], model, 15, num_beams=num_beams, top_k=top_k, eos_tokens_id=eos)
        assert fed == [4] + [1] * (len(fed) - 1)
        assert ours == beam_search_generate(
            [3, 4, 5, 6], Cacheless(model), 15, num_beams=num_beams, top_k=top_k, eos_tokens_id=eos
        )


def test_the_beam_predictor_is_a_pure_function() -> None:
    model = tiny_llama(0)
    predict, truth = CachedBeamPredictor(model), CachedBeamPredictor(Cacheless(model))
    for asked in (
        ((3, 4),),
        ((3, 4, 5), (3, 4, 6), (3, 4, 5)),
        ((3, 4, 6, 1), (3, 4, 5, 1)),
        ((3, 4, 6, 1, 1), (3, 4, 6, 1, 2), (3, 4, 5, 1, 2)),
        ((9, 9), (8, 8)),
        ((9, 9, 1), (8, 8, 1)),
        ((7,),),
        ((7, 7),),
    ):
        torch.testing.assert_close(predict(asked), truth(asked), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "follows"),
    [("mistral", True), ("gemma2", True), ("bloom", True), ("mamba", False), ("jamba", False), ("rwkv", False)],
)
def test_a_cache_follows_the_beams_only_where_it_is_keys_and_values(kind: str, follows: bool) -> None:
    """Sliding windows may be picked by row like any others; recurrent states and unknown caches are read without."""
    architecture = next(architecture for architecture in ARCHITECTURES if architecture.kind == kind)
    model = architecture.build()
    predict, fed = CachedBeamPredictor(model), passes_of(model)
    texts: tuple[Tokens, ...] = (tuple(range(5, 16)),)
    for width in (3, 5, 1, 2, 4):
        truth = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
        del fed[:]
        torch.testing.assert_close(predict(texts), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))
        assert (fed == [1]) is (follows and len(texts[0]) > 11)
        texts = tuple((*texts[i % len(texts)], (7 * i) % 64) for i in range(width))


def test_beams_that_cross_the_edge_of_a_longrope_are_read_afresh_there() -> None:
    edge = 14
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": edge,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 9.0, 30.0],
    }
    phi3 = next(architecture for architecture in ARCHITECTURES if architecture.kind == "phi3")
    model = evolve(
        phi3, config={**phi3.config, "rope_parameters": rope, "original_max_position_embeddings": edge}
    ).build()
    predict, text = CachedBeamPredictor(model), tuple(range(5, 16))
    for token in range(20, 28):
        truth = model(torch.tensor([text])).logits[:, -1]
        torch.testing.assert_close(predict((text,)), truth, rtol=0, atol=1e-9)
        text = (*text, token)


def test_logits_that_are_not_finite_are_an_error_that_names_the_position() -> None:
    model = Table(0, 9, 9)
    model.logits[:, 4] = float("nan")
    with pytest.raises(DecodeError, match="NaN or infinity after the token at position 2"):
        CachedBeamPredictor(model)(((1, 2, 3), (1, 2, 4)))


def test_an_interrupted_pass_leaves_no_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(0)
    predict = CachedBeamPredictor(model)
    predict(((3, 4),))
    hook = model.register_forward_hook(_interrupt)  # after the cache has been written to
    with pytest.raises(KeyboardInterrupt):
        predict(((3, 4, 5), (3, 4, 6)))
    hook.remove()
    torch.testing.assert_close(predict(((3, 4, 6),)), CachedBeamPredictor(Cacheless(model))(((3, 4, 6),)))


def _interrupt(module: Module, arguments: object, output: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.2])
def test_going_on_would_not_change_the_result(alpha: float) -> None:
    """The search that stops only when nothing is live finds the same text, later."""
    early = 0
    penalty = LengthPenalty(alpha=alpha)
    for seed in range(30):
        predict = CachedBeamPredictor(Table(seed, 5, 5))
        request = Request((3,), 9, frozenset(EOS))
        short, long = (search(predict, select, request) for select in (Select(3, penalty), patient(3, penalty)))
        assert short.state.tokens == long.state.tokens
        assert short.state.tally.steps <= long.state.tally.steps
        early += short.state.tally.steps < long.state.tally.steps
    assert early > 0


def test_the_search_is_over_as_soon_as_nothing_better_can_come() -> None:
    beams = Beams(Request((3,), 5, frozenset({1})))
    select = Select(2, LengthPenalty(alpha=0.0))
    for live, is_over in ((-0.9, False), (-1.0, True), (-1.1, True)):
        branches = tuple(sorted((Beam((1,), -1.0), Beam((5,), live)), key=lambda beam: -beam.log_prob))
        assert select(Expanded(beams, branches)).is_over is is_over


def patient(num_beams: int, penalty: LengthPenalty) -> Callable[[Expanded], Selected]:
    select = Select(num_beams, penalty)

    def until_nothing_is_live(expanded: Expanded) -> Selected:
        selected = select(expanded)
        return Selected(expanded, selected.beams, not selected.beams.live)

    return until_nothing_is_live


def search(predict: BeamPredictor, select: Callable[[Expanded], Selected], request: Request) -> Finished:
    expand = Expand(predict, 3)
    outcome: Beams | Finished = Beams(request)
    while isinstance(outcome, Beams):
        outcome = flow(outcome, expand, select, advance_beams)
    return outcome


def test_the_reason_is_named() -> None:
    predict = CachedBeamPredictor(Table(0, 5, 5))
    select = Select(2, LengthPenalty(alpha=0.0))
    stopped = search(predict, select, Request((3,), 20, frozenset(range(5))))
    assert (stopped.reason, len(stopped.state.output)) == (Reason.STOP, 1)
    limited = search(predict, select, Request((3,), 20))
    assert (limited.reason, len(limited.state.output)) == (Reason.LIMIT, 19)
    assert limited.state.tally.steps == 19


def test_the_branches_that_count_are_those_in_the_beam() -> None:
    """An ended branch that is not among the num_beams most probable does not count, and live ones move up."""
    beams = Beams(Request((3,), 9, frozenset({1})))
    branches = tuple(Beam((token,), -float(rank)) for rank, token in enumerate((5, 1, 6, 7, 1), start=1))
    narrow = Select(1)(Expanded(beams, branches))
    assert (narrow.beams.live, narrow.beams.ended) == (branches[:1], None)
    wide = Select(2)(Expanded(beams, branches))
    assert (wide.beams.live, wide.beams.ended) == ((branches[0], branches[2]), branches[1])


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 65}, "top_k"),
        ({"min_length": inf}, "min_length"),
        ({"min_length": float("nan")}, "min_length"),
        ({"min_length": -1.0}, "min_length"),
        ({"alpha": inf}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": 1e300}, "alpha"),
        ({"alpha": -1e300}, "alpha"),
        ({"alpha": numpy.float64(1e300)}, "alpha"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [64]}, "inputs"),
        ({"max_gen_len": -1}, "max_gen_len"),
        ({"eos_tokens_id": 64}, "eos_tokens_id"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(arguments: dict[str, object], parameter: str) -> None:
    with pytest.raises(DecodeError) as refusal:
        beam_search_generate(**{"inputs": [3], "model": Unrunnable(tiny_llama(0)), **arguments})  # type: ignore[arg-type]
    assert refusal.value.parameter == parameter


def test_a_vocabulary_that_nobody_tells_is_found_out() -> None:
    with pytest.raises(DecodeError, match="top_k is larger than the vocabulary of 9"):
        beam_search_generate([3], Table(0, 9, 9), top_k=10)


@pytest.mark.parametrize("max_gen_len", [0, 1, 2])
def test_short_lengths(max_gen_len: int) -> None:
    output = beam_search_generate([3], tiny_llama(0), max_gen_len, eos_tokens_id=[])
    assert len(output) == max_gen_len


def test_the_context_bounds_the_text() -> None:
    model = tiny_llama(0, context=16)
    assert len(beam_search_generate([3] * 10, model, 40, eos_tokens_id=[])) == 6


def test_nothing_the_caller_passed_in_is_changed() -> None:
    model, inputs, eos = tiny_llama(0), [3, 4], [1, 2]
    model.train()
    before = model.config.to_dict()
    beam_search_generate(inputs, model, 5, eos_tokens_id=eos)
    assert (inputs, eos, model.config.to_dict(), model.training) == ([3, 4], [1, 2], before, True)


class Words:
    """A tokenizer for the toy vocabulary."""

    def decode(self, token_ids: list[int], /) -> str:
        return "".join("abcdefghi"[token] for token in token_ids)


def test_debug_shows_every_branch_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = Table(1, 9, 9)
    quiet = beam_search_generate([3], model, 6, eos_tokens_id=EOS)
    assert capsys.readouterr().out == ""
    loud = beam_search_generate([3], model, 6, eos_tokens_id=EOS, debug=True, tokenizer=Words())
    out = capsys.readouterr().out
    assert loud == quiet
    assert "position 1  branches 3" in out
    assert repr(Words().decode(quiet)) in out
    headings = [line for line in out.splitlines() if line.startswith("position")]
    assert ["search over" in line for line in headings] == [False] * (len(headings) - 1) + [True]


def test_a_tokenizer_that_does_not_know_a_text_ends_no_search(capsys: pytest.CaptureFixture[str]) -> None:
    class Deaf:
        def decode(self, token_ids: list[int], /) -> str:
            raise KeyError(token_ids[-1])

    model = Table(1, 9, 9)
    quiet = beam_search_generate([3], model, 6, eos_tokens_id=EOS)
    assert beam_search_generate([3], model, 6, eos_tokens_id=EOS, debug=True, tokenizer=Deaf()) == quiet
    assert "log P" in capsys.readouterr().out


def test_the_colours_tell_what_becomes_of_a_branch() -> None:
    beams = Beams(Request((3,), 3, frozenset({1})))
    branches = tuple(Beam((token,), -float(rank)) for rank, token in enumerate((5, 1, 6, 1, 7), start=1))
    console = Console(file=StringIO(), record=True, force_terminal=True, color_system="standard", width=99)
    ShowBeams(Words(), console)(Select(2)(Expanded(beams, branches)))
    lines = console.export_text(styles=True).splitlines()
    green, cyan, dim = "\x1b[32m", "\x1b[36m", "\x1b[2m"
    for line, (colour, verdict, word) in zip(
        lines[1:],
        [(green, "live", "f"), (cyan, "best", "b"), (green, "live", "g"), (dim, "ended", "b"), (dim, "dropped", "h")],
        strict=True,
    ):
        assert line.startswith(colour)
        assert verdict in line
        assert repr(word) in line


def test_an_observer_of_ones_own_sees_each_round() -> None:
    rounds: list[int] = []
    step = beam_step(CachedBeamPredictor(Table(1, 9, 9)), observe=lambda selected: rounds.append(selected.beams.steps))
    outcome: Beams | Finished = Beams(Request((3,), 6))
    while isinstance(outcome, Beams):
        outcome = step(outcome)
    assert rounds == [1, 2, 3, 4, 5]
