"""What users' parts answer: it is used if it can be what it is meant to be, and else refused, naming who said it."""

# ruff: noqa: ANN401, RUF043 - the parts here are of any kind, and the patterns have dots and stars

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, final

import numpy
import pytest
import torch
from attrs import evolve, frozen
from returns.pipeline import flow
from torch import Tensor
from transformers import LogitsProcessorList
from typing_extensions import override

from specflow import (
    TEXT,
    Block,
    Categorical,
    DecodeError,
    DecodeState,
    Dice,
    Drafted,
    EachPrefix,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Match,
    MultinomialProcessor,
    NGramStorage,
    PointMass,
    Proposal,
    Reject,
    Scored,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    TopKProcessor,
    Traverse,
    Verdict,
    Verified,
    along_paths,
    asked,
    autoregressive_step,
    chain,
    run,
    seed_coupled_step,
    speculative_step,
    start,
    unfold,
    verified_step,
)
from specflow.asked import laws_of
from specflow.constraints import LogitBias, RepetitionPenalty
from specflow.distribution import BlackBox, Distribution, flaw
from specflow.drafters import propose_nothing
from specflow.errors import DeadEndError
from specflow.guards.finite import finite
from specflow.laws import Laws
from specflow.loop import once
from specflow.lossy import Lossy, LossyStep, accept_loss
from specflow.predictors import RescoreNearTies, path_by_path
from specflow.processors import LogitsProcessor
from specflow.protocols import Limits
from specflow.stages import (
    Adjust,
    Draft,
    Judge,
    LossyJudge,
    LossySkipAdjustment,
    LossyTypical,
    PruneCache,
    Score,
    StopWhen,
    UpdateNgram,
    Verify,
    advance,
    commit,
    draft_nothing,
    ending,
    stop_string,
)
from specflow.state import BEFORE
from specflow.steps import lossy_unadjusted_step
from specflow.testing import CASES, World, certify
from specflow.vocabulary import shared_vocabulary

V: Final = 8
TABLE: Final = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


@along_paths
def target(tokens: Tokens) -> Tensor:
    return TABLE[tokens[-1]]


def decode(step: Step, room: int = 8) -> Tokens:
    return run(step, start([1, 2], room, limits=Limits(V)).unwrap()).state.output


def says(*proposals: object) -> Any:
    """A drafter of these, whatever they are."""

    def mine(tokens: Tokens) -> Iterator[object]:
        return iter(proposals)

    return mine


def never_run(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
    raise AssertionError("the target was run")


half = Categorical(torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]))


def mine(token: Any, q: Any = None, **others: Any) -> Callable[[], object]:
    return lambda: (
        Proposal(token, source="mine", **others) if q is None else Proposal(token, q, source="mine", **others)
    )


