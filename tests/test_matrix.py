"""Every drafter × every gamma policy × every greedy processor × with and without a cache: the text is the oracle's.

And every rule × every drafter, chains and trees. To add one, write a line: `DRAFTERS`, `POLICIES`, `PROCESSORS` and
`RULES` are all there is to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice, product
from typing import Final, final

import pytest
from attrs import evolve, frozen
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from specflow import TEXT as ROOT
from specflow import (
    Block,
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
    LookupTree,
    Match,
    MultinomialProcessor,
    NGramStorage,
    NucleusProcessor,
    PointMass,
    Proposal,
    Reject,
    Rule,
    Tokens,
    TopKNucleusProcessor,
    TopKProcessor,
    Traverse,
    run,
    verified_step,
)
from specflow.accelerate import fast
from specflow.drafters import (
    Corpus,
    CorpusTree,
    GuessingNGramDrafter,
    LogitTree,
    NGramDrafter,
    OneLevelNGramStorage,
    PromptLookup,
    Recycled,
    RecyclingTree,
    SuffixDrafter,
    at_most,
    first_of,
    longest,
    propose_nothing,
    then,
)
from specflow.policies import EGAG, SVIP, AdaEDL, Heuristic, StopAfter, Unsure
from specflow.processors import LogitsProcessor
from specflow.randomness import Randomness
from specflow.stages import Recycle, UpdateNgram
from specflow.state import Request
from specflow.steps import ngram_step
from tests.toys import disturbed, once, oracle, tiny_llama

PROMPT: Final = (3, 4, 5, 6, 3, 4, 5, 6, 3, 4)
NEW: Final = 16
TARGET: Final = tiny_llama(21, vocab_size=24, layers=1)
CLOSE: Final = fast(disturbed(TARGET, 1, 0.05))
STRANGER: Final = fast(tiny_llama(9, vocab_size=24, layers=1))
QUICK: Final = fast(TARGET)
"""The same, where there is a cache: its passes take half the time."""
TEXT: Final = oracle(PROMPT, TARGET, NEW)
STOP: Final = TEXT[-3]


@final
@frozen(eq=False)
class Setting:
    """What a drafter may be made from."""

    processor: LogitsProcessor
    use_cache: bool

    def llm(self, model: Module, widths: tuple[int, ...] = ()) -> Drafter:
        """A model as drafter, under the processor and the cache that the target has."""
        predictor = CachedPredictor(model) if self.use_cache else once(model)
        return LLMDrafter(predictor, self.processor, Dice(), widths=widths)


def taught() -> NGramStorage:
    """A storage that has read the prompt and half of the text."""
    storage = NGramStorage(3, 24)
    storage.initialize([*PROMPT, *TEXT[: NEW // 2]])
    return storage


def recycled() -> Recycled:
    """A table that has read half of the text."""
    table = Recycled(24, n=1)
    text = (*PROMPT, *TEXT[: NEW // 2])
    table.learn([text[:end] for end in range(1, len(text))], [[(token, 0.5), (3, 0.1)] for token in text[1:]])
    return table


def counting_up(tokens: Tokens) -> Iterator[Proposal]:
    return (Proposal((tokens[-1] + i) % 24, PointMass((tokens[-1] + i) % 24)) for i in count(1))


def fanned(setting: Setting) -> Drafter:
    """What a close model drafts, with the next number beside it and other numbers behind all of them."""

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        yield from islice(setting.llm(CLOSE, (2, 2))(tokens), 2)
        yield evolve(next(counting_up(tokens)), parent=ROOT)
        for i in (0, 1, 2):
            yield Proposal(3 + i, parent=i)

    return propose


TREES: dict[str, Callable[[Setting], Drafter]] = {
    "a tree of lookups": lambda setting: LookupTree(),
    "a static tree over a table": lambda setting: RecyclingTree(recycled()),
    "a tree of lookups over a table": lambda setting: LookupTree(recycled()),
    "guesses from a row, each with a lookup": lambda setting: LogitTree(recycled(), PromptLookup()),
    "a tree of a corpus": lambda setting: CorpusTree(
        Corpus.of([[*PROMPT, *TEXT[: NEW // 2], (TEXT[NEW // 2] + 1) % 24, 5], TEXT[4:9]], 24)
    ),
    "a tree of a close model": lambda setting: setting.llm(CLOSE, (2, 1)),
    "a wide tree of a close model": lambda setting: setting.llm(CLOSE, (3, 2)),
    "a tree of two sources": fanned,
    "a lookup, then a tree": lambda setting: then(at_most(1, PromptLookup()), setting.llm(CLOSE, (2, 1))),
}

DRAFTERS: dict[str, Callable[[Setting], Drafter]] = TREES | {
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


RULES: dict[str, Callable[[Randomness], Rule]] = {
    "token rejection": Reject,
    "sample-and-match": Match,
    "block verification": Block,
    "traversal": Traverse,
}


def decoded(
    drafter: str, policy: str, processor: str, use_cache: bool, stop: frozenset[int], rule: str = "token rejection"
) -> DecodeState:
    setting, dice = Setting(PROCESSORS[processor], use_cache), Dice()
    target, meter = CachedPredictor(QUICK) if use_cache else once(TARGET), CostMeter()
    step = verified_step(
        DRAFTERS[drafter](setting),
        meter.timed(target),
        setting.processor,
        dice,
        RULES[rule](dice),
        POLICIES[policy](meter),
        (target,),
    )
    return run(step, DecodeState(Request(PROMPT, len(PROMPT) + NEW, stop), PROMPT)).state


def check(drafter: str, policy: str, rule: str = "token rejection") -> None:
    until_stop = TEXT[: TEXT.index(STOP) + 1]
    for processor, use_cache in product(PROCESSORS, (False, True)):
        name = f"{processor}, {'cached' if use_cache else 'uncached'}"
        for stop, expected in ((frozenset[int](), TEXT), (frozenset({STOP}), until_stop)):
            assert list(decoded(drafter, policy, processor, use_cache, stop, rule).output) == expected, name


@pytest.mark.parametrize(("drafter", "policy"), list(product(DRAFTERS, POLICIES)))
def test_every_combination_is_greedy(drafter: str, policy: str) -> None:
    check(drafter, policy)


@pytest.mark.parametrize(("drafter", "rule"), list(product(DRAFTERS, RULES)))
def test_every_rule_is_greedy_on_chains_and_trees(drafter: str, rule: str) -> None:
    check(drafter, "fixed 5", rule)


def test_the_drafters_are_accepted_and_refused() -> None:
    """A matrix of drafters that are never right, or always, would prove little."""
    for rule in RULES:
        ends = {name: decoded(name, "fixed 5", "greedy", True, frozenset(), rule) for name in DRAFTERS}
        rates = {name: end.tally.acceptance_rate for name, end in ends.items()}
        assert rates["nothing"] == 0.0
        assert rates["the target itself"] == 1.0
        between = [name for name, rate in rates.items() if 0.0 < rate < 1.0]
        assert len(between) >= 9, rates
        assert all(0.0 < rates[name] < 1.0 for name in TREES), rates


@pytest.mark.parametrize("policy", POLICIES)
def test_a_storage_that_learns_on_the_way_changes_nothing(policy: str) -> None:
    for processor, use_cache in product(PROCESSORS.values(), (False, True)):
        storage = taught()
        target, meter = CachedPredictor(QUICK) if use_cache else once(TARGET), CostMeter()
        drafter, update, gamma = NGramDrafter(storage), UpdateNgram(storage), POLICIES[policy](meter)
        step = ngram_step(drafter, meter.timed(target), processor, Dice(), update, gamma, (target,))
        assert list(run(step, DecodeState(Request(PROMPT, len(PROMPT) + NEW), PROMPT)).state.output) == TEXT


@pytest.mark.parametrize("policy", POLICIES)
def test_a_table_that_learns_on_the_way_changes_nothing(policy: str) -> None:
    for processor, use_cache in product(PROCESSORS.values(), (False, True)):
        table = Recycled(24)
        target, meter = CachedPredictor(QUICK) if use_cache else once(TARGET), CostMeter()
        gamma = POLICIES[policy](meter)
        step = ngram_step(
            RecyclingTree(table), meter.timed(target), processor, Dice(), Recycle(table), gamma, (target,)
        )
        assert list(run(step, DecodeState(Request(PROMPT, len(PROMPT) + NEW), PROMPT)).state.output) == TEXT
