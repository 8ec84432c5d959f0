"""Every drafter × every gamma policy × every greedy processor × with and without a cache: the text is the oracle's.

To add one, write a line: `DRAFTERS`, `POLICIES` and `PROCESSORS` are all there is to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, product
from typing import Final, final

import pytest
from attrs import frozen
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from specflow import (
    CachedPredictor,
    CostAware,
    CostMeter,
    DecodeState,
    Dice,
    Drafter,
    Fixed,
    GammaPolicy,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    NGramStorage,
    NucleusProcessor,
    PointMass,
    Proposal,
    Tokens,
    TopKNucleusProcessor,
    TopKProcessor,
    run,
)
from specflow.drafters import (
    GuessingNGramDrafter,
    NGramDrafter,
    OneLevelNGramStorage,
    PromptLookup,
    SuffixDrafter,
    at_most,
    first_of,
    longest,
    propose_nothing,
    then,
)
from specflow.policies import EGAG, SVIP, AdaEDL, Heuristic, StopAfter, Unsure
from specflow.predictors import UncachedPredictor
from specflow.processors import LogitsProcessor
from specflow.stages import UpdateNgram
from specflow.state import Request
from specflow.steps import ngram_step, speculative_step
from tests.toys import disturbed, oracle, tiny_llama

PROMPT: Final = (3, 4, 5, 6, 3, 4, 5, 6, 3, 4)
NEW: Final = 16
TARGET: Final = tiny_llama(21, vocab_size=24, layers=1)
CLOSE: Final = disturbed(TARGET, 1, 0.05)
STRANGER: Final = tiny_llama(9, vocab_size=24, layers=1)
TEXT: Final = oracle(PROMPT, TARGET, NEW)
STOP: Final = TEXT[-3]


@final
@frozen(eq=False)
class Setting:
    """What a drafter may be made from."""

    processor: LogitsProcessor
    use_cache: bool

    def llm(self, model: Module) -> Drafter:
        """A model as drafter, under the processor and the cache that the target has."""
        predictor = CachedPredictor(model) if self.use_cache else UncachedPredictor(model)
        return LLMDrafter(predictor, self.processor, Dice())


def taught() -> NGramStorage:
    """A storage that has read the prompt and half of the text."""
    storage = NGramStorage(3, 24)
    storage.initialize([*PROMPT, *TEXT[: NEW // 2]])
    return storage


def counting_up(tokens: Tokens) -> Iterator[Proposal]:
    return (Proposal((tokens[-1] + i) % 24, PointMass((tokens[-1] + i) % 24)) for i in count(1))


DRAFTERS: dict[str, Callable[[Setting], Drafter]] = {
    "nothing": lambda setting: propose_nothing,
    "the target itself": lambda setting: setting.llm(TARGET),
    "a close model": lambda setting: setting.llm(CLOSE),
    "a stranger": lambda setting: setting.llm(STRANGER),
    "counting up": lambda setting: counting_up,
    "lookup": lambda setting: PromptLookup(),
    "suffix": lambda setting: SuffixDrafter(),
    "n-grams": lambda setting: NGramDrafter(taught()),
    "n-grams, guessing": lambda setting: GuessingNGramDrafter(OneLevelNGramStorage(2, 24)),
    "n-grams or a model": lambda setting: first_of(NGramDrafter(taught()), setting.llm(CLOSE)),
    "suffix, then a model": lambda setting: then(at_most(2, SuffixDrafter()), setting.llm(CLOSE)),
    "the longest of two": lambda setting: longest(PromptLookup(), at_most(4, NGramDrafter(taught()))),
}

POLICIES: dict[str, Callable[[CostMeter], GammaPolicy]] = {
    "fixed 1": lambda meter: Fixed(1),
    "fixed 5": lambda meter: Fixed(5),
    "egag": lambda meter: EGAG(1, 8),
    "smooth egag": lambda meter: EGAG(2, 8, ema_beta=0.7, temperature=0.5),
    "heuristic": lambda meter: Heuristic(3),
    "unsure": lambda meter: StopAfter(Unsure()),
    "svip": lambda meter: StopAfter(SVIP(), Heuristic(4)),
    "adaedl": lambda meter: StopAfter(AdaEDL(), StopAfter(Unsure(0.2), EGAG(1, 9))),
    "cost-aware": lambda meter: CostAware(meter, most=8),
}


class OfOnesOwn(LogitsProcessor):
    """A user's sampler, whose law nobody knows."""

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return logits

    @override
    def sample(self, probs: Tensor) -> Tensor:
        return probs.max(dim=-1, keepdim=True).indices


PROCESSORS: dict[str, LogitsProcessor] = {
    "greedy": GreedyProcessor(),
    "cold": MultinomialProcessor(1e-9),
    "top-k": TopKProcessor(1.0, 1),
    "nucleus": NucleusProcessor(1.0, 1e-9),
    "top-k and nucleus": TopKNucleusProcessor(2.0, 1, 0.9),
    "of one's own": OfOnesOwn(),
}
"""Each of them leaves one token possible, so its text is the greedy one."""


def decoded(drafter: str, policy: str, processor: str, use_cache: bool, stop: frozenset[int]) -> DecodeState:
    setting = Setting(PROCESSORS[processor], use_cache)
    target, meter = CachedPredictor(TARGET) if use_cache else UncachedPredictor(TARGET), CostMeter()
    step = speculative_step(
        DRAFTERS[drafter](setting), meter.timed(target), setting.processor, Dice(), POLICIES[policy](meter), (target,)
    )
    return run(step, DecodeState(Request(PROMPT, len(PROMPT) + NEW, stop), PROMPT)).state


@pytest.mark.parametrize(("drafter", "policy"), list(product(DRAFTERS, POLICIES)))
def test_every_combination_is_greedy(drafter: str, policy: str) -> None:
    until_stop = TEXT[: TEXT.index(STOP) + 1]
    for processor, use_cache in product(PROCESSORS, (False, True)):
        name = f"{processor}, {'cached' if use_cache else 'uncached'}"
        assert list(decoded(drafter, policy, processor, use_cache, frozenset()).output) == TEXT, name
        assert list(decoded(drafter, policy, processor, use_cache, frozenset({STOP})).output) == until_stop, name


def test_the_drafters_are_accepted_and_refused() -> None:
    """A matrix of drafters that are never right, or always, would prove little."""
    rates = {name: decoded(name, "fixed 5", "greedy", True, frozenset()).tally.acceptance_rate for name in DRAFTERS}
    assert rates["nothing"] == 0.0
    assert rates["the target itself"] == 1.0
    between = [name for name, rate in rates.items() if 0.0 < rate < 1.0]
    assert len(between) >= 6, rates


@pytest.mark.parametrize("policy", POLICIES)
def test_a_storage_that_learns_on_the_way_changes_nothing(policy: str) -> None:
    for processor, use_cache in product(PROCESSORS.values(), (False, True)):
        storage = taught()
        target, meter = CachedPredictor(TARGET) if use_cache else UncachedPredictor(TARGET), CostMeter()
        drafter, update, gamma = NGramDrafter(storage), UpdateNgram(storage), POLICIES[policy](meter)
        step = ngram_step(drafter, meter.timed(target), processor, Dice(), update, gamma, (target,))
        assert list(run(step, DecodeState(Request(PROMPT, len(PROMPT) + NEW), PROMPT)).state.output) == TEXT