DRAFTS: dict[str, tuple[Callable[[], object], str]] = {
    "a tensor": (mine(torch.tensor(3), PointMass(3)), "'mine' drafts what is not a token id: received tensor"),
    "a bool": (mine(True, PointMass(1)), "'mine' drafts what is not a token id: received True"),
    "a float": (mine(3.0, PointMass(3)), "'mine' drafts what is not a token id: received 3.0"),
    "a string": (mine("3", PointMass(3)), "'mine' drafts what is not a token id: received '3'"),
    "nothing": (mine(None, PointMass(3)), "'mine' drafts what is not a token id: received None"),
    "negative": (mine(-1), "'mine' drafts what is not a token id: received -1"),
    "too large": (mine(V), "'mine' drafts a token outside the vocabulary of 8: received 8"),
    "another's q": (mine(3, PointMass(4)), "token 3 with a q that it was not drawn from: received cert"),
    "no law": (mine(3, 0.5), "'mine' drafts token 3 with a q that it was not drawn from: received 0.5"),
    "no parent": (mine(3, parent=None), "does not come after its parent"),
    "its own parent": (mine(3, parent=0), "does not come after its parent"),
    "beyond any parent": (mine(3, parent=-3), "does not come after its parent"),
    "a parent that is true": (mine(3, parent=True), "does not come after its parent"),
    "a branch of a tensor": (mine(torch.tensor(3), PointMass(3), parent=TEXT), "'mine' drafts what is not a token id"),
    "a negative branch": (mine(-1, parent=TEXT), "'mine' drafts what is not a token id: received -1"),
    "a branch too large": (mine(V, parent=TEXT), "'mine' drafts a token outside the vocabulary of 8"),
    "a parent that is not there": (mine(3, parent=7), "does not come after its parent"),
    "no name": (lambda: Proposal(3, source=None), "mine names its drafts by what is not a str: received None"),  # type: ignore[arg-type]
    "a token alone": (lambda: 3, "mine proposes what is not a Proposal: received 3"),
    "a pair": (lambda: (3, PointMass(3)), "mine proposes what is not a Proposal: received (3"),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_that_cannot_be_is_refused_before_the_target_runs(name: str) -> None:
    proposal, sentence = DRAFTS[name]
    for step in (speculative_step, seed_coupled_step):
        with pytest.raises(DecodeError) as refused:
            decode(step(says(proposal()), never_run, GreedyProcessor(), Dice()))
        assert sentence in str(refused.value)


SPREAD: dict[str, tuple[Categorical, str]] = {
    "without the token": (half, "drafts token 3 with a q that it was not drawn from: received q(3) = 0"),
    "not normalised": (Categorical(torch.ones(V)), "received probabilities that sum to 8"),
    "nearly normalised": (Categorical(torch.full((V,), 0.9955 / V)), "received probabilities that sum to 0.9955"),
    "NaN": (Categorical(torch.full((V,), NAN)), "received NaN at position 2"),
    "negative": (Categorical(torch.tensor([-1.0, 0, 0, 2, 0, 0, 0, 0])), "received a probability of -1"),
    "of another vocabulary": (Categorical(torch.ones(4) / 4), "from another vocabulary than the target's: received 4"),
}


@pytest.mark.parametrize("rule", [Reject, Block, Traverse])
@pytest.mark.parametrize("name", SPREAD)
def test_a_law_that_a_draft_was_not_drawn_from_is_refused_where_it_is_read(
    name: str, rule: type[Reject | Block | Traverse]
) -> None:
    q, sentence = SPREAD[name]
    verify = Verify(target, MultinomialProcessor(1.0), rule(Dice()))
    for others in ((), (Proposal(2, parent=TEXT),)):
        with pytest.raises(DecodeError) as refused:
            verify(Draft(says(Proposal(3, q, source="mine"), *others))(start([1, 2], 8).unwrap()))
        assert sentence in str(refused.value)
        assert "'mine'" in str(refused.value)


def test_numpy_ids_are_ids_and_an_unknown_vocabulary_is_that_of_the_logits() -> None:
    step = speculative_step(says(Proposal(numpy.int64(3), PointMass(3))), target, GreedyProcessor(), Dice())  # type: ignore[arg-type]
    assert decode(step) == decode(autoregressive_step(target, GreedyProcessor(), Dice()))
    first: Any = numpy.int64(0)
    tree = says(Proposal(3), Proposal(4, parent=first), Proposal(5, parent=first - 1))
    assert decode(speculative_step(tree, target, GreedyProcessor(), Dice())) == decode(step)
    for parent in (TEXT, BEFORE):
        wide = says(Proposal(1), Proposal(V, parent=parent, source="mine"))
        step = speculative_step(wide, flat, EachPrefix(never_asked), Dice())
        with pytest.raises(DecodeError, match="'mine' drafts a token outside the vocabulary of 8"):
            run(step, start([1, 2], 8).unwrap())


def flat(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
    return torch.zeros(len(drafts) + 1, V)


def never_asked(prefix: Tokens, logits: Tensor) -> Distribution:
    raise AssertionError("the processor was asked")


ROWS: dict[str, object] = {
    "none": None,
    "a list": [[0.0] * V],
    "one dimension": torch.zeros(V),
    "three dimensions": torch.zeros(1, 1, V),
    "too many rows": torch.zeros(2, V),
    "too few rows": torch.zeros(0, V),
    "no vocabulary": torch.zeros(1, 0),
    "whole numbers": torch.zeros(1, V, dtype=torch.int64),
    "no numbers": torch.zeros(1, V, device="meta"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_cannot_be_name_the_predictor(name: str) -> None:
    def model(tokens: Tokens, drafts: object) -> Any:
        return ROWS[name]

    def from_rows(tokens: Tokens, last: int) -> Any:
        return ROWS[name]

    where = r"gives no rows of logits: .*position 1"
    with pytest.raises(DecodeError, match=f"the target .*model {where}"):
        decode(autoregressive_step(model, GreedyProcessor(), Dice()))
    with pytest.raises(DecodeError, match=f"the drafter .*model {where}"):
        decode(speculative_step(LLMDrafter(model, GreedyProcessor(), Dice()), target, GreedyProcessor(), Dice()))
    branching = LLMDrafter(model, GreedyProcessor(), Dice(), widths=(2,))
    with pytest.raises(DecodeError, match=f"the drafter .*model {where}"):
        decode(speculative_step(branching, target, GreedyProcessor(), Dice()))
    with pytest.raises(DecodeError, match=f"the predictor .*from_rows {where}"):
        decode(autoregressive_step(path_by_path(from_rows), GreedyProcessor(), Dice()))
    with pytest.raises(DecodeError, match=f"the single .*model {where}"):
        RescoreNearTies(target, model, below=INF)((1, 2), ())
    with pytest.raises(DecodeError, match=f"the target .*model {where}"):
        certify(
            lambda world: autoregressive_step(model, world.processor, world.rng),
            cases=[evolve(CASES[0], prompt=(0, 1))],
        )


@final
@frozen
class Answers:
    """A processor that gives this whatever it is asked."""

    answer: object

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [None, 3, (), (half, half)])
def test_laws_of_the_wrong_number_name_the_processor(answer: object) -> None:
    with pytest.raises(DecodeError, match="Answers does not give a law for each row: received .* position 1"):
        decode(autoregressive_step(target, Answers(answer), Dice()))


LAWS: dict[str, tuple[object, str]] = {
    "NaN": (Categorical(torch.full((V,), NAN)), "NaN"),
    "one NaN": (Categorical(torch.tensor([1.0, 0, 0, NAN, 0, 0, 0, 0])), "NaN"),
    "no mass": (Categorical(torch.zeros(V)), "probabilities that sum to 0"),
    "all masked": (Categorical(torch.full((V,), -INF).softmax(-1)), "NaN"),
    "negative": (Categorical(torch.tensor([1.5, -0.5, 0, 0, 0, 0, 0, 0])), "a probability of -0.5"),
    "too much": (Categorical(torch.full((V,), 0.25)), "probabilities that sum to 2"),
    "not renormalised": (Categorical(torch.full((V,), 0.9955 / V)), "probabilities that sum to 0.9955"),
    "too far off in 16 bits": (Categorical(torch.full((V,), 0.12, dtype=torch.bfloat16)), "sum to 0.9"),
    "infinite": (Categorical(torch.tensor([INF, 0, 0, 0, 0, 0, 0, 0])), "probabilities that sum to inf"),
    "too short": (Categorical(torch.ones(4) / 4), "4 probabilities for a vocabulary of 8"),
    "a token outside": (PointMass(V), "certainty of token 8 in a vocabulary of 8"),
    "a negative token": (PointMass(-1), "certainty of token -1"),
    "a tensor token": (PointMass(torch.tensor(3)), "certainty of token tensor(3)"),  # type: ignore[arg-type]
    "a sampler of NaN": (BlackBox(torch.full((V,), NAN), lambda probs: torch.tensor([[1]])), "NaN"),
    "a list": ([0.5, 0.5], "[0.5, 0.5]"),
    "a row": (torch.ones(V) / V, "tensor("),
}
SIBLINGS: Final = (Proposal(1, half), Proposal(0, half.residual(PointMass(1)), TEXT))


def typically(processor: Any) -> LossyStep:
    draft, score = Draft(says(Proposal(1, half), Proposal(5, parent=TEXT))), Score(target, processor)
    judge, adjust = LossyJudge(LossyTypical(Dice())), Adjust(Dice())
    return lambda state: state.then(draft).then(score).then(judge).map(adjust).map(ending())


STEPS: dict[str, Callable[[Any], Step]] = {
    "autoregressive": lambda p: autoregressive_step(target, p, Dice()),
    "rejection": lambda p: speculative_step(SuffixDrafter(), target, p, Dice()),
    "rejection of draws": lambda p: speculative_step(says(Proposal(1, half)), target, p, Dice()),
    "seed-coupled": lambda p: seed_coupled_step(SuffixDrafter(), target, p, SharedNoise(1)),
    "a tree": lambda p: speculative_step(says(Proposal(3), Proposal(4, parent=TEXT)), target, p, Dice()),
    "a path through a tree": lambda p: seed_coupled_step(
        says(Proposal(3), Proposal(5, parent=TEXT)), target, p, Dice()
    ),
    "a tree of draws": lambda p: speculative_step(says(*SIBLINGS, Proposal(5, parent=TEXT)), target, p, Dice()),
    "a block": lambda p: verified_step(says(Proposal(1, half)), target, p, Dice(), Block(Dice())),
    "a block of draws": lambda p: verified_step(says(*SIBLINGS), target, p, Dice(), Block(Dice())),
    "a traversal": lambda p: verified_step(says(Proposal(1, half)), target, p, Dice(), Traverse(Dice())),
    "a traversal of draws": lambda p: verified_step(says(*SIBLINGS), target, p, Dice(), Traverse(Dice())),
    "typical acceptance": lambda p: accept_loss(typically(p)),
    "lossy": lambda p: accept_loss(lossy_unadjusted_step(says(Proposal(1, half)), target, p, Dice())),
    "drafts": lambda p: speculative_step(LLMDrafter(target, p, Dice()), target, GreedyProcessor(), Dice()),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LAWS)
def test_a_law_that_is_none_names_the_processor_and_the_position(name: str, step: str) -> None:
    law, what = LAWS[name]

    def mine(prefix: Tokens, logits: Tensor) -> Any:
        return law if len(prefix) == 4 else PointMass(5)

    with pytest.raises(DecodeError) as refused:
        decode(STEPS[step](EachPrefix(mine)))
    assert "mine is not valid" in str(refused.value)
    assert what in str(refused.value)
    assert "after the token at position 3;" in str(refused.value)


class DeadEnd(GreedyProcessor):
    """A grammar without a way on."""

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -INF)


class Masked(MultinomialProcessor):
    @override
    def _process(self, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -INF)


class Sampler(LogitsProcessor):
    """A user's own."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return logits

    @override
    def sample(self, probs: Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize("processor", [DeadEnd(), Masked(1.0)])
@pytest.mark.parametrize("step", STEPS)
def test_logits_that_are_all_masked_are_refused(processor: LogitsProcessor, step: str) -> None:
    with pytest.raises(
        DecodeError, match=f"the law of {type(processor).__name__} is not valid: received NaN after the token"
    ):
        decode(STEPS[step](processor))


@pytest.mark.parametrize("i", range(TEXT, 4))
def test_a_law_that_is_made_later_names_its_own_place(i: int) -> None:
    scored = Score(target, Masked(1.0))(Drafted(start([1, 2], 8).unwrap(), chain((3, 4, 5, 6))))
    with pytest.raises(DecodeError, match=f"not valid: received NaN after the token at position {2 + i}"):
        scored.law(i)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [[NAN] * V, [0, 1, NAN, 2, 0, 0, 0, 0], [-INF] * V, [0, INF, 0, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("lowest", [-INF, -2.0])
def test_each_row_that_is_not_finite_is_found_among_others(
    bad: list[float], dtype: torch.dtype, sign: float, lowest: float
) -> None:
    good = torch.tensor([[lowest, 1, 2, 0, -3, 0, 1, 0], [lowest, -1, -2, -1, -3, -1, -9, -1]], dtype=dtype)
    row = torch.tensor([bad], dtype=dtype)
    row = torch.where(row.isnan(), row.copysign(torch.tensor(sign, dtype=dtype)), row)
    assert finite(good, 9) is good
    for at in range(3):
        with pytest.raises(DecodeError, match=f"the token at position {6 + at};"):
            finite(torch.cat([good[:at], row, good[at:]]), 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [[NAN] * V, [0, 1, NAN, 2, 0, 0, 0, 0], [0, INF, 0, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("processor", [GreedyProcessor(), MultinomialProcessor(1.0), TopKProcessor(1.0, 3)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_that_are_not_finite_keep_the_error_that_names_the_model(
    processor: LogitsProcessor, bad: list[float], dtype: torch.dtype, sign: float
) -> None:
    row = torch.tensor([bad], dtype=dtype)
    row = torch.where(row.isnan(), row.copysign(torch.tensor(sign, dtype=dtype)), row)
    with pytest.raises(DecodeError, match="model's logits are not finite: received NaN or infinity .* position 1;"):
        decode(autoregressive_step(lambda tokens, drafts: row, processor, Dice()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("processor", [GreedyProcessor(), MultinomialProcessor(1.0), TopKProcessor(1.0, 3)])
def test_where_no_token_has_a_chance_it_is_a_dead_end_and_the_model_may_be_why(
    processor: LogitsProcessor, dtype: torch.dtype
) -> None:
    row = torch.full((1, V), -INF, dtype=dtype)
    with pytest.raises(DeadEndError, match="no token has a chance: received nothing but -∞ .* position 1; .*weights"):
        decode(autoregressive_step(lambda tokens, drafts: row, processor, Dice()))


def test_a_law_is_looked_at_once_however_many_processors_hand_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []

    def look(law: object, vocab_size: int | None = None) -> str | None:
        looks.append(law)
        return flaw(law, vocab_size)

    monkeypatch.setattr(asked, "flaw", look)
    inner = EachPrefix(lambda prefix, logits: Categorical(logits.softmax(-1)))
    outer = LogitBias(RepetitionPenalty(LogitBias(inner, {1: 1.0}), 1.2), {2: 1.0})
    law = laws_of(outer, (1,), torch.zeros(1, V))[0]
    assert isinstance(law, Categorical)
    assert law.by is not None
    assert "lambda" in law.by.name
    assert len(looks) == 1


def test_on_the_host_a_law_of_ours_is_made_when_it_is_asked_for_and_is_the_same() -> None:
    made = []

    class Seen(MultinomialProcessor):
        @override
        def _process(self, logits: Tensor) -> Tensor:
            made.append(len(logits))
            return logits

    processor = Seen(0.7)
    scored = Score(target, processor)(Drafted(start([1, 2], 8).unwrap(), chain((3, 4, 5, 6))))
    scored.law(TEXT), scored.law(0), scored.law(TEXT)
    assert made == [1, 1]
    laws = processor.laws((1, 2, 3, 4, 5, 6), scored.logits)
    for i, expected in zip(range(TEXT, 4), laws, strict=True):
        law = scored.law(i)
        assert isinstance(law, Categorical)
        assert isinstance(expected, Categorical)
        assert torch.equal(law.probs, expected.probs)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        3.0,
        torch.tensor([[V]]),
        torch.tensor([[-1]]),
        torch.tensor([[1.0]]),
        torch.tensor([1, 2]),
        torch.tensor([[True]]),
    ],
)
def test_a_sampler_gives_one_id_of_the_vocabulary(answer: object) -> None:
    with pytest.raises(DecodeError, match="Sampler.sample gives no token of the vocabulary of 8"):
        decode(speculative_step(SuffixDrafter(), target, Sampler(answer), Dice()))


@pytest.mark.parametrize(
    "temperature", [1e-40, 1e-38, 1e-31, 0, -1.0, NAN, INF, 1e31, None, "1", True, torch.tensor(1.0)]
)
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(temperature: Any) -> None:
    for make in (GreedyProcessor, MultinomialProcessor, lambda t: TopKProcessor(t, 3)):
        with pytest.raises(DecodeError, match="temperature is"):
            make(temperature)


def test_a_temperature_near_0_is_greedy() -> None:
    greedy = decode(autoregressive_step(target, GreedyProcessor(), Dice()))
    for temperature in (1e-30, 1e-6, numpy.float64(1e-9)):
        cold = MultinomialProcessor(temperature)
        assert decode(autoregressive_step(target, cold, Dice())) == greedy
        assert decode(seed_coupled_step(SuffixDrafter(), target, cold, SharedNoise(1))) == greedy


def test_half_laws_are_laws_and_draw_nothing_that_is_impossible() -> None:
    """A long row of 16 bits sums to 1 by its rounding only, and its noise must not be of 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        probs = torch.randn(50_000, generator=torch.Generator().manual_seed(1)).softmax(-1)
        probs[::2] = 0
        law = Categorical((probs / probs.sum()).to(dtype))
        dice = Dice(torch.Generator().manual_seed(1))
        for position in range(200):
            assert law.of(dice.draw(law, 0)) > 0
            assert law.of(int(dice.draw_there(law.probs, position))) > 0
        processor = EachPrefix(lambda prefix, logits: law)  # noqa: B023 - used here
        run(
            autoregressive_step(along_paths(lambda tokens: torch.zeros(50_000)), processor, dice),
            start([1], 3).unwrap(),
        )


@pytest.mark.parametrize("rule", [Block, Traverse])
def test_a_block_with_a_mass_that_is_small_is_divided_by_what_is_not_0(rule: type[Block | Traverse]) -> None:
    p2, q2 = Categorical(torch.tensor([0.99999994, 1e-20])), Categorical(torch.tensor([1.0, 5e-21]))
    even = Categorical(torch.tensor([0.5, 0.5]))
    asked: list[float] = []

    class Certain:
        def accept(self, probability: float, /) -> bool:
            asked.append(probability)
            return probability >= 1

        def draw(self, law: Distribution, position: int, /) -> int:
            return 0

        def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
            return torch.tensor(0)

    drafted = Drafted(start([1], 9).unwrap(), (Proposal(0, even), Proposal(0, q2)))
    laws: dict[tuple[int, ...], Laws] = {(TEXT, 0, 1): (even, p2, p2)}
    verdict = rule(Certain())(Scored(drafted, torch.zeros(3, 2), lambda way: laws[way]))
    correction = verdict.correction
    assert verdict.path == (0,)
    assert isinstance(correction, Categorical)
    assert correction.of(1) == 1.0
    assert asked[-1] == 1.0


# Steps, policies, conditions, stages


def test_a_step_that_does_not_go_on_is_refused() -> None:
    state = start([1, 2], 8).unwrap()

    def stands(state: DecodeState) -> DecodeState:
        return state

    def shrinks(state: DecodeState) -> DecodeState:
        return evolve(state, tokens=state.tokens[:-1])

    for step in (stands, shrinks):
        with pytest.raises(DecodeError, match=f"{step.__name__} adds nothing: received a text of"):
            run(step, state)
    lossy: Any = lossy_unadjusted_step(propose_nothing, target, GreedyProcessor(), Dice())
    with pytest.raises(DecodeError, match="returns no state: .* accept_loss"):
        run(lossy, state)
    nothing: Any = lambda state: None  # noqa: E731
    with pytest.raises(DecodeError, match="returns no state: received None"):
        next(unfold(nothing, state))
    with pytest.raises(DecodeError, match="adds nothing"):
        certify(lambda world: stands)


@pytest.mark.parametrize("answer", [None, (), 3, ((), 1), (Proposal(1),)])
def test_a_policy_returns_proposals_and_a_pace(answer: Any) -> None:
    def policy(stream: object, state: DecodeState) -> Any:
        return answer

    with pytest.raises(DecodeError, match="policy returns no proposals and pace"):
        decode(speculative_step(SuffixDrafter(), target, GreedyProcessor(), Dice(), policy))


@pytest.mark.parametrize(
    ("taken", "sentence"),
    [
        ((3,), "gamma is not a Proposal: received 3"),
        ((Proposal(4, parent=1),), "draft 0 of the source 'draft' does not come after its parent"),
    ],
)
def test_what_a_policy_takes_are_proposals_of_the_stream(taken: Any, sentence: str) -> None:
    with pytest.raises(DecodeError, match=sentence):
        decode(speculative_step(SuffixDrafter(), target, GreedyProcessor(), Dice(), lambda stream, state: (taken, ())))


@pytest.mark.parametrize("answer", [None, "no", 0, torch.tensor(True)])
def test_a_condition_says_true_or_false(answer: Any) -> None:
    with pytest.raises(DecodeError, match="does not say whether the text is over"):
        decode(autoregressive_step(target, GreedyProcessor(), Dice(), until=lambda state: answer))
    over: Any = lambda state: numpy.True_  # noqa: E731
    assert len(decode(autoregressive_step(target, GreedyProcessor(), Dice(), until=over))) == 1


def test_what_draws_gives_an_id() -> None:
    @final
    @frozen
    class Argmax:
        def draw(self, law: Distribution, position: int, /) -> Any:
            assert isinstance(law, Categorical)
            return law.probs.argmax()

        def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
            return probs.argmax()

    with pytest.raises(DecodeError, match="Argmax draws what is not a token id: received tensor"):
        decode(autoregressive_step(target, MultinomialProcessor(1.0), Argmax()))


def test_a_stage_of_another_kind_is_refused() -> None:
    state = start([1, 2], 8).unwrap()
    for stage in (
        Draft(propose_nothing),
        draft_nothing,
        Score(target, GreedyProcessor()),
        Judge(Reject(Dice())),
        LossyJudge(LossyTypical(Dice())),
        Verify(target, GreedyProcessor(), Reject(Dice())),
        Adjust(Dice()),
        LossySkipAdjustment(Dice()),
        StopWhen(lambda state: True),
        PruneCache(()),
        UpdateNgram(NGramStorage(2, V)),
        ending(),
        ending(lambda state: True),
        commit,
        advance,
    ):
        unfit: Any = stage
        takes_states = stage in (Draft(propose_nothing), draft_nothing)
        for other in (None, 3, object()) if takes_states else (None, 3, object(), state):
            with pytest.raises(DecodeError):
                unfit(other)
    wrong: Any = Verified(Score(target, GreedyProcessor())(draft_nothing(state)), (), None)
    nothing: Any = lambda state: flow(wrong, Adjust(Dice()), commit, advance)  # noqa: E731
    with pytest.raises(DecodeError, match="adds nothing"):
        run(nothing, state)


VERDICTS: dict[str, tuple[object, str]] = {
    "nothing": (None, "mine says nothing of which drafts stand: received None"),
    "a path alone": ((0,), "mine says nothing of which drafts stand: received (0,)"),
    "how many": (Verdict(1), "mine says nothing of which drafts stand: received Verdict(path=1"),  # type: ignore[arg-type]
    "a draft that is not there": (Verdict((7,)), "mine says nothing of which drafts stand: received Verdict(path=(7,)"),
    "what is no path": (Verdict((1,)), "mine says nothing of which drafts stand: received Verdict(path=(1,)"),
    "two branches": (Verdict((0, 2)), "mine says nothing of which drafts stand: received Verdict(path=(0, 2)"),
    "a token": (Verdict((0,), 3), "mine is not a law: received 3"),  # type: ignore[arg-type]
    "a lossy one": (Lossy(Verdict(())), "mine says nothing of which drafts stand: received Lossy("),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_rule_says_which_drafts_stand(name: str) -> None:
    verdict, sentence = VERDICTS[name]

    def mine(scored: Scored) -> Any:
        return verdict

    tree = says(Proposal(3), Proposal(4), Proposal(5, parent=TEXT))
    scored = start([1, 2], 8).unwrap().then(Draft(tree)).then(Score(target, GreedyProcessor()))
    with pytest.raises(DecodeError, match=r"the rule .*mine|of the rule .*mine") as refused:
        scored.then(Judge(mine))
    assert sentence in str(refused.value)


def test_a_lossy_rule_says_that_it_is() -> None:
    scored = start([1, 2], 8).unwrap().then(Draft(says(Proposal(3)))).then(Score(target, GreedyProcessor()))
    lossless: Any = Match(Dice())
    with pytest.raises(DecodeError, match=r"the rule Match is not lossy: .*; use Judge\(rule\)"):
        scored.then(LossyJudge(lossless))
    nonsense: Any = lambda scored: Lossy(None)  # noqa: E731
    with pytest.raises(DecodeError, match="says nothing of which drafts stand: received None"):
        scored.then(LossyJudge(nonsense))


# Composing


WRONG: Final[list[Any]] = [None, 3, 2.5, "text", torch.zeros(2), LogitsProcessorList(), [1], object()]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__)
def test_parts_that_cannot_be_are_refused_when_they_are_put_together(wrong: Any) -> None:
    greedy, dice = GreedyProcessor(), Dice()
    parts = (propose_nothing, target, greedy, dice, Fixed())
    for make in (speculative_step, seed_coupled_step, lossy_unadjusted_step):
        for i in range(5):
            given: list[Any] = list(parts)
            given[i] = wrong
            with pytest.raises(DecodeError):
                make(*given)
        for name in ("prune", "observe", "until"):
            if name != "prune" or not isinstance(wrong, list):
                with pytest.raises(DecodeError):
                    make(propose_nothing, target, greedy, dice, **{name: wrong})
    for i in range(3):
        given = [target, greedy, dice]
        given[i] = wrong
        with pytest.raises(DecodeError):
            autoregressive_step(*given)
    step: Any = advance
    for first, then in ((wrong, step), (step, wrong)):
        with pytest.raises(DecodeError):
            once(first, then)
    singles: list[Any] = [accept_loss, path_by_path, along_paths, StopWhen, Adjust, Draft, Judge, Reject, Match, Block]
    singles += [LossySkipAdjustment, LossyJudge, LossyTypical, Traverse, ending]
    for single in singles:
        with pytest.raises(DecodeError):
            single(wrong)
    for i in range(3):
        given = [target, greedy, dice]
        given[i] = wrong
        with pytest.raises(DecodeError):
            LLMDrafter(*given)
    with pytest.raises(DecodeError):
        run(wrong, start([1], 3).unwrap())
    with pytest.raises(DecodeError):
        run(autoregressive_step(target, greedy, dice), wrong)
    with pytest.raises(DecodeError):
        stop_string(wrong, "a")
    assert isinstance(shared_vocabulary(wrong, Limits()).failure(), DecodeError)
    if type(wrong) is not int:
        with pytest.raises(DecodeError):
            SharedNoise(wrong)
    if wrong is not None:
        with pytest.raises(DecodeError):
            Dice(wrong)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__)
def test_what_scores_and_judges_is_refused_when_it_is_put_together(wrong: Any) -> None:
    makers: list[tuple[Any, list[object]]] = [
        (verified_step, [propose_nothing, target, GreedyProcessor(), Dice(), Reject(Dice()), Fixed()]),
        (Verify, [target, GreedyProcessor(), Reject(Dice())]),
        (Score, [target, GreedyProcessor()]),
    ]
    for make, parts in makers:
        for i in range(len(parts)):
            with pytest.raises(DecodeError):
                make(*parts[:i], wrong, *parts[i + 1 :])


def test_the_remedy_for_a_list_of_transformers_is_said() -> None:
    with pytest.raises(DecodeError, match=r"interop\.ProcessorList"):
        autoregressive_step(target, LogitsProcessorList(), Dice())  # type: ignore[arg-type]


GIVEN: list[tuple[Any, Tokens]] = [
    ([1, 2], (1, 2)),
    ((numpy.int64(1), numpy.int32(2)), (1, 2)),
    (torch.tensor([1, 2]), (1, 2)),
    (torch.tensor([1, 2], dtype=torch.uint8), (1, 2)),
    (numpy.array([1, 2]), (1, 2)),
    (range(1, 3), (1, 2)),
]


@pytest.mark.parametrize(("given", "tokens"), GIVEN, ids=[str(given) for given, _ in GIVEN])
def test_ids_are_ids_in_whatever_row_they_come(given: Any, tokens: Tokens) -> None:
    three: Any = numpy.int64(3)
    state = start(given, three, given, Limits(V)).unwrap()
    assert (state.tokens, state.request.stop, state.room) == (tokens, frozenset(tokens), 3)
    assert {type(token) for token in (*state.tokens, *state.request.stop, state.request.limit)} == {int}
    assert state.request.vocab_size == V


@pytest.mark.parametrize(
    "ids",
    [None, 3, "12", b"12", [1.0], [True], [None], ["1"], [-1], [2**63], [[1, 2]], torch.tensor(1),
     torch.tensor([[1, 2]]), torch.tensor([1.0]), torch.tensor([True]),
     torch.zeros(2, dtype=torch.int64, device="meta"), [torch.tensor(1)],
     numpy.array([[1]]), numpy.array([1.5]), {1: 2}, [numpy.int64(-1)], [10**400]],
    ids=lambda value: f"{value!r}"[:40],
)  # fmt: skip
def test_what_is_no_row_of_ids_is_refused(ids: Any) -> None:
    assert isinstance(start(ids, 3).failure(), DecodeError)
    assert isinstance(start([1], 3, ids).failure(), DecodeError)


@pytest.mark.parametrize("number", [None, 2.0, "3", -1, True, torch.tensor(3), NAN, numpy.float64(3)])
def test_the_number_of_new_tokens_is_a_whole_number(number: Any) -> None:
    assert "the number of new tokens is" in str(start([1], number).failure())


@pytest.mark.parametrize("limits", [None, 3, Limits(0), Limits(2.5), Limits(None, -1), Limits("8")])  # type: ignore[arg-type]
def test_limits_are_whole_numbers(limits: Any) -> None:
    assert isinstance(start([1], 3, limits=limits).failure(), DecodeError)


# Under the certificate


def test_under_the_certificate_what_is_wrong_names_the_part_and_the_position() -> None:
    def dead(prefix: Tokens, logits: Tensor) -> Distribution:
        return Categorical(logits.softmax(-1) if len(prefix) < 3 else torch.zeros_like(logits))

    def drafting(world: World) -> Step:
        return speculative_step(says(Proposal(0)), world.target, world.processor, world.rng)

    lost = [evolve(case, processor=lambda rng: EachPrefix(dead)) for case in CASES[:1]]
    with pytest.raises(DecodeError, match="the law of .*dead is not valid: .* sum to 0 after the token at position 2"):
        certify(drafting, cases=lost)

    def own_stage(world: World) -> Step:
        draft, verify = Draft(propose_nothing), Verify(world.target, world.processor, Reject(world.rng))

        def spoils(verified: Verified) -> Verified:
            return evolve(verified, correction=Categorical(torch.full((2,), NAN)))

        return lambda state: flow(state, draft, verify, spoils, Adjust(world.rng), commit, advance)

    with pytest.raises(DecodeError, match="a law is not valid: received NaN after the token at position 0"):
        certify(own_stage, cases=CASES[:1])
