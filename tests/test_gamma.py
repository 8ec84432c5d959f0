"""Gamma policies: what they take, what it costs, and that none of them changes the text's law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import count
from math import exp, floor, inf, isfinite, log, nan
from pickle import dumps, loads
from random import Random
from typing import Any

import numpy
import pytest
import torch
from attrs import define, evolve
from torch import Tensor
from torch.nn import Module

from specflow import (
    TEXT,
    Categorical,
    CostAware,
    CostMeter,
    DecodeError,
    DecodeState,
    Dice,
    Drafter,
    Fixed,
    GammaPolicy,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    MultinomialProcessor,
    PointMass,
    Predictor,
    Processor,
    Proposal,
    SharedNoise,
    Step,
    Tokens,
    TopKProcessor,
    along_paths,
    autoregressive_step,
    run,
    seed_coupled_step,
    speculative_generate,
    speculative_step,
    start,
)
from specflow.distribution import BlackBox, Distribution
from specflow.policies import EGAG, SVIP, AdaEDL, Heuristic, StopAfter, Unsure, drafter_law
from specflow.policies.chances import ChancesPace
from specflow.policies.cost import CostAwarePace
from specflow.policies.egag import EGAGPace
from specflow.policies.fixed import HeuristicPace
from specflow.predictors import UncachedPredictor
from specflow.randomness import Sampling
from specflow.state import Committed, Count, Pace, Request, Tally
from specflow.testing import Case, ExactnessError, HiddenProcessor, World, certify
from tests.toys import Unrunnable, disturbed, oracle, tiny_llama

STATE = DecodeState(Request((1,), 100), (1,))


def proposals(*logits: list[float]) -> Iterator[Proposal]:
    """A greedy drafter's stream: each proposal is the argmax of its logits."""
    for row in logits:
        scores = torch.tensor(row)
        token = int(scores.argmax())
        yield Proposal(token, PointMass(token), logits=scores)


def taken(policy: GammaPolicy, stream: Iterator[Proposal], state: DecodeState = STATE) -> int:
    return len(policy(stream, state)[0])


def with_entropy(fraction: float, vocab_size: int = 64) -> list[float]:
    """Logits whose law has `fraction` of the greatest entropy, found by bisection on one logit."""
    low, high = 0.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        rest = exp(-middle)
        total = 1 + (vocab_size - 1) * rest
        p, r = 1 / total, rest / total
        entropy = -p * log(p) - (vocab_size - 1) * r * log(r)
        low, high = (middle, high) if entropy > fraction * log(vocab_size) else (low, middle)
    return [low] + [0.0] * (vocab_size - 1)


@pytest.mark.parametrize("fraction", [0.03, 0.17, 0.33, 0.52, 0.71, 0.9, 0.97])
@pytest.mark.parametrize(("least", "most"), [(1, 5), (2, 9), (3, 3)])
def test_egag_is_its_formula(fraction: float, least: int, most: int) -> None:
    stream = proposals(*[with_entropy(fraction)] * 20)
    assert taken(EGAG(least, most), stream) == min(max(floor((1 - fraction) * most), least), most)


def test_egag_at_the_ends_of_the_scale() -> None:
    assert taken(EGAG(2, 7), proposals(*[[0.0] * 64] * 20)) == 2
    assert taken(EGAG(2, 7), (Proposal(3) for _ in range(20))) == 7, "a proposal without logits is certain"
    assert EGAG(2, 7)(iter(()), STATE) == ((), ()), "a drafter with nothing to say leaves the pace"


def test_egag_reads_the_law_before_top_k_and_at_the_processors_temperature() -> None:
    flat = torch.zeros(64)
    narrow = TopKProcessor(1.0, 1).laws((1,), flat[None])[0]
    assert taken(EGAG(1, 8), (Proposal(0, narrow, logits=flat) for _ in range(20))) == 1, (
        "q is certain, the model is not"
    )
    rows = [with_entropy(0.5)] * 20
    assert taken(EGAG(1, 8, temperature=0.05), proposals(*rows)) == 8
    assert taken(EGAG(1, 8, temperature=1.0), proposals(*rows)) == 4
    assert taken(EGAG(1, 8, temperature=50.0), proposals(*rows)) == 1


