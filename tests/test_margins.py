"""Margins are recorded and audited, and near-ties are decided by a pass over one token."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import final

import pytest
import torch
from attrs import define, field
from torch import Tensor

from specflow import (
    TEXT,
    CachedPredictor,
    DecodeError,
    Dice,
    EachPrefix,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    PointMass,
    Predictor,
    Proposal,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    chain,
    run,
    speculative_step,
    start,
)
from specflow.constraints import Constrained, Grammar, LogitBias
from specflow.drafters import propose_nothing
from specflow.margins import Margins, audit
from specflow.paths import last_rows
from specflow.predictors import OneByOne, RescoreNearTies, UncachedPredictor, margins_of
from specflow.testing import certify
from tests.toys import VOCABULARY, oracle, tiny_llama

PROMPT = (3, 4, 5, 3, 4)
NEW = 40
BELOW = 0.3


def text_of(step_target: Predictor, new: int = NEW) -> Tokens:
    step = autoregressive_step(step_target, GreedyProcessor(), Dice())
    return run(step, start(PROMPT, new).unwrap()).state.output


def test_margins_always() -> None:
    assert margins_of(torch.tensor([[1.0, 4.0, 3.5], [2.0, 2.0, 0.0], [0.0, -inf, -inf]])) == [0.5, 0.0, inf]
    assert margins_of(torch.zeros(2, 1)) == [inf, inf]
    assert margins_of(torch.tensor([[20.0, 20.125]], dtype=torch.bfloat16)) == [0.125]


def test_a_decode_records_the_margin_of_each_token_it_emits() -> None:
    """Through drafts as without them: rows behind a rejection or a stop are not recorded."""
    model = tiny_llama()
    truth = UncachedPredictor(model)
    text = PROMPT + text_of(truth)
    stop = text[-3]
    for drafts in (0, 4):
        recorder = Margins()
        target = CachedPredictor(model)
        step = speculative_step(
            lambda tokens: (Proposal(token) for token in (*text[len(tokens) :][:2], 0, 0)),
            target,
            GreedyProcessor(),
            Dice(),
            Fixed(max(1, drafts)),
            observe=recorder,
        )
        end = run(step, start(PROMPT, NEW, [stop]).unwrap()).state
        expected = margins_of(last_rows(truth, end.tokens[:-1], len(end.output)))
        assert recorder.recorded == pytest.approx(expected, abs=1e-9)


def test_an_audit_of_the_models_own_text_finds_nothing() -> None:
    model = tiny_llama()
    text = (*PROMPT, *oracle(PROMPT, model, NEW))
    report = audit(text, model, len(PROMPT))
    assert (report.tokens, report.differences, report.first) == (NEW, (), None)
    assert str(report) == f"all {NEW} tokens are greedy"


def test_an_audit_names_the_first_token_that_is_not_greedy_and_its_margin() -> None:
    model = tiny_llama()
    text = (*PROMPT, *oracle(PROMPT, model, NEW))
    wrong = (text[12] + 1) % VOCABULARY
    changed = (*text[:12], wrong, *text[13:])
    report = audit(changed, model, len(PROMPT))
    assert report.first is not None
    assert (report.first.position, report.first.token, report.first.best) == (12, wrong, text[12])
    assert report.first.margin == pytest.approx(margins_of(UncachedPredictor(model)(text[:12], ()))[0], abs=1e-9)
    assert f"the first is {wrong} at position 12, where {text[12]} is best" in str(report)


@pytest.mark.parametrize("prompt", [0, 6, -1])
def test_an_audit_wants_a_prompt_within_the_text(prompt: int) -> None:
    with pytest.raises(DecodeError, match="the prompt is not within the text of 5 tokens"):
        audit(PROMPT, tiny_llama(), prompt)


def test_an_audit_refuses_tokens_outside_the_vocabulary_before_the_model_runs() -> None:
    with pytest.raises(DecodeError, match="outside the vocabulary"):
        audit((1, VOCABULARY), tiny_llama(), 1)


@final
@define(eq=False)
class Counted:
    """A predictor that remembers how it was asked."""

    predictor: Predictor
    asked: list[tuple[int, int]] = field(factory=list)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        self.asked.append((len(tokens) + len(drafts), len(drafts) + 1))
        return self.predictor(tokens, drafts)


def test_one_by_one_is_the_same_function_and_reads_each_token_alone() -> None:
    model = tiny_llama()
    truth, counted = UncachedPredictor(model), Counted(CachedPredictor(model))
    predict = OneByOne(counted, len(PROMPT))
    text = (*PROMPT, *text_of(truth))
    other = (*text[:9], 1, 2, 3)
    for tokens, last in ((text[:9], 1), (text[:9], 1), (text[:14], 3), (other, 2), (text[:20], 1), (text[:4], 2)):
        assert torch.allclose(last_rows(predict, tokens, last), last_rows(truth, tokens, last), atol=1e-9)
    assert {last for _, last in counted.asked} == {1}
    lengths = [length for length, _ in counted.asked]
    assert lengths[:6] == [5, 6, 7, 8, 9, 9]  # asked again, it reads the last token again
    assert lengths[6:11] == [10, 11, 12, 13, 14]
    assert lengths[11:14] == [10, 11, 12]  # the other text parts behind nine tokens
    assert lengths[14:25] == [*range(10, 21)]


@final
@define(eq=False)
class Rounding:
    """A model whose passes over several tokens are off by up to `BELOW` / 2 in each logit, as rounding has it."""

    model: Predictor

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        logits = self.model(tokens, drafts)
        if not drafts:
            return logits
        generator = torch.Generator().manual_seed((len(tokens) + len(drafts)) * 100 + len(drafts) + 1)
        return logits + (torch.rand(logits.shape, generator=generator, dtype=logits.dtype) - 0.5) * BELOW


def flat(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
    """A tiny llama whose logits lie so near to each other that rounding often decides."""
    logits: Tensor = UncachedPredictor(FLAT)(tokens, drafts) / 6
    return logits


FLAT = tiny_llama()


def test_near_ties_are_decided_by_passes_over_one_token() -> None:
    expected = text_of(flat)
    target, single = Rounding(flat), Counted(flat)

    def drafted(predict: Predictor) -> Tokens:
        step = speculative_step(
            lambda tokens: (Proposal(token) for token in expected[len(tokens) - len(PROMPT) :]),
            predict,
            GreedyProcessor(),
            Dice(),
            Fixed(6),
        )
        return run(step, start(PROMPT, NEW).unwrap()).state.output

    assert drafted(target) != expected
    assert drafted(RescoreNearTies(target, single, BELOW)) == expected
    near = sum(margin < BELOW for margin in margins_of(last_rows(flat, (*PROMPT, *expected)[:-1], NEW)))
    assert 0 < near < NEW
    assert 0 < len(single.asked) < NEW


def test_rows_behind_a_draft_that_is_not_the_best_token_are_not_asked_for() -> None:
    single = Counted(lambda tokens, drafts: torch.tensor([[0.0, 0.1]]))
    near = RescoreNearTies(lambda tokens, drafts: torch.zeros(len(drafts) + 1, 2), single, 0.5)
    assert near((0,), chain((0, 1))).tolist() == [[0.0, pytest.approx(0.1)], [0.0, 0.0], [0.0, 0.0]]
    assert single.asked == [(1, 1)]


def test_what_is_rescored_keeps_the_law() -> None:
    """On every branch: in exact arithmetic the target's rows and the single ones are the same."""
    certificate = certify(
        lambda world: speculative_step(
            SuffixDrafter(), RescoreNearTies(world.target, world.target, 1.0), world.processor, world.rng
        )
    )
    assert certificate.distance < 1e-12


