"""Randomness that takes every branch: the exact law of whatever a program returns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate, pairwise
from math import fsum, isnan
from random import getstate
from typing import Generic, final

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor
from typing_extensions import TypeVar

from specflow.distribution import BlackBox, Categorical, Distribution, PointMass, flaw_of_sums, no_law
from specflow.errors import DecodeError
from specflow.guards.checks import calls

T = TypeVar("T")
Outcome = TypeVar("Outcome", bound=Hashable)
Image = TypeVar("Image", bound=Hashable)


@final
@frozen
class Turn:
    """A choice: which of several alternatives is taken, and the probabilities of all."""

    index: int
    weights: tuple[float, ...]


@final
@define(eq=False)
class Branch:
    """One way through a program: `specflow.Randomness` whose first choices are scripted and whose others are the first.

    `weight` is the probability of the choices taken so far. What has probability 0 is no alternative.

    >>> branch = Branch((Turn(1, (0.25, 0.75)),))
    >>> branch.draw(Categorical(torch.tensor([0.25, 0.75])), 0), branch.accept(0.5), branch.weight
    (1, True, 0.375)
    """

    script: tuple[Turn, ...] = ()
    weight: float = field(init=False, default=1.0)
    taken: tuple[Turn, ...] = field(init=False, default=())

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token of the law; a `BlackBox` draws its own."""
        return _drawn(law, position, self._token)

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """`draw`, as an id [] on the device of `probs` [V]."""
        return torch.tensor(self.draw(Categorical(probs), position), device=probs.device)

    def accept(self, probability: float, /) -> bool:
        """Both answers, with their probabilities; a certain one is no choice."""
        if not 0.0 < probability < 1.0:
            if isnan(probability):
                raise DecodeError("probability", "a probability is none", probability, "give a number")
            return probability >= 1.0
        return self.choose([probability, 1.0 - probability]) == 0

    def choose(self, weights: Sequence[float]) -> int:
        """The index of one of the alternatives, which have these probabilities."""
        turn, given = len(self.taken), tuple(weights)
        choice = self.script[turn] if turn < len(self.script) else Turn(0, given)
        if choice.weights != given:
            raise AssertionError("the program is not a function of its randomness: build afresh what it remembers")
        self.taken = (*self.taken, choice)
        self.weight *= given[choice.index]
        return choice.index

    def _token(self, probs: list[float]) -> int:
        possible = [(token, p) for token, p in enumerate(probs) if p > 0]
        total = fsum(p for _, p in possible)
        return possible[self.choose([p / total for _, p in possible])][0]


@final
@define(eq=False)
class Noise:
    """`specflow.Sampling` by noise that belongs to a position, every value of it: seed coupling, enumerated.

    Noise at a position is a uniform u, and a law is drawn from by inversion: the token in whose part of [0, 1) u falls.
    Each draw splits the interval that is left at its position, and no more of u is decided: drafter and target, asked
    for laws of one position, share the noise there, as with `specflow.SharedNoise`, for which it stands (see
    `certify_seed`). The ends of the intervals are exact fractions.

    >>> noise = Noise(Branch((Turn(1, (0.25, 0.75)),)))
    >>> law = Categorical(torch.tensor([0.25, 0.75]))
    >>> noise.draw(law, 5), noise.draw(law, 5), noise.branch.weight
    (1, 1, 0.75)
    """

    branch: Branch
    _known: dict[int, tuple[Fraction, Fraction]] = field(init=False, factory=dict)

    def draw(self, law: Distribution, position: int, /) -> int:
        """The token that the noise at `position` makes of the law; a `BlackBox` draws its own and shares nothing."""
        return _drawn(law, position, partial(self._token, position))

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """`draw`, as an id [] on the device of `probs` [V]."""
        return torch.tensor(self.draw(Categorical(probs), position), device=probs.device)

    def _token(self, position: int, probs: list[float]) -> int:
        low, high = self._known.get(position, (Fraction(0), Fraction(1)))
        parts = [Fraction(p) for p in probs]
        total = sum(parts)
        ends = [end / total for end in accumulate(parts, initial=Fraction(0))]
        overlaps = [(token, max(low, a), min(high, b)) for token, (a, b) in enumerate(pairwise(ends))]
        possible = [(token, a, b) for token, a, b in overlaps if a < b]
        token, *narrowed = possible[self.branch.choose([float((b - a) / (high - low)) for _, a, b in possible])]
        self._known[position] = (narrowed[0], narrowed[1])
        return token


