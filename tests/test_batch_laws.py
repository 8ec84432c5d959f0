"""The certificate over batches: two texts that share their passes have the laws that each has alone, independently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import pytest
from attrs import evolve

from specflow import DecodeState, Fixed, GreedyProcessor, Predictor, Step, TopKProcessor, run
from specflow.batch import Asked, Failed, Reply, Shared, together
from specflow.state import Request
from specflow.testing import Branch, Case, Ending, ExactnessError, HiddenProcessor, Noise, World, same_law
from specflow.testing.certificate import autoregressive
from tests.mutants import Undecided
from tests.test_certificate import CERTAIN_TREES, CHAINS, COUPLED, DECODERS, RULES, TREES, by_rule, coupled

WORLDS: Final = (
    Case(2, (0,), 3, seed=15),
    Case(2, (1, 0), 2, frozenset({1}), seed=16),
    Case(3, (2, 0), 2, processor=lambda rng: TopKProcessor(0.8, 2), seed=6),
    Case(2, (1, 1), 2, processor=HiddenProcessor, seed=12),
    Case(3, (0, 1), 5, processor=lambda rng: GreedyProcessor(), seed=13),
)
"""Small ones: two texts have as many branches as the product of both."""


def shared(model: Predictor) -> Predictor:
    """The model, its passes shared; whoever asks second is answered a pass later, whenever both ask."""
    turns = [1]

    def read(asks: Sequence[Asked]) -> list[Reply]:
        turns[0] += 1
        late = turns[0] % 2 if len(asks) > 1 else None
        return [None if i == late else model(each.tokens, each.drafts) for i, each in enumerate(asks)]

    return Shared(read)


def second_of(start: DecodeState) -> DecodeState:
    """The start of another text, which has one token more to begin with."""
    prompt = (*start.tokens, 1)
    return DecodeState(Request(prompt, start.request.limit + 1, start.request.stop), prompt)


def apart(world: World) -> tuple[World, World]:
    """Two texts that share nothing but models: each draws for itself."""
    assert isinstance(world.rng, Branch)
    return world, evolve(world, start=second_of(world.start), noise=Noise(world.rng))


def both(compose: Callable[[World], Step], worlds: tuple[World, World]) -> tuple[Ending, Ending]:
    """Two texts in one batch."""
    target, drafter = shared(worlds[0].target), shared(worlds[0].drafter)

    def decode(world: World) -> Ending:
        return Ending.of(run(compose(evolve(world, target=target, drafter=drafter)), world.start))

    ends = dict(together([partial(decode, world) for world in worlds], 2))
    for end in ends.values():
        if isinstance(end, Failed):
            raise end.error
    first, second = (end for _, end in sorted(ends.items()) if isinstance(end, Ending))
    return first, second


def certify_two(compose: Callable[[World], Step], cases: Sequence[Case] = WORLDS) -> None:
    """Checks that the joint law of both texts is the product of both autoregressive laws."""

    def alone(world: World) -> tuple[Ending, Ending]:
        first, second = (autoregressive(each, world.rng) for each in apart(world))
        return first, second

    same_law(lambda world: both(compose, apart(world)), alone, cases)


@pytest.mark.parametrize("name", DECODERS)
def test_two_texts_of_any_decoder_are_exact_and_independent(name: str) -> None:
    certify_two(DECODERS[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*CHAINS, *CERTAIN_TREES])
def test_two_texts_by_any_rule_are_exact_and_independent_on_chains_and_certain_trees(name: str, rule: str) -> None:
    drafter = (CHAINS | CERTAIN_TREES)[name]
    certify_two(lambda world: by_rule(RULES[rule], world, drafter(world), Fixed(2)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", TREES)
def test_two_texts_by_any_rule_are_exact_and_independent_on_drawn_trees(name: str, rule: str) -> None:
    certify_two(lambda world: by_rule(RULES[rule], world, TREES[name](world), Fixed(3)))


def certify_two_seeds(compose: Callable[[World], Step]) -> None:
    """Checks that each of two texts depends on its own noise alone: it is the text without any drafter and alone."""

    def texts(world: World) -> bool:
        worlds = apart(world)
        first, second = (autoregressive(each, each.noise) for each in worlds)
        return both(compose, worlds) == (first, second)

    for case in WORLDS:
        if case.processor is not HiddenProcessor:
            assert case.law(texts).probabilities.keys() == {True}


@pytest.mark.parametrize("name", COUPLED)
def test_two_seeds_have_one_text_each(name: str) -> None:
    certify_two_seeds(COUPLED[name])


@pytest.mark.parametrize("name", [*CERTAIN_TREES, *TREES])
def test_two_seeds_have_one_text_each_on_trees(name: str) -> None:
    drafter = (CERTAIN_TREES | TREES)[name]
    certify_two_seeds(lambda world: coupled(world, drafter(evolve(world, rng=Undecided(world.noise))), Fixed(3)))


def test_two_texts_that_draw_from_one_noise_are_not_independent() -> None:
    """The check can fail: each of them is exact, and together they are not."""

    def program(world: World) -> tuple[Ending, Ending]:
        first, second = apart(world)
        return both(COUPLED["certain drafts"], (first, evolve(second, noise=first.noise)))

    def reference(world: World) -> tuple[Ending, Ending]:
        first, second = (autoregressive(each, world.rng) for each in apart(world))
        return first, second

    with pytest.raises(ExactnessError):
        same_law(program, reference, WORLDS[:1])