def test_sampling_through_near_ties_runs() -> None:
    step = speculative_step(
        SuffixDrafter(), RescoreNearTies(flat, flat, BELOW), MultinomialProcessor(1.0), Dice(torch.Generator())
    )
    assert len(run(step, start(PROMPT, NEW).unwrap()).state.output) == NEW


def always(row: list[float]) -> Predictor:
    """A model that says the same after any text."""
    return lambda tokens, drafts: torch.tensor([row] * (len(drafts) + 1))


def test_margins_are_those_of_what_the_processor_chooses_among() -> None:
    """The raw logits have a clear favourite, which it forbids."""
    law = LogitBias(GreedyProcessor(), {2: -inf})
    wide, single = always([1.0, 1.0625, 9.0]), always([1.0625, 1.0, 9.0])
    for below, expected in ((0.5, (0, 0)), (0.01, (1, 1))):
        for drafter in (propose_nothing, lambda tokens: iter(chain((0,)))):
            target = RescoreNearTies(wide, single, below, law)
            step = speculative_step(drafter, target, law, Dice(), Fixed(1))
            assert run(step, start((0,), 2).unwrap()).state.output == expected
    likes = LogitBias(GreedyProcessor(), {1: 3.0})  # two that lie near each other, until it has its say
    counted = Counted(single)
    RescoreNearTies(wide, counted, 0.5, LogitBias(likes, {2: -inf}))((0,), ())
    assert counted.asked == []


