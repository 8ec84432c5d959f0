"""The laws of the algebra of drafters, and exactness through every drafter and combination."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import count, islice
from random import Random
from typing import final

import pytest
import torch
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from specflow import (
    TEXT,
    CachedPredictor,
    Categorical,
    DecodeError,
    Dice,
    Drafter,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    MultinomialProcessor,
    NGramDrafter,
    NGramStorage,
    PointMass,
    PromptLookup,
    Proposal,
    SuffixDrafter,
    Tokens,
    at_most,
    autoregressive_generate,
    first_of,
    longest,
    run,
    speculative_step,
    start,
    then,
)
from specflow.accelerate import fast
from specflow.distribution import Distribution
from specflow.drafters import as_chain, merged, propose_nothing
from specflow.models import Loaded
from specflow.predictors import UncachedPredictor
from specflow.randomness import Randomness
from specflow.stages import Draft
from specflow.state import BEFORE, CertainDrafter, Count, parents_of
from specflow.trees import path_to
from tests.toys import VOCABULARY, disturbed, once, oracle, tiny_gpt2, tiny_llama


def toy(seed: int) -> CertainDrafter:
    """A drafter that proposes up to 3 tokens, or none, depending on the text in no simple way."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        random = Random(f"{seed} {tokens}")
        for _ in range(random.randrange(4)):
            token = random.randrange(5)
            yield Proposal(token, source=f"toy {seed}")

    return draft


