"""Whatever ends a decode, what it leaves is what decoding without drafts, stopped at that token, would have left."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import pytest
import torch
from attrs import define, evolve, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from returns.functions import tap
from returns.pipeline import flow

from specflow import (
    CachedPredictor,
    DecodeState,
    Drafter,
    Finished,
    Fixed,
    GammaPolicy,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    NGramDrafter,
    NGramStorage,
    Processor,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    at_most,
    first_of,
    run,
    start,
    then,
    unfold,
)
from specflow.accelerate import fast
from specflow.drafters import propose_nothing
from specflow.policies import EGAG, AdaEDL, Heuristic, StopAfter
from specflow.predictors import UncachedPredictor
from specflow.stages import (
    Adjust,
    Condition,
    Draft,
    Match,
    PruneCache,
    StopWhen,
    UpdateNgram,
    Verify,
    advance,
    commit,
    never,
    stop_string,
)
from specflow.state import Committed
from specflow.testing import CASES, Case, Ending, World, same_law
from specflow.testing.certificate import autoregressive
from tests.mutants import samples
from tests.test_certificate import in_a_row, rejecting
from tests.test_stop import PIECES
from tests.toys import VOCABULARY, disturbed, tiny_llama

TARGET = tiny_llama(0)
SMALL = fast(disturbed(TARGET, 1, 0.03))
PROMPT = (3, 4, 5, 3, 4)
LENGTH = 24


class Interruption(Exception):  # noqa: N818 - it is no error
    """What an observer raises."""


@final
@define(eq=False)
class Decoder:
    """One decoder with all that it remembers: two memos and a storage that learns."""

    drafter: str
    gamma: GammaPolicy
    processor: Processor
    seed: int
    target: CachedPredictor = field(factory=lambda: CachedPredictor(TARGET))
    small: CachedPredictor = field(factory=lambda: CachedPredictor(SMALL))
    storage: NGramStorage = field(factory=lambda: NGramStorage(3, VOCABULARY))

    def __attrs_post_init__(self) -> None:
        self.storage.initialize(PROMPT)

    def step(self, until: Condition = never, observe: Callable[[Committed], object] = lambda committed: None) -> Step:
        """Every stage there is, on seed-coupled randomness, under which greedy and sampled texts are functions."""
        noise = SharedNoise(self.seed)
        draft, verify = Draft(self.proposals(), self.gamma), Verify(self.target, self.processor, Match(noise))
        adjust, stop, update = Adjust(noise), StopWhen(until), UpdateNgram(self.storage)
        forget = PruneCache((self.target, self.small))
        return lambda state: flow(state, draft, verify, adjust, stop, commit, tap(observe), forget, update, advance)

    def proposals(self) -> Drafter:
        """The drafter of this name."""
        model = LLMDrafter(self.small, self.processor, SharedNoise(self.seed))
        drafters: dict[str, Drafter] = {
            "none": propose_nothing,
            "n-gram": NGramDrafter(self.storage),
            "suffix": SuffixDrafter(),
            "model": model,
            "suffix, else n-gram": first_of(SuffixDrafter(shortest=2), NGramDrafter(self.storage)),
            "n-gram, then model": then(at_most(2, NGramDrafter(self.storage)), model),
        }
        return drafters[self.drafter]

    def left(self) -> dict[Tokens, dict[int, int]]:
        """What the storage has learned."""
        return self.storage.counts()


@final
@frozen
class Ender:
    """What ends a text: stop tokens, a condition, a limit."""

    stop: frozenset[int]
    until: Condition
    limit: int

    def state(self) -> DecodeState:
        """Where a text that ends like this begins."""
        return start(PROMPT, self.limit, self.stop).unwrap()


DRAFTERS = st.sampled_from(["n-gram", "suffix", "model", "suffix, else n-gram", "n-gram, then model"])
GAMMAS: st.SearchStrategy[GammaPolicy] = st.one_of(
    st.builds(Fixed, st.integers(1, 9)),
    st.sampled_from([Heuristic(2, 9), EGAG(gamma_max=6), StopAfter(AdaEDL(), Fixed(8))]),
)
PROCESSORS: st.SearchStrategy[Processor] = st.sampled_from([GreedyProcessor(), MultinomialProcessor(3.0)])
CONDITIONS: st.SearchStrategy[Condition] = st.one_of(
    st.just(never),
    st.builds(lambda *strings: stop_string(PIECES, *strings), st.text("ab\né", min_size=1, max_size=4)),
    st.builds(lambda n: lambda state: sum(state.output) % 7 == n, st.integers(0, 6)),
)
ENDERS = st.builds(Ender, st.frozensets(st.integers(0, 63), max_size=12), CONDITIONS, st.integers(1, LENGTH))


@given(drafter=DRAFTERS, gamma=GAMMAS, processor=PROCESSORS, ender=ENDERS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_what_a_decode_leaves_is_what_the_text_alone_leaves(
    drafter: str, gamma: GammaPolicy, processor: Processor, ender: Ender, seed: int
) -> None:
    alone, ours = Decoder("none", Fixed(1), processor, seed), Decoder(drafter, gamma, processor, seed)
    expected = run(alone.step(ender.until), ender.state())
    end = run(ours.step(ender.until), ender.state())
    assert (end.state.tokens, end.reason) == (expected.state.tokens, expected.reason)
    assert ours.left() == alone.left()
    tally, emitted = end.state.tally, len(end.state.output)
    # A step adds its accepted drafts and one token; only the last one may end on an accepted draft.
    assert tally.accepted <= tally.drafted
    assert tally.accepted + tally.steps - emitted in (0, 1)
    assert len(ours.target._memos._kept[0].tokens) >= len(end.state.tokens) - 1
    assert_memos_hold_nothing_else(ours, end.state.tokens)

    # Going on, with all that is remembered, equals never having stopped.
    whole = start(PROMPT, LENGTH).unwrap()
    resumed = run(ours.step(), evolve(end.state, request=whole.request))
    uncut = Decoder("none", Fixed(1), processor, seed)
    assert resumed.state.tokens == run(uncut.step(), whole).state.tokens
    assert ours.left() == uncut.left()


def assert_memos_hold_nothing_else(decoder: Decoder, tokens: Tokens) -> None:
    """The memos cover the text and nothing that was cut, and answer as a fresh reading does."""
    for memo, model in ((decoder.target, TARGET), (decoder.small, SMALL)):
        for kept in memo._memos._kept:
            assert tuple(kept.tokens) == tokens[: len(kept.tokens)]
        assert torch.allclose(memo((*tokens, 7), ()), UncachedPredictor(model)((*tokens, 7), ()), atol=1e-9)


@given(
    drafter=DRAFTERS, gamma=GAMMAS, processor=PROCESSORS, calls=st.sets(st.integers(1, 12), max_size=4),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_step_whose_observer_raises_has_not_happened(
    drafter: str, gamma: GammaPolicy, processor: Processor, calls: set[int], seed: int
) -> None:
    """Interrupted at any of its steps and taken up again from the last state: the same states, statistics included."""
    count = 0

    def interrupting(committed: Committed) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise Interruption

    ours, undisturbed = (Decoder(drafter, gamma, processor, seed) for _ in range(2))
    state, step = start(PROMPT, LENGTH, {9}).unwrap(), ours.step(observe=interrupting)
    expected = list(unfold(undisturbed.step(), state))
    seen: list[DecodeState | Finished] = []
    while not seen or isinstance(seen[-1], DecodeState):
        last = seen[-1] if seen else state
        assert isinstance(last, DecodeState)
        before = ours.left()
        try:
            seen.append(step(last))
        except Interruption:
            assert ours.left() == before
    assert seen == expected
    assert ours.left() == undisturbed.left()


@pytest.mark.parametrize("case", [case for case in CASES if case.stop], ids=str)
def test_the_law_of_a_text_that_was_stopped_and_resumed(case: Case) -> None:
    """Under dice: stopped by stop tokens and by a condition, then resumed without them, exactly the target's law."""

    def unstopped(world: World) -> DecodeState:
        return evolve(world.start, request=evolve(world.start.request, stop=frozenset()))

    def resumed(world: World) -> Ending:
        drafter, request = samples(world), unstopped(world).request
        stopped = run(rejecting(world, drafter, until=in_a_row), world.start).state
        return Ending.of(run(rejecting(world, drafter), evolve(stopped, request=request)))

    same_law(resumed, lambda world: autoregressive(evolve(world, start=unstopped(world)), world.rng), [case])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_law_of_a_text_whose_second_step_was_interrupted(case: Case) -> None:
    """Under dice too a step that failed has not happened: its randomness is gone, and what comes is fresh."""

    def interrupted(world: World) -> Ending:
        count = 0

        def interrupting(committed: Committed) -> None:
            nonlocal count
            count += 1
            if count == 2:
                raise Interruption

        step = rejecting(world, samples(world), observe=interrupting)
        outcome: DecodeState | Finished = world.start
        while isinstance(outcome, DecodeState):
            try:
                outcome = step(outcome)
            except Interruption:
                continue
        return Ending.of(outcome)

    same_law(interrupted, lambda world: autoregressive(world, world.rng), [case])