def test_what_can_be_reached_is_what_the_processor_chooses() -> None:
    """Behind a draft of the best raw token, which it forbids, nothing is looked at."""
    law = LogitBias(GreedyProcessor(), {2: -inf})
    single = Counted(always([5.0, 0.0, 9.0]))
    near = RescoreNearTies(always([1.0, 3.0, 9.0]), single, 0.5, law)
    near((0,), (Proposal(2, parent=TEXT), Proposal(0)))
    assert single.asked == []
    tied = RescoreNearTies(lambda tokens, drafts: torch.tensor([[1.0, 3.0, 9.0], [1.0, 1.1, 9.0]]), single, 0.5, law)
    assert tied((0,), chain((1,))).tolist() == [[1.0, 3.0, 9.0], [5.0, 0.0, 9.0]]


def test_behind_the_end_of_an_answer_nothing_is_looked_at() -> None:
    answer = Grammar.choice(["ab"], (b"a", b"b", b""), stop=(2,)).after((0,))
    single = Counted(always([0.0, 0.0, 0.0]))
    near = RescoreNearTies(always([0.0, 0.0, 0.0]), single, 0.5, Constrained(GreedyProcessor(), answer))
    assert near((0,), chain((0, 1, 2, 1))).tolist() == [[0.0, 0.0, 0.0]] * 5
    assert single.asked == []  # where one token is allowed there is no tie


def test_the_processor_is_not_asked_what_follows_a_stop_token() -> None:
    def law(prefix: Tokens, logits: Tensor) -> PointMass:
        if 2 in prefix:
            raise ValueError(f"{prefix} is not in the language")
        return PointMass(2)

    near = RescoreNearTies(always([0.0, 0.0, 0.0]), always([0.0, 0.0, 0.0]), 0.5, EachPrefix(law), stop=(2,))
    assert near((0,), chain((2,))).tolist() == [[0.0, 0.0, 0.0]] * 2
    step = speculative_step(lambda tokens: iter(chain((2, 1))), near, EachPrefix(law), Dice())
    assert run(step, start((0,), 9, stop=(2,)).unwrap()).state.output == (2,)


def test_a_processor_that_draws_has_no_near_ties() -> None:
    near = RescoreNearTies(flat, flat, BELOW, MultinomialProcessor(1.0))
    with pytest.raises(DecodeError, match="MultinomialProcessor is not certain of a token"):
        near(PROMPT, ())
