"""The decoders that we ship keep the laws, and for each law there is one that breaks it and is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import final

import pytest
from attrs import define, evolve, field
from returns.functions import tap
from returns.pipeline import flow
from torch import Tensor

from specflow import (
    CachedPredictor,
    DecodeError,
    DecodeState,
    Drafter,
    Fixed,
    GammaPolicy,
    LLMDrafter,
    NGramDrafter,
    NGramStorage,
    Proposal,
    Step,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    first_of,
    ngram_step,
    seed_coupled_step,
    speculative_step,
    verified_step,
)
from specflow.loop import once
from specflow.lossy import accept_loss
from specflow.paths import last_rows, path_by_path
from specflow.policies import EGAG, SVIP, Heuristic, StopAfter
from specflow.predictors import UncachedPredictor
from specflow.randomness import Randomness
from specflow.stages import (
    Adjust,
    Block,
    Draft,
    Match,
    Observer,
    Reject,
    Traverse,
    UpdateNgram,
    Verify,
    advance,
    commit,
    ending,
    unobserved,
)
from specflow.state import Committed, Rule, Tally
from specflow.steps import lossy_unadjusted_step
from specflow.testing import (
    CASES,
    Case,
    ExactnessError,
    LawError,
    TableModel,
    World,
    certify,
    certify_seed,
    drafting_nothing_is_autoregressive,
    memo_is_invisible,
    observing_is_identity,
    pruning_is_identity,
    same_law,
    states_are_values,
    statistics_add_up,
    steps_are_atomic,
)
from tests.mutants import apart, bush, samples
from tests.toys import VOCABULARY, tiny_llama


def alone(world: World, observe: Observer = unobserved) -> Step:
    return autoregressive_step(world.target, world.processor, world.rng, observe)


def speculative(world: World, drafter: Drafter, observe: Observer = unobserved, gamma: GammaPolicy = Fixed(2)) -> Step:
    return speculative_step(drafter, world.target, world.processor, world.rng, gamma, observe=observe)


def block(world: World, drafter: Drafter) -> Step:
    verify, adjust = Verify(world.target, world.processor, Block(world.rng)), Adjust(world.rng)
    draft, end = Draft(drafter, Fixed(2)), ending()
    return lambda state: state.then(draft).then(verify).then(adjust).then(end)


def judged(rule: Callable[[Randomness], Rule[Randomness]], widths: tuple[int, ...] = ()) -> Callable[[World], Step]:
    """The step of a rule over drafts of a model: a chain, or a tree with drawn siblings."""

    def compose(world: World) -> Step:
        drafter = LLMDrafter(world.drafter, world.processor, world.rng, widths=widths)
        return verified_step(drafter, world.target, world.processor, world.rng, rule(world.rng), Fixed(2))

    return compose


def taught(world: World, drafter: Drafter | None = None, observe: Observer = unobserved) -> Step:
    storage = NGramStorage(2, 4)
    storage.initialize(world.start.tokens)
    return ngram_step(
        drafter or apart(NGramDrafter(storage)),
        world.target,
        world.processor,
        world.rng,
        UpdateNgram(storage, 2),
        Fixed(2),
        observe=observe,
    )


DECODERS: Mapping[str, Callable[[World], Step]] = {
    "autoregressive": alone,
    "model": lambda world: speculative(world, samples(world)),
    "suffix": lambda world: speculative(world, SuffixDrafter()),
    "suffix, else model": lambda world: speculative(world, first_of(SuffixDrafter(shortest=2), samples(world))),
    "EGAG": lambda world: speculative(world, samples(world), gamma=EGAG(gamma_max=3)),
    "heuristic": lambda world: speculative(world, samples(world), gamma=Heuristic(1, 2)),
    "SVIP": lambda world: speculative(world, samples(world), gamma=StopAfter(SVIP(), Fixed(2))),
    "block": lambda world: block(world, samples(world)),
    "seed-coupled": lambda world: seed_coupled_step(
        LLMDrafter(world.drafter, world.processor, world.noise), world.target, world.processor, world.noise, Fixed(2)
    ),
    "tree": lambda world: speculative_step(bush, world.target, world.processor, world.rng, Fixed(4)),
    "match, a drawn tree": judged(Match, (2,)),
    "reject, a drawn tree": judged(Reject, (2,)),
    "traverse, a drawn tree": judged(Traverse, (2,)),
    "first token alone": lambda world: once(alone(world), speculative(world, samples(world))),
    "lossy": lambda world: accept_loss(
        lossy_unadjusted_step(samples(world), world.target, world.processor, world.rng, Fixed(2))
    ),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("law", [statistics_add_up, states_are_values, steps_are_atomic])
def test_the_decoders_that_we_ship_keep_the_laws(law: Callable[[Callable[[World], Step]], None], name: str) -> None:
    law(DECODERS[name])


@pytest.mark.parametrize("law", [statistics_add_up, steps_are_atomic])
def test_a_decoder_that_learns_keeps_the_laws_that_it_can(law: Callable[[Callable[[World], Step]], None]) -> None:
    law(taught)


@pytest.mark.parametrize(
    "compose",
    [
        alone,
        lambda world, observe: speculative(world, samples(world), observe),
        lambda world, observe: taught(world, observe=observe),
    ],
)
def test_observing_is_identity(compose: Callable[[World, Observer], Step]) -> None:
    observing_is_identity(compose)


@pytest.mark.parametrize("compose", [speculative, block, taught])
def test_drafting_nothing_is_autoregressive(compose: Callable[[World, Drafter], Step]) -> None:
    drafting_nothing_is_autoregressive(compose)


def test_a_models_memo_is_invisible_and_pruning_it_is_identity() -> None:
    model = tiny_llama()
    for law in (memo_is_invisible, pruning_is_identity):
        law(CachedPredictor(model), UncachedPredictor(model), VOCABULARY, tolerance=1e-9)


# One decoder for each law that breaks it


def counted(change: Callable[[Tally], Tally]) -> Callable[[World], Step]:
    """The step with a model's drafts, its statistics changed."""

    def compose(world: World) -> Step:
        def commit_otherwise(committed: Committed) -> Committed:
            return evolve(committed, state=evolve(committed.state, tally=change(committed.state.tally)))

        draft, adjust = Draft(samples(world), Fixed(2)), Adjust(world.rng)
        verify = Verify(world.target, world.processor, Reject(world.rng))
        return lambda state: flow(state, draft, verify, adjust, commit, commit_otherwise, advance)

    return compose


