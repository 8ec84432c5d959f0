"""Laws that decoders and their parts keep, each a check to run on your own: on every branch of small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise, zip_longest
from typing import Final, Protocol, final

import torch
from attrs import define, evolve, field
from torch import Tensor

from specflow.distribution import Categorical, Distribution
from specflow.drafters.combine import propose_nothing
from specflow.guards.checks import does
from specflow.loop import unfold
from specflow.protocols import Prunable
from specflow.randomness import Sampling
from specflow.stages.observe import Observer, unobserved
from specflow.state import DecodeState, Drafter, Finished, Predictor, Proposal, Step, Tally, Tokens
from specflow.testing.certificate import CASES, Case, Ending, World, autoregressive, cases_of, compared, same_law
from specflow.testing.conformance import conformance

LAW_CASES: Final = (CASES[0], CASES[1], CASES[3], CASES[7], CASES[14])
"""The cases that laws are checked on, unless others are given: some with and without stops, sampled and greedy."""


@final
class LawError(AssertionError):
    """A law that does not hold, and where."""


class Memo(Prunable, Protocol):
    """A predictor that remembers what it read."""

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each draft."""
        ...


def statistics_add_up(compose: Callable[[World], Step], *, cases: Iterable[Case] = LAW_CASES) -> None:
    """A step counts itself, and one token more than it accepted drafts, unless the text was cut after a draft.

    steps(text) = number of steps; tokens(step) = accepted(step) + 1, or accepted(step) in the last step; accepted ≤
    drafted, for each source. `LawError` shows the step.

    >>> from specflow import autoregressive_step
    >>> statistics_add_up(lambda world: autoregressive_step(world.target, world.processor, world.rng))
    """

    def checked(world: World) -> None:
        before = world.start
        for outcome in unfold(compose(world), before):
            after = outcome.state if isinstance(outcome, Finished) else outcome
            new, accepted = len(after.tokens) - len(before.tokens), after.tally.accepted - before.tally.accepted
            right = (accepted, accepted + 1) if isinstance(outcome, Finished) else (accepted + 1,)
            if after.tally.steps != before.tally.steps + 1 or new not in right:
                raise LawError(f"statistics do not add up: {new} new tokens, from {before.tally} to {after.tally}")
            if any(count.accepted > count.drafted for _, count in after.tally.sources):
                raise LawError(f"more drafts were accepted than drafted: {after.tally}")
            judged, stood = after.tally.judged_at, after.tally.accepted_at
            pairs = zip_longest(judged, stood, fillvalue=0)
            if sum(stood) != after.tally.accepted or any(some < more for some, more in pairs):
                raise LawError(f"positions do not add up: {stood} of {judged}, and {after.tally}")
            before = after

    for case in cases_of(cases, compose):
        case.law(checked)


def states_are_values(compose: Callable[[World], Step], *, cases: Iterable[Case] = LAW_CASES) -> None:
    """Stepping an old state again, whatever came after it, gives the same outcome under the same randomness.

    For decoders that learn nothing; one that teaches a storage teaches it again. `LawError` shows both outcomes. The
    cases must draw through the randomness of the world, as all but `HiddenProcessor` do.

    >>> from specflow import LLMDrafter, speculative_step
    >>> states_are_values(
    ...     lambda world: speculative_step(
    ...         LLMDrafter(world.drafter, world.processor, world.rng), world.target, world.processor, world.rng
    ...     )
    ... )
    """

    def checked(world: World) -> None:
        tape, noise = _Tape(world.rng, world.rng.accept), _Tape(world.noise, _no_decision)
        step = compose(evolve(world, rng=tape, noise=noise))
        outcomes: list[DecodeState | Finished] = [world.start]
        marks = [(0, 0)]
        for outcome in unfold(step, world.start):
            outcomes.append(outcome)
            marks.append((len(tape.answers), len(noise.answers)))
        for (state, first), (began, ended) in reversed([*zip(pairwise(outcomes), pairwise(marks), strict=True)]):
            tape.play(began[0], ended[0])
            noise.play(began[1], ended[1])
            assert isinstance(state, DecodeState)  # all but the last
            again = step(state)
            if again != first or tape.left or noise.left:
                raise LawError(f"a state stepped again gave another outcome: first {first}, then {again}")

    for case in cases_of(cases, compose):
        case.law(checked)


def steps_are_atomic(compose: Callable[[World], Step], *, cases: Iterable[Case] = LAW_CASES) -> None:
    """A step that fails has not happened: tried again, it gives texts and statistics of the same law.

    The target, and then the drafter, raises once, at each of its first calls in turn, and the state that the step
    failed on is stepped again. `ExactnessError` shows what became of it. The drafter fails on texts without stop
    tokens: a draft ends at one, so there what was drawn decides whether the drafter is asked again, and a failure that
    depends on draws selects among them, which no second try can undo.

    >>> from specflow import autoregressive_step
    >>> steps_are_atomic(lambda world: autoregressive_step(world.target, world.processor, world.rng))
    """

    def end(world: World, target_fails: int = -1, drafter_fails: int = -1) -> tuple[Ending, Tally]:
        target, drafter = _Failing(world.target, target_fails), _Failing(world.drafter, drafter_fails)
        return _persistent(compose(evolve(world, target=target, drafter=drafter)), world.start)

    for case in cases_of(cases, compose):
        unstopped = evolve(case, stop=frozenset())
        never, never_unstopped = case.law(end), unstopped.law(end)
        for call in range(3):
            compared(case, case.law(partial(end, target_fails=call)), never)
            compared(unstopped, unstopped.law(partial(end, drafter_fails=call)), never_unstopped)