def test_egag_smooths_gamma_and_carries_it_in_the_pace() -> None:
    policy, state, seen = EGAG(1, 9, ema_beta=0.5), STATE, []
    for fraction in (0.05, 0.95, 0.95, 0.05):  # γ = 8, 1, 1, 8
        took, pace = policy(proposals(*[with_entropy(fraction)] * 20), state)
        state = evolve(state, pace=pace)
        seen.append((len(took), pace))
    assert seen == [(8, (8.0,)), (4, (4.5,)), (3, (2.75,)), (5, (5.375,))], "4.5 rounds to the even 4"


@pytest.mark.parametrize("beta", [numpy.float16(0.5), numpy.float32(0.5), Fraction(1, 2)])
def test_egag_smooths_by_a_number_of_any_kind(beta: float) -> None:
    states = [STATE, STATE]
    for fraction in (0.05, 0.95, 0.95, 0.05):
        for i, each in enumerate((0.5, beta)):
            _, pace = EGAG(1, 9, ema_beta=each)(proposals(*[with_entropy(fraction)] * 20), states[i])
            states[i] = evolve(states[i], pace=pace)
        assert states[0].pace == states[1].pace
        assert [*map(type, states[1].pace)] == [float]


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"gamma_min": 0}, "gamma_min"),
        ({"gamma_min": 3, "gamma_max": 2}, "gamma_max"),
        ({"gamma_min": 6}, "gamma_max"),
        ({"egag_ema_beta": 1.0}, "egag_ema_beta"),
        ({"egag_ema_beta": -0.1}, "egag_ema_beta"),
        ({"egag_ema_beta": float("nan")}, "egag_ema_beta"),
    ],
)
def test_bad_egag_parameters_are_refused_before_a_model_runs(arguments: dict[str, float], parameter: str) -> None:
    model = Unrunnable(tiny_llama(0))
    with pytest.raises(DecodeError) as refusal:
        speculative_generate([1, 2], model, model, use_egag=True, **arguments)  # type: ignore[arg-type]
    assert refusal.value.parameter == parameter


@define
class Counted:
    """A predictor that counts its passes."""

    predictor: Predictor
    passes: int = 0

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        self.passes += 1
        return self.predictor(tokens, drafts)