def test_statistics_that_do_not_add_up_are_refused() -> None:
    for change in (
        lambda tally: evolve(tally, steps=tally.steps + 1),
        lambda tally: evolve(tally, sources=tuple((name, evolve(count, accepted=0)) for name, count in tally.sources)),
        lambda tally: evolve(tally, sources=tuple((name, evolve(count, drafted=0)) for name, count in tally.sources)),
        lambda tally: evolve(tally, accepted_at=(9,)),
        lambda tally: evolve(tally, judged_at=()),
    ):
        with pytest.raises(LawError):
            statistics_add_up(counted(change))


@final
@define(eq=False)
class Growing:
    """A gamma policy that counts its calls by itself and not in the state."""

    calls: int = 0

    def __call__(
        self, stream: Iterator[Proposal], state: DecodeState, /
    ) -> tuple[tuple[Proposal, ...], tuple[float, ...]]:
        self.calls += 1
        return tuple(proposal for proposal, _ in zip(stream, range(self.calls), strict=False)), ()


def test_a_policy_that_counts_by_itself_makes_states_that_are_no_values() -> None:
    with pytest.raises(LawError, match="stepped again"):
        states_are_values(lambda world: speculative(world, samples(world), gamma=Growing()))


def test_a_policy_that_counts_by_itself_makes_steps_that_are_not_atomic() -> None:
    with pytest.raises(ExactnessError):
        steps_are_atomic(lambda world: speculative(world, samples(world), gamma=Growing()))