def forever(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    return (Proposal(token) for token in count(tokens[-1] + 1))


drafters = st.integers(0, 7).map(lambda seed: propose_nothing if seed == 0 else toy(seed))
texts = st.lists(st.integers(0, 4), min_size=1, max_size=6).map(tuple)
Combine = Callable[..., CertainDrafter]


def said(drafter: Drafter, tokens: Tokens) -> list[tuple[int, Distribution, str]]:
    return [(proposal.token, proposal.q, proposal.source) for proposal in drafter(tokens)]


@pytest.mark.parametrize("combine", [first_of, then, longest])
@settings(deadline=None)
@given(a=drafters, b=drafters, c=drafters, text=texts)
def test_associative_with_a_unit(
    combine: Combine, a: CertainDrafter, b: CertainDrafter, c: CertainDrafter, text: Tokens
) -> None:
    flat = said(combine(a, b, c), text)
    assert flat == said(combine(combine(a, b), c), text) == said(combine(a, combine(b, c)), text)
    assert said(combine(a, propose_nothing), text) == said(combine(propose_nothing, a), text) == said(a, text)
    assert said(combine(), text) == said(propose_nothing, text) == []
    assert said(combine(a), text) == said(a, text)


@settings(deadline=None)
@given(a=drafters, b=drafters, text=texts)
def test_what_each_combination_says(a: CertainDrafter, b: CertainDrafter, text: Tokens) -> None:
    mine, yours = said(a, text), said(b, text)
    assert said(first_of(a, b), text) == (mine or yours)
    assert said(longest(a, b), text) == (yours if len(yours) > len(mine) else mine)
    assert said(longest(a, a), text) == mine
    assert said(then(a, b), text) == mine + said(b, (*text, *(token for token, _, _ in mine)))


@settings(deadline=None)
@given(a=drafters, b=drafters, j=st.integers(0, 5), k=st.integers(0, 5), text=texts)
def test_at_most(a: CertainDrafter, b: CertainDrafter, j: int, k: int, text: Tokens) -> None:
    assert said(at_most(k, a), text) == said(a, text)[:k]
    assert said(at_most(0, a), text) == []
    assert said(at_most(j, at_most(k, a)), text) == said(at_most(min(j, k), a), text)
    if k > 0:
        assert said(at_most(k, first_of(a, b)), text) == said(first_of(at_most(k, a), at_most(k, b)), text)


def test_a_chain_behind_another_drafter_ends_at_a_stop_token() -> None:
    """Whoever drafts it is not asked behind the end of the text."""
    asked: list[Tokens] = []

    def counts(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        while True:
            asked.append(tokens)
            tokens = (*tokens, tokens[-1] + 1)
            yield Proposal(tokens[-1])

    drafted = Draft(then(at_most(1, counts), counts), Fixed(9))(start((0,), 20, (3,)).unwrap())
    assert drafted.tokens == (1, 2, 3)
    assert asked == [(0,), (0, 1), (0, 1, 2)]


def test_at_most_refuses_a_negative_number() -> None:
    with pytest.raises(DecodeError, match="k is below 0"):
        at_most(-1, forever)


def test_a_list_of_drafts_is_a_stream_too() -> None:
    def listed(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        return [Proposal(5), Proposal(6)]  # type: ignore[return-value]

    for combined in (
        first_of(listed),
        then(listed),
        longest(listed),
        merged(listed),
        at_most(9, listed),
        as_chain(listed),
    ):
        assert [proposal.token for proposal in combined((1,))] == [5, 6]


def test_nothing_is_drafted_that_nobody_takes() -> None:
    """A drafter may be a model: it must not run for a proposal that is not pulled, nor when another one speaks."""
    pulled: list[int] = []

    def watched(tokens: Tokens) -> Iterator[Proposal]:
        for proposal in forever(tokens):
            pulled.append(proposal.token)
            yield proposal

    assert len(said(at_most(2, watched), (0,))) == 2
    assert pulled == [1, 2]
    assert [token for token, _, _ in islice(said(then(at_most(3, forever), at_most(1, watched)), (0,)), 3)] == [1, 2, 3]
    pulled.clear()
    stream = then(at_most(3, forever), watched)((0,))
    assert [next(stream).token for _ in range(3)] == [1, 2, 3]
    assert next(first_of(forever, watched)((0,))).token == 1
    first_of(watched, forever)((0,))
    assert pulled == []


# Trees are combined as chains are.


def toy_tree(seed: int) -> CertainDrafter:
    """Up to 5 drafts, each behind any earlier one or the text."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        random = Random(f"tree {seed} {tokens}")
        for i in range(random.randrange(6)):
            token, parent = random.randrange(5), random.randrange(-2, i)
            yield Proposal(token, parent=parent, source=f"tree {seed}")

    return draft


branching = st.integers(0, 9).map(
    lambda seed: propose_nothing if seed == 0 else toy(seed) if seed < 4 else toy_tree(seed)
)


def shape(drafter: Drafter, tokens: Tokens) -> list[tuple[int, int, str]]:
    """Each draft's token, what it follows, and who drafted it."""
    drafts = tuple(drafter(tokens))
    return [(draft.token, parent, draft.source) for draft, parent in zip(drafts, parents_of(drafts), strict=True)]


def trunk_of(drafts: list[tuple[int, int, str]]) -> list[int]:
    """From the text down, always the first draft that follows."""
    trunk: list[int] = []
    for i, (_, parent, _) in enumerate(drafts):
        if parent == (trunk[-1] if trunk else TEXT):
            trunk.append(i)
    return trunk


@pytest.mark.parametrize("combine", [first_of, then, longest])
@settings(deadline=None)
@given(a=branching, b=branching, c=branching, text=texts)
def test_trees_are_associative_with_a_unit(
    combine: Combine, a: CertainDrafter, b: CertainDrafter, c: CertainDrafter, text: Tokens
) -> None:
    flat = shape(combine(a, b, c), text)
    assert flat == shape(combine(combine(a, b), c), text) == shape(combine(a, combine(b, c)), text)
    assert shape(combine(a, propose_nothing), text) == shape(combine(propose_nothing, a), text) == shape(a, text)


@settings(deadline=None)
@given(a=branching, b=branching, k=st.integers(0, 6), text=texts)
def test_what_each_combination_of_trees_says(a: CertainDrafter, b: CertainDrafter, k: int, text: Tokens) -> None:
    mine, yours = shape(a, text), shape(b, text)
    assert shape(first_of(a, b), text) == (mine or yours)
    assert shape(at_most(k, a), text) == mine[:k]
    deep = [max((len(trees_path(drafts, i)) for i in range(len(drafts))), default=0) for drafts in (mine, yours)]
    assert shape(longest(a, b), text) == (yours if deep[1] > deep[0] else mine)
    trunk = trunk_of(mine)
    end = trunk[-1] if trunk else TEXT
    behind = shape(b, (*text, *[mine[i][0] for i in trunk]))
    moved = [(token, end if parent == TEXT else len(mine) + parent, source) for token, parent, source in behind]
    assert shape(then(a, b), text) == mine + moved


def weighed(seed: int) -> CertainDrafter:
    """Different drafts, each behind an earlier one or the text; no later one is likelier, and some are as likely."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        random, seen, chance = Random(f"weighed {seed} {tokens}"), set[tuple[int, int]](), 1.0
        for _ in range(random.randrange(7)):
            place = random.randrange(-1, len(seen)), random.randrange(3)
            if place not in seen:
                seen.add(place)
                chance *= random.choice((1.0, 0.5))
                parent, token = place
                follows = BEFORE if parent == len(seen) - 2 and random.random() < 0.5 else parent
                yield Proposal(token, parent=follows, source=f"weighed {seed}", chance=chance)

    return draft


weighing = st.integers(0, 40).map(lambda seed: propose_nothing if seed == 0 else weighed(seed))


def paths(drafter: Drafter, tokens: Tokens) -> dict[Tokens, tuple[float | None, str]]:
    """Each draft's path of tokens, with its chance and who drafted it, in their order."""
    drafts = tuple(drafter(tokens))
    parents = parents_of(drafts)
    spelled = [tuple(drafts[i].token for i in path_to(parents, number)) for number in range(len(drafts))]
    assert len({*spelled}) == len(spelled)  # nothing is drafted twice
    return {path: (draft.chance, draft.source) for path, draft in zip(spelled, drafts, strict=True)}


@settings(deadline=None)
@given(a=weighing, b=weighing, c=weighing, text=texts)
def test_merged_trees_hold_what_each_proposes_the_likeliest_first(
    a: CertainDrafter, b: CertainDrafter, c: CertainDrafter, text: Tokens
) -> None:
    mine, yours, merger = paths(a, text), paths(b, text), paths(merged(a, b), text)
    assert merger.keys() == mine.keys() | yours.keys()
    for path, (chance, source) in merger.items():
        said = [each[path] for each in (mine, yours) if path in each]
        assert (chance, source) == max(said, key=lambda one: one[0] or 0.0)  # of equals the first
    chances = [chance or 0.0 for chance, _ in merger.values()]
    assert chances == sorted(chances, reverse=True)
    assert shape(merged(a, a), text) == shape(a, text) == shape(merged(a), text)
    assert shape(merged(a, propose_nothing), text) == shape(merged(propose_nothing, a), text) == shape(a, text)
    flat = shape(merged(a, b, c), text)
    assert flat == shape(merged(merged(a, b), c), text) == shape(merged(a, merged(b, c)), text)
    assert shape(merged(), text) == []


def test_a_draft_without_a_chance_is_merged_first_and_a_chain_stays_one() -> None:
    def copied(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        yield Proposal(5)
        yield Proposal(6)

    def guessed(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        yield Proposal(5, chance=0.9)
        yield Proposal(7, chance=0.8)

    assert shape(merged(guessed, copied), (1,)) == [(5, TEXT, "draft"), (6, 0, "draft"), (7, 0, "draft")]
    assert [draft.parent for draft in merged(copied, propose_nothing)((1,))] == [BEFORE, BEFORE]
    for chance in (float("nan"), float("inf"), "likely"):

        def wrong(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
            yield Proposal(5, chance=chance)  # type: ignore[arg-type]  # noqa: B023 - asked at once

        with pytest.raises(DecodeError, match="chance is not a finite number"):
            list(merged(wrong)((1,)))


def test_merging_reads_one_draft_of_each_ahead() -> None:
    pulled: list[str] = []

    def watched(name: str) -> CertainDrafter:
        def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
            for i in count(1):
                pulled.append(name)
                yield Proposal(tokens[-1] + i, source=name, chance=1 / i)

        return draft

    stream = merged(watched("a"), watched("b"))((0,))
    assert next(stream).source == "a"
    assert pulled == ["a", "b"]
    assert next(stream).source == "a"  # 1/2, after b's first, which a proposed already
    assert pulled == ["a", "b", "a", "b"]


def trees_path(drafts: list[tuple[int, int, str]], i: int) -> list[int]:
    return path_to([parent for _, parent, _ in drafts], i)


def test_behind_a_tree_the_next_drafter_goes_on_at_the_first_of_its_drafts() -> None:
    def bush(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        for token, parent in ((5, TEXT), (6, TEXT), (7, 0), (9, 1), (8, 2), (4, 2)):
            yield Proposal(token, parent=parent, source="bush")

    asked: list[Tokens] = []

    def listening(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        asked.append(tokens)
        for token, parent in ((1, BEFORE), (2, TEXT), (3, 0)):
            yield Proposal(token, parent=parent, source="listening")

    told = shape(then(bush, listening, at_most(1, forever)), (0,))
    assert asked == [(0, 5, 7, 8)]
    assert told[6:] == [(1, 4, "listening"), (2, 4, "listening"), (3, 6, "listening"), (4, 8, "draft")]


def test_a_tree_of_many_is_not_longer_than_a_longer_chain() -> None:
    def wide(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        return (Proposal(token, parent=TEXT, source="wide") for token in range(9))

    assert [source for *_, source in shape(longest(wide, at_most(2, forever)), (0,))] == ["draft", "draft"]
    assert len(shape(longest(wide, at_most(1, forever)), (0,))) == 9, "among equals the earliest"


def test_a_model_goes_on_behind_a_tree() -> None:
    """From the likeliest path, with its own law there; and the text stays greedy."""
    target = tiny_llama(0)
    close, text = UncachedPredictor(disturbed(target, 1, 0.02)), (1, 2, 3, 9, 1, 2, 3, 8, 1, 2)
    for widths in ((), (2,)):
        drafter = then(at_most(4, LookupTree()), LLMDrafter(close, MultinomialProcessor(1.0), Dice(), widths=widths))
        drafts = tuple(islice(drafter(text), 7))
        parents, sources = parents_of(drafts), [draft.source for draft in drafts]
        assert sources == ["suffix"] * 4 + ["llm"] * 3
        trunk = trunk_of(list(zip([draft.token for draft in drafts], parents, sources, strict=True))[:4])
        assert parents[4:] == ((trunk[-1], 4, 5) if not widths else (trunk[-1], trunk[-1], 4))
        q = drafts[4].q
        assert isinstance(q, Categorical)
        expected = close((*text, *[drafts[i].token for i in trunk]), ())[0].softmax(-1)
        torch.testing.assert_close(q.probs, expected)
        greedily = then(at_most(4, LookupTree()), LLMDrafter(close, GreedyProcessor(), Dice(), widths=widths))
        step = speculative_step(greedily, CachedPredictor(target), GreedyProcessor(), Dice(), Fixed(8))
        end = run(step, start(text, LENGTH).unwrap()).state
        assert list(end.output) == oracle(text, target, LENGTH)
        assert dict(end.tally.sources)["llm"].accepted > 0
        assert dict(end.tally.sources)["suffix"].drafted > 0


LENGTH = 30


TARGETS = {
    "llama": tiny_llama(0),
    "llama fp32": tiny_llama(3, layers=1, dtype=torch.float32),
    "gpt2": tiny_gpt2(0, layers=1),
}
CLOSE = fast(disturbed(TARGETS["llama"], 1, 0.02))
ELSEWHERE = oracle((3, 4, 5), CLOSE, LENGTH)
"""Another text, for a memory."""


def combinations(cached: bool) -> dict[str, tuple[Drafter, tuple[CachedPredictor, ...]]]:
    """Every drafter and combination, and the memos behind it."""
    suffix, lookup = SuffixDrafter(), PromptLookup(3)
    memo = CachedPredictor(CLOSE)
    llm = LLMDrafter(memo if cached else once(CLOSE), GreedyProcessor(), Dice())
    memos = (memo,) if cached else ()
    forked = LLMDrafter(memo if cached else once(CLOSE), GreedyProcessor(), Dice(), widths=(2, 2))
    storage = NGramStorage(3, VOCABULARY)
    storage.initialize(ELSEWHERE)
    memory = at_most(3, NGramDrafter(storage, VOCABULARY, source="memory"))
    return {
        "suffix": (suffix, ()),
        "suffix of long matches": (SuffixDrafter(shortest=3, factor=1, offset=0), ()),
        "lookup": (lookup, ()),
        "nothing": (propose_nothing, ()),
        "first_of": (first_of(SuffixDrafter(shortest=4), lookup), ()),
        "longest": (longest(lookup, suffix), ()),
        "at_most": (at_most(2, suffix), ()),
        "suffix then llm": (then(at_most(2, suffix), llm), memos),
        "llm then suffix": (then(at_most(2, llm), suffix), memos),
        "suffix or llm": (first_of(SuffixDrafter(shortest=2), llm), memos),
        "suffix or memory": (first_of(suffix, memory), ()),
        "tree": (LookupTree(), ()),
        "tree then llm": (then(at_most(3, LookupTree()), llm), memos),
        "tree of the llm, or suffix": (first_of(at_most(7, forked), suffix), memos),
        "tree or llm": (first_of(LookupTree(), llm), memos),
        "all": (first_of(longest(SuffixDrafter(shortest=3), at_most(1, lookup)), then(at_most(1, llm), suffix)), memos),
    }


NAMES = list(combinations(False))
PROMPTS = ((3,), (3, 4, 5), (7,) * 6, (5, 6, 7, 8) * 5, tuple(range(40)), (1, 2, 3, 9, 1, 2, 3, 8, 1, 2))


def greedy(
    drafter: Drafter, memos: tuple[CachedPredictor, ...], target: PreTrainedModel, prompt: Tokens, gamma: int,
    cached: bool, stop: tuple[int, ...] = (),
) -> Finished:  # fmt: skip
    predictor = CachedPredictor(target) if cached else once(target)
    step = speculative_step(drafter, predictor, GreedyProcessor(), Dice(), Fixed(gamma), (*memos, predictor))
    return run(step, start(prompt, LENGTH, stop).unwrap())


@cache
def greedy_text(target: str, prompt: Tokens) -> list[int]:
    return oracle(prompt, TARGETS[target], LENGTH)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_greedy_equals_the_oracle(target: str, name: str, cached: bool) -> None:
    """One drafter decodes all prompts, so its memo meets text after text; and each prompt once with an eos in it."""
    drafter, memos = combinations(cached)[name]
    for prompt, gamma in zip(PROMPTS, (1, 2, 5, 9, 20, 5), strict=True):
        text = greedy_text(target, prompt)
        assert list(greedy(drafter, memos, TARGETS[target], prompt, gamma, cached).state.output) == text
        eos = text[LENGTH // 2]
        ended = greedy(drafter, memos, TARGETS[target], prompt, gamma, cached, (eos,))
        assert list(ended.state.output) == text[: text.index(eos) + 1]


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_accepted(name: str) -> None:
    """The matrix above would prove little if nothing were ever accepted, or everything."""
    target = TARGETS["llama"]
    drafter, memos = combinations(True)[name]
    tallies = [greedy(drafter, memos, target, prompt, 5, True).state.tally for prompt in PROMPTS]
    accepted, drafted = sum(tally.accepted for tally in tallies), sum(tally.drafted for tally in tallies)
    assert (0 < accepted < drafted) != (name == "nothing")


def test_real_model_equals_its_own_greedy_text(smollm2: Loaded) -> None:
    """Suffix drafts and a memory of another answer; the prompt asks for repetition, and the memory is of use."""
    eos, predictor = tuple(smollm2.stop), CachedPredictor(smollm2.model)
    memory = NGramStorage(4, 49152)
    memory.initialize(
        autoregressive_generate(list(smollm2.chat("List three fruits.")), smollm2.model, 24, use_cache=True)
    )
    drafter = first_of(SuffixDrafter(), at_most(4, NGramDrafter(memory, source="memory")))
    prompt = smollm2.chat("List three fruits, then list them again.")
    expected = autoregressive_generate(list(prompt), smollm2.model, 48, eos_tokens_id=list(eos), use_cache=True)
    step = speculative_step(drafter, predictor, GreedyProcessor(), Dice(), Fixed(10))
    state = run(step, start(prompt, 48, eos).unwrap()).state
    assert list(state.output) == expected
    assert all(counted.accepted > 0 for _, counted in state.tally.sources)
    assert [source for source, _ in state.tally.sources] == ["memory", "suffix"]


def test_the_tally_tells_who_proposed_and_who_was_accepted() -> None:
    """The target always says 2: of the drafts 2 | 2 2 9, those of a and two of b's stand."""

    def saying(source: str, *tokens: int) -> CertainDrafter:
        return lambda _: iter([Proposal(token, source=source) for token in tokens])

    def always_two(tokens: Tokens, drafts: Sequence[Proposal]) -> torch.Tensor:
        return torch.eye(10)[2].expand(len(drafts) + 1, 10)

    drafter = then(first_of(propose_nothing, saying("a", 2), saying("unheard", 2)), saying("b", 2, 2, 9))
    step = speculative_step(drafter, always_two, GreedyProcessor(), Dice())
    state = run(step, start((1,), 8).unwrap()).state
    # Two steps of four tokens each; the second has room for three drafts.
    assert state.tally.steps == 2
    assert dict(state.tally.sources) == {"a": Count(2, 2), "b": Count(5, 4)}
    assert state.mean_accepted_length == 4.0


# Which laws stay exact: every branch of a toy decode is walked, with its probability.

TARGET = torch.tensor([0.25, 0.75], dtype=torch.float64)
COIN = Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64))


@final
@define
class Branch:
    """Randomness that follows a script of choices, takes the first one behind it, and keeps the probability."""

    script: list[int]
    weight: float = 1.0
    options: list[list[float]] = field(factory=list)

    def _choose(self, probabilities: list[float]) -> int:
        turn = len(self.options)
        choice = self.script[turn] if turn < len(self.script) else 0
        self.options.append(probabilities)
        self.weight *= probabilities[choice]
        return choice

    def draw(self, law: Distribution, position: int, /) -> int:
        if isinstance(law, PointMass):
            return law.token
        assert isinstance(law, Categorical)
        return self._choose(law.probs.tolist())

    def draw_there(self, probs: torch.Tensor, position: int, /) -> torch.Tensor:
        return torch.tensor(self.draw(Categorical(probs), position))

    def accept(self, probability: float, /) -> bool:
        return self._choose([min(probability, 1.0), max(0.0, 1.0 - probability)]) == 0


def law_of(make: Callable[[Randomness], Drafter], length: int) -> dict[Tokens, float]:
    """The exact law of the first `length` tokens of a target that draws from TARGET each time."""

    def predict(tokens: Tokens, drafts: Sequence[Proposal]) -> torch.Tensor:
        return TARGET.log().expand(len(drafts) + 1, 2)

    law: dict[Tokens, float] = {}
    scripts: list[list[int]] = [[]]
    while scripts:
        branch = Branch(scripts.pop())
        step = speculative_step(make(branch), predict, MultinomialProcessor(1.0), branch)
        output = run(step, start((0,), length).unwrap()).state.output
        law[output] = law.get(output, 0.0) + branch.weight
        for turn in range(len(branch.script), len(branch.options)):
            taken = [*branch.script, *[0] * (turn - len(branch.script))]
            scripts += [[*taken, choice] for choice in range(1, len(branch.options[turn]))]
    return {output: weight for output, weight in law.items() if weight > 0}


def exact(length: int) -> dict[Tokens, float]:
    law: dict[Tokens, float] = {(): 1.0}
    for _ in range(length):
        law = {(*text, token): weight * float(TARGET[token]) for text, weight in law.items() for token in (0, 1)}
    return law


def sampled(rng: Randomness) -> Drafter:
    """Tosses a coin, and goes on with certainty if it shows 0: how long the draft is depends on the draw."""

    def draft(tokens: Tokens) -> Iterator[Proposal]:
        first = rng.draw(COIN, len(tokens))
        yield Proposal(first, COIN, source="coin")
        if first == 0:
            yield Proposal(0, source="coin")

    return draft


def one(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    yield Proposal(1, source="one")


def both(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """A certain tree: both tokens, and one of them again behind the second."""
    for token, parent in ((0, TEXT), (1, TEXT), (0, BEFORE)):
        yield Proposal(token, parent=parent, source="both")


def sampled_tree(rng: Randomness) -> Drafter:
    """Draws a token, the other one beside it, and if the first shows 0 one more behind it."""

    def draft(tokens: Tokens) -> Iterator[Proposal]:
        first = rng.draw(COIN, len(tokens))
        yield Proposal(first, COIN, source="coin")
        other = COIN.probs.index_fill(0, torch.tensor(first), 0.0)
        yield Proposal(1 - first, Categorical(other / other.sum()), parent=TEXT, source="coin")
        if first == 0:
            yield Proposal(rng.draw(COIN, len(tokens) + 1), COIN, parent=0, source="coin")

    return draft


@pytest.mark.parametrize(
    "make",
    [
        sampled,
        lambda rng: first_of(sampled(rng), one),
        lambda rng: first_of(one, sampled(rng)),
        lambda rng: then(sampled(rng), one),
        lambda rng: then(one, at_most(1, sampled(rng)), sampled(rng)),
        lambda rng: at_most(1, sampled(rng)),
        lambda rng: longest(one, then(one, one), SuffixDrafter(), PromptLookup()),
        sampled_tree,
        lambda rng: first_of(propose_nothing, sampled_tree(rng), one),
        lambda rng: then(sampled_tree(rng), one),
        lambda rng: then(both, sampled(rng)),
        lambda rng: then(sampled_tree(rng), sampled_tree(rng)),
        lambda rng: at_most(2, sampled_tree(rng)),
        lambda rng: longest(one, both, then(both, both), LookupTree()),
    ],
    ids=[
        "sampled",
        "first_of",
        "first_of certain",
        "then",
        "then then",
        "at_most",
        "longest certain",
        "sampled tree",
        "first_of trees",
        "then behind a tree",
        "then behind a certain tree",
        "a tree behind a tree",
        "at_most of a tree",
        "longest of trees",
    ],
)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_combinations_keep_the_law_of_the_target(make: Callable[[Randomness], Drafter], length: int) -> None:
    assert law_of(make, length) == pytest.approx(exact(length), abs=1e-12)


def test_the_longest_of_sampled_drafts_would_bend_the_law() -> None:
    """Why `longest` takes certain drafters only: P(0) is 3/8 where the target says 1/4, and mypy refuses it."""
    law = law_of(lambda rng: longest(one, sampled(rng)), 3)  # type: ignore[arg-type]
    assert sum(weight for output, weight in law.items() if output[0] == 0) == pytest.approx(0.375)


def test_longest_ends_though_its_drafters_do_not() -> None:
    def endless(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        while True:
            yield Proposal(1)

    assert len(list(longest(propose_nothing, endless, endless)((1,)))) == 32
    assert len(list(longest(endless, most=3)((1,)))) == 3
    with pytest.raises(DecodeError, match="most is below 1: received 0"):
        longest(endless, most=0)