def _drawn(law: Distribution, position: int, choose: Callable[[list[float]], int]) -> int:
    """A token of the law: the certain one, what `choose` takes of the probabilities, or what a `BlackBox` draws."""
    match law:
        case PointMass(token):
            return token
        case Categorical():
            probs: list[float] = law.probs.tolist()
            if flaw_of_sums(sum(probs), min(probs), law.probs.dtype) is None:
                return choose(probs)
        case BlackBox():
            return law.draw()
    raise no_law(law, position)


@final
@frozen(eq=False)
class Law(Generic[Outcome]):
    """What a program returns, each outcome with its exact probability, and how many branches led there."""

    probabilities: Mapping[Outcome, float]
    branches: int

    def map(self, function: Callable[[Outcome], Image]) -> Law[Image]:
        """The law of `function` of the outcome."""
        parts: dict[Image, list[float]] = {}
        for outcome, probability in self.probabilities.items():
            parts.setdefault(function(outcome), []).append(probability)
        return Law({image: fsum(part) for image, part in parts.items()}, self.branches)

    def mean(self, quantity: Callable[[Outcome], float]) -> float:
        """The exact expectation of a quantity."""
        return fsum(probability * quantity(outcome) for outcome, probability in self.probabilities.items())

    def of(self, outcome: Outcome) -> float:
        """The probability of an outcome; 0.0 if it does not occur."""
        return self.probabilities.get(outcome, 0.0)

    def distance(self, other: Law[Outcome]) -> float:
        """The total variation ½ Σ |p - p'|: the largest difference that any event can show, from 0 to 1."""
        outcomes = self.probabilities.keys() | other.probabilities.keys()
        return fsum(abs(self.of(outcome) - other.of(outcome)) for outcome in outcomes) / 2

    def worst(self, other: Law[Outcome]) -> Outcome:
        """The outcome whose probability differs most."""
        outcomes = [*self.probabilities, *(outcome for outcome in other.probabilities if not self.of(outcome))]
        return max(outcomes, key=lambda outcome: abs(self.of(outcome) - other.of(outcome)))


def branches(program: Callable[[Branch], T]) -> Iterator[tuple[float, T]]:
    """Every outcome of a program of randomness, with its probability: depth first over all its choices.

    The program runs once per branch, from its beginning, so it must build afresh whatever it remembers.
    `AssertionError` if it does not, or if it draws from torch's or Python's global generator, whose choices cannot be
    enumerated.

    >>> coin = Categorical(torch.tensor([0.5, 0.5]))
    >>> [(weight, heads) for weight, heads in branches(lambda branch: branch.draw(coin, 0) + branch.draw(coin, 1))]
    [(0.25, 0), (0.25, 1), (0.25, 1), (0.25, 2)]
    """
    calls("a program", "give a function of randomness")("program", program)
    script: tuple[Turn, ...] | None = ()
    while script is not None:
        branch = Branch(script)
        before = torch.get_rng_state(), getstate()
        outcome = program(branch)
        if getstate() != before[1] or not torch.equal(torch.get_rng_state(), before[0]):
            raise AssertionError("the program drew from a global generator: use the randomness that it is given")
        yield branch.weight, outcome
        script = _next(branch.taken)


def exact_law(program: Callable[[Branch], Outcome]) -> Law[Outcome]:
    """The exact law of what a program of randomness returns.

    >>> coin = Categorical(torch.tensor([0.25, 0.75]))
    >>> exact_law(lambda branch: branch.draw(coin, 0) + branch.draw(coin, 1)).probabilities
    {0: 0.0625, 1: 0.375, 2: 0.5625}
    """
    weights: dict[Outcome, list[float]] = {}
    for weight, outcome in branches(program):
        weights.setdefault(outcome, []).append(weight)
    law = {outcome: fsum(parts) for outcome, parts in weights.items()}
    return Law(law, sum(map(len, weights.values())))


def _next(taken: tuple[Turn, ...]) -> tuple[Turn, ...] | None:
    """The script of the branch after the one that took these choices, if there is one."""
    for turn in reversed(range(len(taken))):
        choice = taken[turn]
        if choice.index + 1 < len(choice.weights):
            return (*taken[:turn], evolve(choice, index=choice.index + 1))
    return None