POLICIES: dict[str, GammaPolicy] = {
    "fixed": Fixed(3),
    "egag": EGAG(1, 9),
    "smooth egag": EGAG(1, 9, ema_beta=0.6, temperature=0.7),
    "heuristic": Heuristic(2, 7),
    "unsure": StopAfter(Unsure(0.3)),
    "svip": StopAfter(SVIP()),
    "adaedl": StopAfter(AdaEDL(0.3), Fixed(6)),
    "two stops in egag": StopAfter(SVIP(0.5), StopAfter(Unsure(0.2), EGAG(2, 9))),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_each_draft_costs_one_drafter_pass_and_none_is_repeated(policy: GammaPolicy) -> None:
    target = tiny_llama(0)
    drafter = Counted(UncachedPredictor(disturbed(target, 1, 0.2)))
    processor, rng = GreedyProcessor(), Dice()
    step = speculative_step(
        LLMDrafter(drafter, processor, rng),
        UncachedPredictor(target),
        processor,
        rng,
        policy,
        observe=lambda step: drafts.append(len(step.adjusted.verified.drafted.proposals)),
    )
    drafts: list[int] = []
    end = run(step, DecodeState(Request((1, 2, 3), 43), (1, 2, 3)))
    assert drafter.passes == sum(drafts) > 0
    assert list(end.state.output) == oracle((1, 2, 3), target, 40)


def test_the_policies_differ() -> None:
    """Were they all one, the tests that cross them would say little."""
    rows = [with_entropy(fraction) for fraction in (0.05, 0.1, 0.2, 0.4, 0.3, 0.6, 0.8, 0.9, 0.9, 0.9)]
    assert {name: taken(policy, proposals(*rows)) for name, policy in POLICIES.items()} == {
        "fixed": 3,
        "egag": 8,
        "smooth egag": 8,
        "heuristic": 2,
        "unsure": 8,
        "svip": 3,
        "adaedl": 6,
        "two stops in egag": 6,
    }


@pytest.mark.parametrize(
    "stop", [Unsure(0.4), SVIP(), AdaEDL(0.4), lambda proposal: proposal.logits is not None and proposal.logits[0] < 1]
)
def test_a_stop_keeps_the_token_that_triggers_it(stop: Callable[[Proposal], bool]) -> None:
    sure, unsure = [20.0, 0, 0, 0, 0, 0, 0, 0], [0.0] * 8
    assert taken(StopAfter(stop), proposals(sure, sure, unsure, sure)) == 3
    assert taken(StopAfter(stop, Fixed(2)), proposals(sure, sure, unsure, sure)) == 2
    assert taken(StopAfter(stop), proposals(unsure, unsure)) == 1


def test_the_stops_are_their_formulas() -> None:
    h = torch.tensor([1.0, 0.2, 0.0, -1.0])
    proposal = Proposal(1, PointMass(1), logits=h)
    probs = h.softmax(-1)
    entropy = -float((probs * probs.log()).sum())
    for margin, verdict in ((1e-4, True), (-1e-4, False)):
        assert Unsure(float(probs[1]) + margin)(proposal) is verdict
        assert SVIP((0.15 * entropy) ** 0.5 - margin)(proposal) is verdict
        assert AdaEDL(1 - (0.2 * entropy) ** 0.5 + margin)(proposal) is verdict
    cold = (h / 0.5).softmax(-1)
    assert not Unsure(float(cold[1]) - 1e-4, temperature=0.5)(proposal)
    assert Unsure(float(cold[1]) + 1e-4, temperature=0.5)(proposal)


def test_the_drafters_law_where_there_are_no_logits_is_q() -> None:
    law = Categorical(torch.tensor([0.2, 0.8]))
    assert drafter_law(Proposal(1, law)) is law
    hidden = drafter_law(Proposal(1, BlackBox(law.probs, lambda probs: probs.argmax(-1, keepdim=True))))
    assert isinstance(hidden, Categorical)
    assert hidden.probs is law.probs
    assert drafter_law(Proposal(3)) == PointMass(3)
    half = drafter_law(Proposal(1, law, logits=torch.zeros(2, dtype=torch.bfloat16)))
    assert isinstance(half, Categorical)
    assert half.probs.dtype == torch.float32


def test_the_heuristic_grows_after_success_and_shrinks_after_failure() -> None:
    policy, state, gammas = Heuristic(3, gamma_max=6), STATE, []
    outcomes = [Count(3, 3), Count(5, 5), Count(6, 6), Count(6, 2), Count(), Count(5, 0), *[Count(1, 0)] * 5]
    for outcome in outcomes:
        took, pace = policy((Proposal(3) for _ in range(99)), state)
        gammas.append(len(took))
        state = evolve(state, pace=pace, tally=state.tally + Tally(1, (("llm", outcome),)))
    assert gammas == [3, 5, 6, 6, 5, 5, 4, 3, 2, 1, 1]


def test_the_heuristic_judges_what_it_drafted_itself() -> None:
    busy = evolve(STATE, tally=Tally(9, (("llm", Count(50, 1)),)))
    assert taken(Heuristic(4), certain(), busy) == 4, "what another policy drafted does not count"


def certain() -> Iterator[Proposal]:
    return (Proposal(3) for _ in range(99))


def all_policies() -> dict[str, GammaPolicy]:
    """All of them, on a clock that stands still."""
    meter = CostMeter(lambda: 0.0)
    for k in (1, 1, 2, 6):
        meter.note(k, 1.0)
    of_trees = [CostAware(meter, 6), CostAware(meter, 6)]
    for policy in of_trees:
        heard = evolve(STATE, tokens=(*STATE.tokens, 2))  # and timed, once the prompt was read
        assert isinstance(policy(iter([Proposal(3, chance=0.5)]), heard)[1], ChancesPace)
    return {
        **POLICIES,
        "cost": CostAware(meter, 6),
        "another cost": CostAware(meter, 6),
        "cost of trees": of_trees[0],
        "another cost of trees": of_trees[1],
    }


def foreign_paces() -> dict[str, Pace]:
    """What a state may carry that goes on under another policy: what every policy leaves, and garbage."""
    text = evolve(STATE, tally=Tally(3, (("llm", Count(9, 8)),)))
    left = {name: policy(certain(), text)[1] for name, policy in all_policies().items()}
    garbage: list[Any] = [
        (),
        (2.0,),
        (3.0, 1.0, 0.0),
        (9, 9, 9, 9),
        (0.0,) * 7,
        (0,) * 8,
        (nan,),
        (inf, 1, 1),
        ("a", None, ()),
    ]
    return {**left, **{repr(pace): pace for pace in garbage}}


@pytest.mark.parametrize("name", foreign_paces())
def test_a_pace_of_another_policy_is_a_fresh_start(name: str) -> None:
    text = evolve(STATE, tokens=(1, 2, 3), tally=Tally(3, (("llm", Count(9, 8)),)))
    pace = foreign_paces()[name]  # of policies that are gone: no number of theirs is a number of these
    for policy in all_policies().values():
        if isinstance(pace, CostAwarePace | ChancesPace) or type(pace) is not type(policy(certain(), text)[1]):
            fresh = policy(certain(), evolve(text, pace=()))
            took, after = policy(certain(), evolve(text, pace=pace))
            assert [draft.token for draft in took] == [draft.token for draft in fresh[0]]
            assert unnumbered(after) == unnumbered(fresh[1] or pace), "what carries nothing passes a pace on"


def unnumbered(pace: Pace) -> Pace:
    return pace._replace(step=0) if isinstance(pace, CostAwarePace) else pace


def test_the_pace_of_a_policy_is_its_own_whatever_wraps_it() -> None:
    inside, around = EGAG(1, 9, ema_beta=0.9), StopAfter(SVIP(), EGAG(1, 9, ema_beta=0.9))
    low = proposals(*[with_entropy(0.95)] * 20)
    _, pace = inside(low, STATE)
    assert pace == EGAGPace(1.0)
    assert taken(around, certain(), evolve(STATE, pace=pace)) == 2
    assert around(certain(), evolve(STATE, pace=pace))[1] == inside(certain(), evolve(STATE, pace=pace))[1]


@pytest.mark.parametrize("mean", [40.0, -3.0, 10**400, -(10**400)])
def test_a_mean_of_other_bounds_stays_within_these(mean: float) -> None:
    took, pace = EGAG(2, 4, ema_beta=0.99)(certain(), evolve(STATE, pace=EGAGPace(mean)))
    assert 2 <= len(took) <= 4
    assert 2 <= pace[0] <= 4


@pytest.mark.parametrize(
    "pace",
    [
        HeuristicPace(40, 5, 9, 8),  # a gamma of other bounds
        HeuristicPace(-5, 5, 9, 8),
        HeuristicPace(3, 3, 100, 8),  # tallies of other texts
        HeuristicPace(3, 3, 0, 100),
        HeuristicPace(3, 3, 8, 2),
        HeuristicPace(10**400, 5, 9, 8),
        HeuristicPace(nan, 5, 9, 8),
        HeuristicPace(3, nan, 9, 8),
        HeuristicPace(3, inf, 9, 8),
        HeuristicPace(3, 10**400, 9, 8),
        HeuristicPace(3, -7, 9, 8),
        HeuristicPace("a", None, (), 5),  # type: ignore[arg-type]
        EGAGPace(nan),
        EGAGPace(inf),
        EGAGPace("a"),  # type: ignore[arg-type]
    ],
)
def test_no_number_in_a_pace_takes_a_policy_out_of_its_bounds(pace: Pace) -> None:
    state = evolve(STATE, pace=pace, tally=Tally(3, (("llm", Count(9, 8)),)))
    for policy in (EGAG(2, 4, ema_beta=0.9), Heuristic(3, 4)):
        took, after = policy(certain(), state)
        assert 1 <= len(took) <= 4
        assert all(isfinite(number) for number in after)


def test_a_tally_of_another_text_is_a_fresh_start() -> None:
    state = evolve(STATE, pace=HeuristicPace(1, 1, 100, 8), tally=Tally(3, (("llm", Count(9, 8)),)))
    assert taken(Heuristic(3, 9), certain(), state) == 3


@pytest.mark.parametrize("policy", all_policies().values(), ids=all_policies())
def test_states_are_values_whatever_the_policy(policy: GammaPolicy) -> None:
    state = evolve(STATE, pace=policy(certain(), STATE)[1])
    again = loads(dumps(state))
    assert again == state
    assert hash(again) == hash(state)
    assert type(again.pace) is type(state.pace)
    name = "Chances" if isinstance(state.pace, ChancesPace) else policy.__class__.__name__
    assert f"{name}Pace(" in repr(state) or isinstance(policy, Fixed | StopAfter)


WRONG = (None, True, 0.5, "a", 0, -1, 2**31, nan, inf, torch.tensor(3), numpy.array([2]))


@pytest.mark.parametrize("make", [Fixed, Heuristic, lambda most: EGAG(1, most), lambda least: EGAG(least, 9)])
def test_gammas_are_whole_numbers_of_one_or_more(make: Callable[[object], GammaPolicy]) -> None:
    for wrong in WRONG:
        with pytest.raises(DecodeError, match="gamma"):
            make(wrong)
    assert 1 <= taken(make(numpy.int64(3)), certain()) <= 9


@pytest.mark.parametrize(
    "make",
    [
        Unsure,
        SVIP,
        AdaEDL,
        lambda value: SVIP(c=value),
        lambda value: EGAG(ema_beta=value),
        StopAfter,
        lambda value: StopAfter(SVIP(), value),
    ],
)
@pytest.mark.parametrize("wrong", [None, True, "a", nan, inf, -inf, 10**400, torch.tensor(0.5), Unsure])
def test_thresholds_and_parts_are_checked(make: Callable[[object], object], wrong: object) -> None:
    with pytest.raises(DecodeError, match="received"):
        make(wrong)


LOOKING: list[GammaPolicy] = [EGAG(), StopAfter(SVIP()), StopAfter(AdaEDL()), StopAfter(Unsure())]

LAWLESS: dict[str, Proposal] = {
    "NaN logits": Proposal(0, PointMass(0), logits=torch.tensor([nan, 1.0])),
    "infinite logits": Proposal(0, PointMass(0), logits=torch.tensor([inf, 1.0])),
    "no mass": Proposal(0, PointMass(0), logits=torch.tensor([-inf, -inf])),
    "NaN in q": Proposal(0, Categorical(torch.tensor([nan, 0.5]))),
    "NaN in a hidden q": Proposal(0, BlackBox(torch.tensor([nan, 0.5]), lambda probs: probs)),
    "two rows": Proposal(0, PointMass(0), logits=torch.zeros(2, 3)),
    "no column": Proposal(0, PointMass(0), logits=torch.zeros(0)),
    "no tensor": Proposal(0, PointMass(0), logits=[1.0, 2.0]),  # type: ignore[arg-type]
    "a meta tensor": Proposal(0, PointMass(0), logits=torch.zeros(3, device="meta")),
    "complex logits": Proposal(0, PointMass(0), logits=torch.zeros(3, dtype=torch.complex64)),
    "no law": Proposal(0, 0.5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("proposal", LAWLESS.values(), ids=LAWLESS)
def test_a_drafter_without_a_law_is_refused(proposal: Proposal) -> None:
    for policy in LOOKING:
        with pytest.raises(DecodeError, match=r"law|logits"):
            policy(iter([proposal, proposal]), STATE)


@pytest.mark.parametrize("token", [2, -1, None, 0.5])
def test_a_draft_outside_its_own_logits_is_refused(token: int) -> None:
    with pytest.raises(DecodeError, match="token is"):
        Unsure()(Proposal(token, PointMass(token), logits=torch.zeros(2)))


def test_a_vocabulary_of_one_is_certain() -> None:
    one = [Proposal(0, PointMass(0), logits=torch.zeros(1))] * 9
    for policy in LOOKING:
        most = 5 if isinstance(policy, EGAG) else 9
        assert taken(policy, iter(one)) == most


@pytest.mark.parametrize(("temperature", "certainty"), [(1e-30, 1.0), (1e30, 0.25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_the_coldest_and_the_hottest_drafters(temperature: float, certainty: float, dtype: torch.dtype) -> None:
    proposal = Proposal(2, PointMass(2), logits=torch.tensor([0, 1, 10**12, 2], dtype=dtype))
    assert drafter_law(proposal, temperature).of(2) == pytest.approx(certainty)
    for stop in (SVIP, AdaEDL, Unsure):
        assert stop(temperature=temperature)(proposal) is (certainty < 0.3 and stop is not AdaEDL)


@pytest.mark.parametrize("verdict", [torch.tensor([True, False]), numpy.array([1, 2])])
def test_a_stop_that_tells_neither_true_nor_false_is_refused(verdict: bool) -> None:
    with pytest.raises(DecodeError, match="neither true nor false"):
        StopAfter(lambda proposal: verdict)(certain(), STATE)


@pytest.mark.parametrize(("gamma", "most"), [(0, 4), (5, 4)])
def test_a_heuristic_without_a_range_is_refused(gamma: int, most: int) -> None:
    with pytest.raises(DecodeError, match="gamma"):
        Heuristic(gamma, most)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("make", [Unsure, SVIP, AdaEDL, EGAG])
def test_a_temperature_that_is_none_is_refused(make: Callable[..., object], temperature: float) -> None:
    with pytest.raises(DecodeError, match="temperature"):
        make(temperature=temperature)


# Exactness, on every branch of small models.


def drafting(policy: GammaPolicy) -> Callable[[World], Step]:
    return lambda world: speculative_step(
        LLMDrafter(world.drafter, world.processor, world.rng), world.target, world.processor, world.rng, policy
    )


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_policy_changes_the_law(policy: GammaPolicy) -> None:
    assert certify(drafting(policy)).accepted > 0.2


def test_the_cost_aware_policy_does_not_change_the_law_either() -> None:
    """On a clock that ticks once a look, so that each branch can be run again."""

    def cost_aware(world: World) -> Step:
        meter = CostMeter(partial(next, count(0.0)))
        drafter = LLMDrafter(world.drafter, world.processor, world.rng)
        target, policy = meter.timed(world.target), CostAware(meter, most=2)
        return speculative_step(drafter, target, world.processor, world.rng, policy)

    assert certify(cost_aware).accepted > 0.2


def test_a_policy_that_picks_its_tokens_changes_the_law() -> None:
    """The rule that every policy keeps is needed, and the test above would see it broken."""

    def only_ones(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
        first = next(stream, None)
        return (() if first is None or first.token != 1 else (first,)), state.pace

    with pytest.raises(ExactnessError):
        certify(drafting(only_ones))


# Trees: the same policies pace them.

SMALL = (
    Case(2, (0,), 3, seed=15),
    Case(3, (2,), 2, seed=1),
    Case(3, (0, 1), 3, frozenset({2}), seed=2),
    Case(3, (2, 0), 3, processor=lambda rng: TopKProcessor(0.8, 2), seed=6),
    Case(2, (1, 1), 3, processor=HiddenProcessor, seed=12),
    Case(3, (0, 1), 4, processor=lambda rng: GreedyProcessor(), seed=13),
)
"""Small enough for trees, which have many branches. Paths of two drafts fit, but in the second."""

PACED: dict[str, Callable[[], tuple[GammaPolicy, Callable[[Predictor], Predictor]]]] = {
    **{name: partial(lambda policy: (policy, lambda target: target), policy) for name, policy in POLICIES.items()},
    "cost": lambda: jumping(1),
    "another cost": lambda: jumping(2),
}
"""Each policy, and what has to be done to the target for it."""


def jumping(seed: int) -> tuple[GammaPolicy, Callable[[Predictor], Predictor]]:
    """A cost-aware policy on a machine so unsteady that it takes now few, now many drafts."""
    random, now = Random(seed), [0.0]
    meter = CostMeter(lambda: now[0])
    for k in (1, 1, 2, 3, 4, 9):
        meter.note(k, 1.0)

    def timed(target: Predictor) -> Predictor:
        def unsteady(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
            now[0] += random.uniform(0.5, 1.5)
            return target(tokens, drafts)

        return meter.timed(unsteady)

    return CostAware(meter, 9), timed


def forked(drafter: Predictor, processor: Processor, rng: Sampling) -> LLMDrafter:
    return LLMDrafter(drafter, processor, rng, widths=(2, 2))


def without_chances(drafter: Drafter) -> Drafter:
    return lambda tokens: (evolve(draft, chance=None) for draft in drafter(tokens))


@pytest.mark.parametrize("paced", PACED.values(), ids=PACED)
def test_no_policy_changes_the_law_of_a_tree(paced: Callable[[], tuple[GammaPolicy, Callable[..., Predictor]]]) -> None:
    """On every branch, with drawn siblings: how far a draft goes is decided before it is drawn."""

    def compose(world: World) -> Step:
        policy, timed = paced()
        drafter = forked(world.drafter, world.processor, world.rng)
        return speculative_step(drafter, timed(world.target), world.processor, world.rng, policy)

    assert certify(compose, cases=SMALL).accepted > 0.2


def test_a_policy_that_picks_its_siblings_changes_the_law() -> None:
    """The rule that every policy keeps is needed in trees too, and the test above would see it broken."""

    def no_sibling_one(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], Pace]:
        first, second = next(stream, None), next(stream, None)
        if first is None or second is None or second.token == 1:
            return () if first is None else (first,), state.pace
        return (first, second), state.pace

    def compose(world: World) -> Step:
        drafter = forked(world.drafter, world.processor, world.rng)
        return speculative_step(drafter, world.target, world.processor, world.rng, no_sibling_one)

    with pytest.raises(ExactnessError):
        certify(compose, cases=SMALL)


ROWS = 3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(38), dtype=torch.float64)
NEAR = ROWS + torch.randn(6, 6, generator=torch.Generator().manual_seed(1038), dtype=torch.float64)
PROMPT = (1, 2, 3, 1, 2, 5, 1, 2)


def by_last(rows: Tensor) -> Predictor:
    """A model that looks at the last token alone, so that its texts repeat themselves: greedily 4, 5, 0, 3, 4, …"""
    return along_paths(lambda tokens: rows[tokens[-1]])


GREEDY = GreedyProcessor()
TREES: dict[str, Callable[[Sampling], Drafter]] = {
    "lookup": lambda rng: LookupTree(),
    "lookup that tells no chance": lambda rng: without_chances(LookupTree()),
    "greedy model": lambda rng: forked(by_last(NEAR), GreedyProcessor(), rng),
    "model": lambda rng: forked(by_last(NEAR), MultinomialProcessor(1.0), rng),
}


@pytest.mark.parametrize("name", PACED)
@pytest.mark.parametrize("drafts", TREES)
@pytest.mark.parametrize("processor", [GREEDY, MultinomialProcessor(1.0)], ids=["greedy", "sampled"])
def test_a_policy_paces_a_tree_and_the_text_stays(name: str, drafts: str, processor: Processor) -> None:
    """That of greedy decoding, and that of a seed, with a drafter on the same noise and with one that is certain."""
    beside = []

    def look(step: Committed) -> None:
        drafted = step.adjusted.verified.drafted
        deepest = max((len(drafted.path(i)) for i in range(len(drafted.proposals))), default=0)
        beside.append(len(drafted.proposals) - deepest)

    policy, timed = PACED[name]()
    noise, target = SharedNoise(7), by_last(ROWS)
    step = seed_coupled_step(TREES[drafts](noise), timed(target), processor, noise, policy, observe=look)
    end = run(step, start(PROMPT, 60).unwrap()).state
    assert end.output == run(autoregressive_step(target, processor, noise), start(PROMPT, 60).unwrap()).state.output
    assert end.tally.accepted > 0
    # The likeliest few are one path, and later a loop is.
    deep = name in {"fixed", "heuristic", *(["cost", "another cost"] if processor is GREEDY else [])}
    assert (deep and "lookup" in drafts) or max(beside) > 0, "a tree is more than its longest path"


@pytest.mark.parametrize("name", PACED)
@pytest.mark.parametrize("processor", [GreedyProcessor(), MultinomialProcessor(1.0)], ids=["greedy", "sampled"])
def test_certain_trees_leave_a_seed_its_text(name: str, processor: Processor) -> None:
    """By token rejection too: it draws a token for each that is committed, whatever tree is judged."""
    policy, timed = PACED[name]()
    dice, other = (Dice(torch.Generator().manual_seed(5)) for _ in range(2))
    step = speculative_step(LookupTree(), timed(by_last(ROWS)), processor, dice, policy)
    alone = autoregressive_step(by_last(ROWS), processor, other)
    end = run(step, start(PROMPT, 60).unwrap()).state
    assert end.output == run(alone, start(PROMPT, 60).unwrap()).state.output
    assert end.tally.accepted > 0


def tree() -> Iterator[Proposal]:
    """Two tokens behind the text, three behind the first of them, and one behind the second of those."""
    for token, parent in ((5, TEXT), (6, TEXT), (7, 0), (8, 0), (9, 0), (4, 3)):
        yield Proposal(token, parent=parent, logits=torch.tensor(with_entropy(0.02 if token != 8 else 0.9)))


def test_what_each_policy_takes_of_a_tree_is_its_beginning() -> None:
    for policy, gamma in (
        (Fixed(4), 4),
        (EGAG(1, 5), 4),
        (Heuristic(3), 3),
        (StopAfter(SVIP()), 4),  # what it stops at is kept, and nothing behind it is taken in any branch
        (StopAfter(AdaEDL(), Fixed(2)), 2),
        (StopAfter(lambda draft: draft.token == 6), 2),
    ):
        took, _ = policy(tree(), STATE)
        assert [(draft.token, draft.parent) for draft in took] == [(5, -1), (6, -1), (7, 0), (8, 0)][:gamma]


def test_the_heuristic_grows_where_a_longest_path_was_accepted() -> None:
    """Of 6 drafts 3 can be accepted, and of the first 5 of them 2."""
    for gamma, accepted, then in ((6, 3, 8), (6, 2, 5), (5, 2, 7), (5, 1, 4), (5, 0, 4), (2, 1, 4), (2, 0, 1)):
        took, pace = Heuristic(gamma)(tree(), STATE)
        assert len(took) == gamma
        assert pace[:2] == (gamma, {6: 3, 5: 2, 2: 1}[gamma])
        tally = Tally(1, (("a", Count(gamma - accepted, 0)), ("b", Count(accepted, accepted))))
        assert taken(Heuristic(gamma), certain(), evolve(STATE, pace=pace, tally=tally)) == then
    # A text that was resumed behind its end: what was judged is the path alone, and all of it stood.
    cut = evolve(STATE, pace=HeuristicPace(6, 3, 0, 0), tally=Tally(1, (("a", Count(2, 2)),)))
    assert taken(Heuristic(6), certain(), cut) == 8


# The spec's flags.


def drafter_passes(
    drafter: Module, target: Module, processor: MultinomialProcessor | GreedyProcessor, **flags: int
) -> int:
    passes = 0

    def count(module: Module, arguments: object) -> None:
        nonlocal passes
        passes += 1

    hook = drafter.register_forward_pre_hook(count)
    torch.manual_seed(0)
    speculative_generate(
        [1, 2, 3],
        drafter,
        target,
        logits_processor=processor,
        max_gen_len=24,
        eos_tokens_id=[],
        use_cache=True,
        **flags,  # type: ignore[arg-type]
    )
    hook.remove()
    return passes


def test_the_flags_choose_the_policy() -> None:
    target = tiny_llama(0)
    drafter = disturbed(target, 1, 0.2)
    greedy = GreedyProcessor()
    drafter_passes(drafter, target, greedy, gamma=1)  # tries the models
    for gamma in (1, 2, 4):
        fixed = drafter_passes(drafter, target, greedy, gamma=gamma)
        pinned = drafter_passes(drafter, target, greedy, gamma=9, use_egag=True, gamma_min=gamma, gamma_max=gamma)
        assert pinned == fixed
    flat, sharp = GreedyProcessor(temperature=1e4), GreedyProcessor(temperature=1e-9)
    least, most = (drafter_passes(drafter, target, greedy, gamma=gamma) for gamma in (1, 6))
    assert drafter_passes(drafter, target, flat, gamma=6, use_egag=True) == least
    assert drafter_passes(drafter, target, sharp, gamma=6, use_egag=True) == most, "gamma is the default gamma_max"
    assert least != most


@pytest.mark.parametrize("temperature", [numpy.float32(0.5), Fraction(1, 2)])
def test_egag_takes_a_temperature_of_any_kind_of_number(temperature: float) -> None:
    model, processor = tiny_llama(0), MultinomialProcessor(1.0)
    processor.temperature = temperature
    decode = partial(speculative_generate, [1, 2], model, model, use_egag=True, max_gen_len=6, eos_tokens_id=[])
    texts = []
    for law in (MultinomialProcessor(0.5), processor):
        torch.manual_seed(0)
        texts.append(decode(logits_processor=law))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [0, None, "warm"])
def test_egag_asks_nobody_elses_processor_for_a_temperature(temperature: object) -> None:
    class Greedy:
        def __init__(self) -> None:
            self.temperature = temperature

        def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[Distribution, ...]:
            return GreedyProcessor().laws(tokens, logits)

    model = tiny_llama(0)
    decode = partial(speculative_generate, [1, 2], model, model, max_gen_len=6, eos_tokens_id=[])
    ours = decode(logits_processor=Greedy(), use_egag=True)  # type: ignore[arg-type]
    assert ours == decode(use_egag=True)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_greedy_decoding_with_egag_is_greedy(use_cache: bool, beta: float) -> None:
    target = tiny_llama(0)
    output, rate = speculative_generate(
        [1, 2, 3],
        disturbed(target, 1, 0.2),
        target,
        use_egag=True,
        gamma_max=7,
        egag_ema_beta=beta,
        max_gen_len=40,
        eos_tokens_id=[],
        use_cache=use_cache,
    )
    assert output == oracle((1, 2, 3), target, 40)
    assert 0 < rate < 1