def test_a_decoder_that_is_changed_by_looking_at_it_is_refused() -> None:
    def disturbed(world: World, observe: Observer) -> Step:
        return alone(world, observe) if observe is unobserved else speculative(world, samples(world), observe)

    with pytest.raises(ExactnessError):
        observing_is_identity(disturbed)


def test_an_observer_that_sees_a_step_twice_or_never_is_noticed() -> None:
    def twice(world: World, observe: Observer) -> Step:
        verify, adjust = Verify(world.target, world.processor, Reject(world.rng)), Adjust(world.rng)
        draft = Draft(samples(world))
        return lambda state: flow(state, draft, verify, adjust, commit, tap(observe), tap(observe), advance)

    for compose in (twice, lambda world, observe: alone(world)):
        with pytest.raises(LawError, match="did not see what stood"):
            observing_is_identity(compose)


def test_a_decoder_that_drafts_nevertheless_is_refused() -> None:
    with pytest.raises(ExactnessError):
        drafting_nothing_is_autoregressive(lambda world, drafter: speculative(world, samples(world)))
    with pytest.raises(ExactnessError):
        drafting_nothing_is_autoregressive(
            lambda world, drafter: speculative_step(drafter, world.drafter, world.processor, world.rng)
        )


@final
@define(eq=False)
class Stale:
    """A memo that goes on from what it read, though another text may be asked for."""

    model: TableModel
    forgets: bool
    _tokens: Tokens = field(init=False, default=())

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        return path_by_path(self._last)(tokens, drafts)

    def _last(self, tokens: Tokens, last: int) -> Tensor:
        same = self._tokens[: len(tokens)]
        text = tokens if self.forgets else (*same[: len(tokens) - last], *tokens[len(same[: len(tokens) - last]) :])
        self._tokens = text
        return last_rows(self.model, text, last)

    def prune(self, tokens: Tokens, /) -> None:
        self.model = TableModel(self.model.vocab_size, len(tokens))


def test_a_memo_that_shows_is_refused() -> None:
    fresh = TableModel(4, 1)
    memo_is_invisible(Stale(TableModel(4, 1), forgets=True), fresh, 4, tolerance=0.0)
    with pytest.raises(LawError, match="the memo shows"):
        memo_is_invisible(Stale(TableModel(4, 1), forgets=False), fresh, 4, tolerance=0.0)


def test_pruning_that_shows_is_refused() -> None:
    with pytest.raises(LawError, match="pruning shows"):
        pruning_is_identity(Stale(TableModel(4, 1), forgets=True), TableModel(4, 1), 4, tolerance=0.0)


CHECKS: Mapping[str, Callable[[Iterable[Case]], object]] = {
    "certify": lambda cases: certify(alone, cases=cases),
    "certify_seed": lambda cases: certify_seed(alone, cases=cases),
    "same_law": lambda cases: same_law(lambda world: 0, lambda world: 0, cases),
    "statistics_add_up": lambda cases: statistics_add_up(alone, cases=cases),
    "states_are_values": lambda cases: states_are_values(alone, cases=cases),
    "steps_are_atomic": lambda cases: steps_are_atomic(alone, cases=cases),
    "observing_is_identity": lambda cases: observing_is_identity(alone, cases=cases),
    "drafting_nothing_is_autoregressive": lambda cases: drafting_nothing_is_autoregressive(speculative, cases=cases),
}


@pytest.mark.parametrize("name", CHECKS)
def test_nothing_is_proved_on_no_cases(name: str) -> None:
    """A generator that was used once has none the second time: a certificate "on 0 cases" would hold for anything."""
    used = iter(CASES[:0])
    with pytest.raises(DecodeError, match="there are no cases"):
        CHECKS[name](used)
