"""The certificate: a decoder's exact law, compared with the law of autoregressive decoding."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from math import fsum
from typing import Final, final

import numpy
from attrs import define, evolve, field, frozen
from torch import Tensor
from typing_extensions import TypeVar, override

from specflow.asked import laws_of, rows_of
from specflow.errors import DecodeError
from specflow.guards.checks import a, calls, does, shown, valid, whole
from specflow.guards.ids import ids_of, stops_of
from specflow.loop import run
from specflow.processors import (
    GreedyProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    Processor,
    TopKNucleusProcessor,
    TopKProcessor,
)
from specflow.randomness import Randomness, Sampling
from specflow.stages.stop import Condition, never
from specflow.state import DecodeState, Finished, Predictor, Reason, Request, Step, Tokens
from specflow.testing.enumeration import Branch, Law, Noise, exact_law
from specflow.testing.tables import HiddenProcessor, TableModel

TOLERANCE: Final = 1e-12
"""Sums of some thousand fp64 products are this exact, and no error in a decoder is this small."""

Outcome = TypeVar("Outcome", bound=Hashable)


@final
@frozen
class Ending:
    """A finished text without its prompt, and why it ended."""

    text: Tokens
    reason: Reason

    @classmethod
    def of(cls, end: Finished) -> Ending:
        """The ending of a decode."""
        return cls(end.state.output, end.reason)

    @override
    def __str__(self) -> str:
        return f"{self.text}, {self.reason.value}"


@final
@frozen(eq=False)
class World:
    """What a decoder under test is built from: small models, a processor, and randomness that takes every branch.

    `rng` gives fresh randomness, `noise` gives randomness that belongs to a position, as `SharedNoise` does.
    """

    start: DecodeState
    target: Predictor
    drafter: Predictor
    processor: Processor
    rng: Randomness
    noise: Sampling


def _prompt(tokens: object) -> Tokens:
    prompt = ids_of("prompt", tokens)
    if not prompt:
        raise DecodeError("prompt", "the prompt is empty", "no tokens", "give at least one token")
    return prompt


def _stops(ids: object) -> frozenset[int]:
    return stops_of("stop", ids)


def _makes_processors(name: str, value: object) -> None:
    if not (isinstance(value, type) and callable(getattr(value, "laws", None))):  # a class of processors makes them
        calls("a maker of processors", "give a function that makes one of randomness")(name, value)


@final
@frozen
class Case:
    """One problem that a decoder is certified on. Its models are `TableModel`s of two different seeds.

    `processor` is given the randomness, for a processor that draws by itself.
    """

    vocab_size: int = field(validator=valid(whole(1, "give a vocabulary of at least one token")))
    prompt: Tokens = field(converter=_prompt)
    new_tokens: int = field(validator=valid(whole(0, "give a number of tokens")))
    stop: frozenset[int] = field(default=frozenset(), converter=_stops)
    processor: Callable[[Sampling], Processor] = field(
        default=lambda rng: MultinomialProcessor(1.0), validator=valid(_makes_processors)
    )
    seed: int = field(default=0, validator=valid(whole(0, "give a whole number")))

    def law(self, program: Callable[[World], Outcome]) -> Law[Outcome]:
        """The exact law of what a program returns in this world. It is called once per branch, and must start afresh.

        >>> CASES[0].law(lambda world: world.rng.accept(0.25)).probabilities
        {True: 0.25, False: 0.75}
        """
        calls("a program", "give a function of the world")("program", program)
        request = Request(self.prompt, len(self.prompt) + self.new_tokens, self.stop)
        target, drafter = (TableModel(self.vocab_size, seed) for seed in (2 * self.seed, 2 * self.seed + 1))

        def enumerated(branch: Branch) -> Outcome:
            start = DecodeState(request, self.prompt)
            processor = self.processor(branch)
            does("a processor", "give a function that makes one of randomness", "laws")("processor", processor)
            return program(World(start, target, drafter, processor, branch, Noise(branch)))

        return exact_law(enumerated)

    @override
    def __str__(self) -> str:
        processor = self.processor(Branch())
        values: dict[str, object] = getattr(processor, "__dict__", {})  # a class with slots has none
        settings = ", ".join(f"{k} {v}" for k, v in values.items() if not k.startswith("_"))
        return (
            f"vocabulary {self.vocab_size}, prompt {self.prompt}, {self.new_tokens} new tokens, "
            f"stop {set(self.stop) or 'nowhere'}, {type(processor).__name__} ({settings}), seed {self.seed}"
        )


CASES: Final = (
    Case(2, (0,), 4, seed=15),
    Case(2, (1, 0), 5, frozenset({1}), seed=16),
    Case(3, (2,), 3, seed=1),
    Case(3, (0, 1), 3, frozenset({2}), seed=2),
    Case(3, (1, 1), 4, frozenset({0, 2}), lambda rng: MultinomialProcessor(0.6), 3),
    Case(4, (3, 0, 1), 3, frozenset({1}), seed=4),
    Case(3, (0,), 1, seed=5),
    Case(3, (2, 0), 3, processor=lambda rng: TopKProcessor(0.8, 2), seed=6),
    Case(4, (1,), 4, frozenset({3}), lambda rng: TopKProcessor(1.2, 2), 7),
    Case(3, (0, 2), 4, processor=lambda rng: NucleusProcessor(0.9, 0.8), seed=8),
    Case(4, (2, 2), 4, frozenset({0}), lambda rng: NucleusProcessor(1.5, 0.7), 9),
    Case(4, (0, 3), 4, frozenset({2}), lambda rng: TopKNucleusProcessor(1.0, 3, 0.75), 10),
    Case(3, (1,), 3, frozenset({1}), HiddenProcessor, 11),
    Case(2, (1, 1), 4, processor=HiddenProcessor, seed=12),
    Case(3, (0, 1), 6, processor=lambda rng: GreedyProcessor(), seed=13),
    Case(4, (3,), 6, frozenset({0, 1}), lambda rng: GreedyProcessor(0.7), 14),
)
"""Every processor; vocabularies of 2 to 4; no, one and two stop tokens; prompts of 1 to 3 tokens; 1 to 6 new tokens."""

SEEDED_CASES: Final = tuple(case for case in CASES if case.processor is not HiddenProcessor)
"""The cases whose processors draw through the randomness of the stages."""


@final
@define
class ExactnessError(AssertionError):
    """A decoder whose law is not the law of autoregressive decoding, or whose outcome is not the one it should have.

    `distance` is the total variation; `worst` is the outcome whose probability is most wrong: it has `probability`
    where `expected` would be right.
    """

    case: Case
    distance: float
    worst: object
    probability: float
    expected: float

    @override
    def __str__(self) -> str:
        return (
            f"total variation {self.distance:.3g} from the law it should have. Worst: {self.worst}: it "
            f"has probability {self.probability:.9g} and should have {self.expected:.9g}. Case: {self.case}."
        )


@final
@frozen
class Certificate:
    """What was checked: on so many cases and branches the law is exact, up to `distance`, which is rounding.

    `accepted` is the exact expected number of accepted drafts for one drafted, over all cases, and `length` that of
    tokens for one step of the target.
    """

    cases: int
    branches: int
    distance: float
    accepted: float
    length: float

    @override
    def __str__(self) -> str:
        return (
            f"exact on {self.cases} cases, {self.branches} branches (total variation < {TOLERANCE:.0e}): "
            f"{self.accepted:.0%} of the drafts accepted, {self.length:.2f} tokens a pass"
        )


def certify(
    compose: Callable[[World], Step], *, until: Condition = never, cases: Iterable[Case] = CASES
) -> Certificate:
    """Checks that a decoder emits exactly the law of autoregressive decoding, on every branch of every case.

    `compose` builds the step of your decoder in the world it is given, afresh for each branch, so that a storage it
    teaches starts empty. Text and reason of ending are compared. `until` is the condition that the decoder stops at,
    if it has one (see `StopWhen`). `ExactnessError` if the total variation is 1e-12 or more; `AssertionError` for a
    step that draws from a generator of its own; `DecodeError`, naming the part and the position, for a law that is
    none, for rows or drafts that cannot be, and for a step that emits nothing.

    What is checked is the algorithm, with exact randomness, on small cases; the code is what runs on real models.

    >>> from specflow import LLMDrafter, speculative_step
    >>> certificate = certify(
    ...     lambda world: speculative_step(
    ...         LLMDrafter(world.drafter, world.processor, world.rng), world.target, world.processor, world.rng
    ...     ),
    ...     cases=CASES[:4],
    ... )
    >>> certificate.distance < 1e-12
    True
    """
    calls("a condition", "give a function of the state")("until", until)
    ends, distances = [], []
    for case in cases_of(cases, compose):
        law = case.law(lambda world: run(compose(world), world.start))
        reference = case.law(lambda world: autoregressive(world, world.rng, until))
        distances.append(compared(case, law.map(Ending.of), reference))
        ends.append(law)
    drafted = fsum(law.mean(lambda end: end.state.tally.drafted) for law in ends)
    accepted = fsum(law.mean(lambda end: end.state.tally.accepted) for law in ends)
    steps = fsum(law.mean(lambda end: end.state.tally.steps) for law in ends)
    tokens = fsum(law.mean(lambda end: len(end.state.output)) for law in ends)
    return Certificate(
        cases=len(ends),
        branches=sum(law.branches for law in ends),
        distance=max(distances, default=0.0),
        accepted=accepted / drafted if drafted else 0.0,
        length=tokens / steps if steps else 0.0,
    )


def certify_seed(compose: Callable[[World], Step], *, cases: Iterable[Case] = SEEDED_CASES) -> None:
    """Checks that the text depends on the noise alone: on every branch it is the text without any drafter.

    `compose` builds a step that draws from `world.noise` and nothing else. Each branch decodes once with it, and once
    draws the target's tokens one by one from the same noise. `ExactnessError` shows a pair of texts that differ; its
    distance is the probability that they do. A user's own sampler shares no noise, so there is no case with one.

    Why this is enough for `SharedNoise`: a draw there is a function of the noise at its position and of the law, as it
    is here, and the stages know nothing else about it. And noise at different positions is independent, so the target's
    draws have the target's law: argmax(log p + g) has the law p. How often drafts are accepted does differ between the
    two kinds of noise.

    >>> from specflow import Fixed, LLMDrafter, seed_coupled_step
    >>> def coupled(world: World) -> Step:
    ...     drafter = LLMDrafter(world.drafter, world.processor, world.noise)
    ...     return seed_coupled_step(drafter, world.target, world.processor, world.noise, Fixed(2))
    >>> certify_seed(coupled, cases=SEEDED_CASES[1:2])
    """
    for case in cases_of(cases, compose):

        def texts(world: World) -> tuple[Ending, Ending]:
            return Ending.of(run(compose(world), world.start)), autoregressive(world, world.noise)

        law = case.law(texts)
        wrong = {pair: probability for pair, probability in law.probabilities.items() if pair[0] != pair[1]}
        if wrong:
            worst = max(wrong, key=wrong.__getitem__)
            raise ExactnessError(case, fsum(wrong.values()), worst, wrong[worst], 0.0)


def same_law(
    program: Callable[[World], Outcome], reference: Callable[[World], Outcome], cases: Iterable[Case] = CASES
) -> None:
    """Checks that two programs return outcomes of one law: `ExactnessError` if the total variation is 1e-12 or more.

    `certify` compares texts. Use this for anything else that a decode leaves behind: what a storage has learned, how
    many drafts were accepted, the text after an interruption.

    >>> from specflow import autoregressive_step
    >>> def decoded(world: World) -> Ending:
    ...     return Ending.of(run(autoregressive_step(world.target, world.processor, world.rng), world.start))
    >>> same_law(decoded, lambda world: autoregressive(world, world.rng), CASES[:1])
    """
    for case in cases_of(cases, program, "program"):
        compared(case, case.law(program), case.law(reference))


def cases_of(cases: object, compose: object, name: str = "compose") -> tuple[Case, ...]:
    """The cases in anything that holds cases; `DecodeError` for no cases, and for a `compose` that is no function.

    `name` is what errors call `compose`.
    """
    calls("a composition", "give a function of the world")(name, compose)
    if isinstance(cases, Tensor) or not isinstance(cases, Iterable):
        raise DecodeError("cases", "cases are no cases", shown(cases), "give several in a tuple, such as CASES")
    several = tuple(cases)
    if not several:  # what holds for none would be no check, and a generator that was used before has none
        raise DecodeError("cases", "there are no cases", "none of them", "give one at least, in a tuple, such as CASES")
    for case in several:
        a(Case, "give cases, such as CASES")("cases", case)
    return several


def autoregressive(world: World, sampling: Sampling, until: Condition = never) -> Ending:
    """The reference: the target's tokens, drawn one by one. It uses no stage, no step and no loop of specflow."""
    state = world.start
    while len(state.tokens) < state.request.limit:
        logits = rows_of(world.target, state.tokens)
        token = sampling.draw(laws_of(world.processor, state.tokens, logits)[0], len(state.tokens))
        state = evolve(state, tokens=(*state.tokens, token))
        if token in state.request.stop:
            return Ending(state.output, Reason.STOP)
        ends: object = until(state)
        if not isinstance(ends, bool | numpy.bool_):
            happened = "the condition does not say whether the text is over"
            raise DecodeError("until", happened, shown(ends), "return True or False")
        if ends:
            return Ending(state.output, Reason.CONDITION)
    return Ending(state.output, Reason.LIMIT)


def compared(case: Case, law: Law[Outcome], reference: Law[Outcome]) -> float:
    """How far a law is from the one it should be: `ExactnessError` if by 1e-12 or more."""
    distance = law.distance(reference)
    if not distance < TOLERANCE:
        worst = law.worst(reference)
        raise ExactnessError(case, distance, worst, law.of(worst), reference.of(worst))
    return distance