def observing_is_identity(compose: Callable[[World, Observer], Step], *, cases: Iterable[Case] = LAW_CASES) -> None:
    """With an observer the outcomes of all steps have the law that they have without, and it sees each of them once.

    `ExactnessError` shows outcomes whose probability changed, `LawError` what was not seen.

    >>> from specflow import autoregressive_step
    >>> observing_is_identity(
    ...     lambda world, observe: autoregressive_step(world.target, world.processor, world.rng, observe)
    ... )
    """
    cases = cases_of(cases, compose)

    def unseen(world: World) -> tuple[DecodeState | Finished, ...]:
        return tuple(unfold(compose(world, unobserved), world.start))

    def seen(world: World) -> tuple[DecodeState | Finished, ...]:
        states: list[DecodeState] = []
        step = compose(world, lambda committed: states.append(committed.state))
        outcomes = tuple(unfold(step, world.start))
        stood = [outcome.state if isinstance(outcome, Finished) else outcome for outcome in outcomes]
        if states != stood:
            raise LawError(f"the observer did not see what stood: saw {states}, while {stood} stood")
        return outcomes

    same_law(seen, unseen, cases)


def drafting_nothing_is_autoregressive(
    compose: Callable[[World, Drafter], Step], *, cases: Iterable[Case] = LAW_CASES
) -> None:
    """With a drafter that proposes nothing, text and ending have the autoregressive law, one step per token.

    `ExactnessError` shows the text, the steps and the drafts whose probability is wrong.

    >>> from specflow import speculative_step
    >>> drafting_nothing_is_autoregressive(
    ...     lambda world, drafter: speculative_step(drafter, world.target, world.processor, world.rng)
    ... )
    """
    cases = cases_of(cases, compose)

    def ours(world: World) -> tuple[Ending, int, int]:
        ending, tally = _persistent(compose(world, propose_nothing), world.start)
        return ending, tally.steps, tally.drafted

    def reference(world: World) -> tuple[Ending, int, int]:
        ending = autoregressive(world, world.rng)
        return ending, len(ending.text), 0

    same_law(ours, reference, cases)


def memo_is_invisible(memo: Predictor, fresh: Predictor, vocab_size: int, *, tolerance: float, seed: int = 0) -> None:
    """Whatever was read before, a memo answers as `fresh` does, which remembers nothing.

    `LawError` holds what `conformance` found: where, after which move, and by how much they differ.

    >>> from specflow.testing import TableModel
    >>> memo_is_invisible(TableModel(4, 1), TableModel(4, 1), 4, tolerance=0.0)
    """
    found = conformance(memo, fresh, vocab_size, tolerance=tolerance, seed=seed)
    if not found.holds:
        raise LawError(f"the memo shows: {found}")


def pruning_is_identity(memo: Memo, fresh: Predictor, vocab_size: int, *, tolerance: float, seed: int = 0) -> None:
    """Whatever it was told to forget, a memo answers as `fresh` does. `LawError` holds what `conformance` found.

    >>> from specflow import CachedPredictor
    >>> from specflow.predictors import UncachedPredictor
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2)).double()
    >>> pruning_is_identity(CachedPredictor(model), UncachedPredictor(model), 32, tolerance=1e-9)
    """
    does("a memo", "give a CachedPredictor", "prune")("memo", memo)
    found = conformance(memo, fresh, vocab_size, tolerance=tolerance, seed=seed, prune=memo.prune)
    if not found.holds:
        raise LawError(f"pruning shows: {found}")


class _Interruption(Exception):  # noqa: N818 - it is no error
    """What a provider raises to see what is left of a step."""


@final
@define(eq=False)
class _Failing:
    """A predictor that raises once, at one of its calls, after it has done its work."""

    predictor: Predictor
    call: int

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        logits = self.predictor(tokens, drafts)
        self.call -= 1
        if self.call == -1:
            raise _Interruption
        return logits


def _persistent(step: Step, state: DecodeState) -> tuple[Ending, Tally]:
    """The end of a decode that tries again what was interrupted."""
    while True:
        try:
            for outcome in unfold(step, state):
                if isinstance(outcome, Finished):
                    return Ending.of(outcome), outcome.state.tally
                state = outcome
        except _Interruption:
            continue


def _no_decision(probability: float) -> bool:
    raise LawError("noise that belongs to a position takes no decisions")


@final
@define(eq=False)
class _Tape:
    """Randomness that is recorded, and can be played again: what `rng` draws and `decide` decides."""

    rng: Sampling
    decide: Callable[[float], bool]
    answers: list[int] = field(factory=list)
    left: list[int] | None = None

    def draw(self, law: Distribution, position: int, /) -> int:
        return self._answered(lambda: self.rng.draw(law, position))

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        return torch.tensor(self.draw(Categorical(probs), position), device=probs.device)

    def accept(self, probability: float, /) -> bool:
        return bool(self._answered(lambda: int(self.decide(probability))))

    def play(self, start: int, end: int) -> None:
        """Give the answers from `start` to `end` again; `left` are those that were not asked for yet."""
        self.left = self.answers[start:end][::-1]

    def _answered(self, ask: Callable[[], int]) -> int:
        if self.left is None:
            self.answers.append(ask())
            return self.answers[-1]
        if not self.left:
            raise LawError("a state stepped again took more randomness than the first time")
        return self.left.pop()
