"""Every decoder that we ship is exact on every branch, and every decoder with a mistake is refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from math import fsum
from operator import itemgetter
from pathlib import Path
from typing import Final, final

import pytest
import torch
from attrs import evolve, frozen
from returns.pipeline import flow

from specflow import (
    Block,
    Categorical,
    DecodeError,
    DecodeState,
    Dice,
    Drafter,
    Finished,
    Fixed,
    GammaPolicy,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    Match,
    MultinomialProcessor,
    NGramDrafter,
    NGramStorage,
    NucleusProcessor,
    PointMass,
    Processor,
    PromptLookup,
    Proposal,
    Reject,
    Rule,
    Step,
    SuffixDrafter,
    Tokens,
    TopKProcessor,
    Traverse,
    at_most,
    autoregressive_step,
    first_of,
    longest,
    ngram_step,
    seed_coupled_step,
    speculative_step,
    then,
    verified_step,
)
from specflow.distribution import BlackBox
from specflow.drafters import (
    Bigrams,
    Corpus,
    CorpusTree,
    GuessingNGramDrafter,
    INgramStorage,
    LogitTree,
    OneLevelNGramStorage,
    Recycled,
    RecyclingTree,
    merged,
    propose_nothing,
)
from specflow.drafters.block import SampledBlockDrafter
from specflow.loop import once
from specflow.protocols import Choose, Limits
from specflow.randomness import Randomness
from specflow.stages import (
    Adjust,
    Condition,
    Draft,
    Observer,
    Recycle,
    StopWhen,
    Verify,
    advance,
    commit,
    never,
    unobserved,
)
from specflow.testing import (
    CASES,
    Branch,
    Case,
    ExactnessError,
    HiddenProcessor,
    Noise,
    TableModel,
    World,
    branches,
    certify,
    certify_seed,
    exact_law,
)
from tests.mutants import (
    MUTANTS,
    Mutant,
    Undecided,
    apart,
    bush,
    by_siblings,
    capped_ratio,
    contents_of,
    forked,
    guesses,
    heard_of,
    hierarchical,
    highest,
    learning,
    samples,
    table,
    thicket,
    traversal,
    traversed,
)

DOCS = Path(__file__).parent.parent / "docs" / "certificate.md"

one_process = pytest.mark.xdist_group("mutants")
"""For tests that share what is said about the mutants."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny tensors: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(world: World) -> Step:
    return autoregressive_step(world.target, world.processor, world.rng)


def rejecting(
    world: World,
    drafter: Drafter,
    gamma: GammaPolicy = Fixed(),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    target, processor, rng = world.target, world.processor, world.rng
    return speculative_step(drafter, target, processor, rng, gamma, observe=observe, until=until)


def matching(world: World, drafter: Drafter, gamma: GammaPolicy = Fixed()) -> Step:
    """`seed_coupled_step` on fresh randomness: sample-and-match."""
    return seed_coupled_step(drafter, world.target, world.processor, world.rng, gamma)


def by_blocks(world: World, drafter: Drafter, gamma: GammaPolicy = Fixed()) -> Step:
    draft, verify = Draft(drafter, gamma), Verify(world.target, world.processor, Block(world.rng))
    adjust = Adjust(world.rng)
    return lambda state: flow(state, draft, verify, adjust, commit, advance)


def by_paths(world: World, drafter: Drafter, gamma: GammaPolicy = Fixed()) -> Step:
    return by_rule(Traverse, world, drafter, gamma)


def by_rule(make: Callable[[Randomness], Rule], world: World, drafter: Drafter, gamma: GammaPolicy = Fixed()) -> Step:
    return verified_step(drafter, world.target, world.processor, world.rng, make(world.rng), gamma)


def coupled(world: World, drafter: Drafter, gamma: GammaPolicy = Fixed()) -> Step:
    return seed_coupled_step(drafter, world.target, world.processor, world.noise, gamma)


def sharing(world: World) -> LLMDrafter:
    """The small model as drafter, drawing from the noise that the target draws from."""
    return LLMDrafter(world.drafter, world.processor, world.noise)


def by_turns(world: World) -> Drafter:
    """A drafter whose proposals are certain at every second position and sampled at the others."""

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        sampled = samples(world)
        while True:
            proposal = next(guesses(tokens) if len(tokens) % 2 else sampled(tokens))
            yield proposal
            tokens = (*tokens, proposal.token)

    return propose


def fresh(world: World, kind: type[NGramStorage | OneLevelNGramStorage] = NGramStorage) -> INgramStorage:
    """A storage that knows the prompt, as NASD begins."""
    storage = kind(3, 4)
    storage.initialize(world.start.tokens)
    return storage


def nasd(world: World, storage: INgramStorage, filler_top_k: int = 3) -> Step:
    return learning(world, storage, apart(NGramDrafter(storage)), filler_top_k)


def recycling(world: World, drafter: Callable[[Recycled], Drafter], gamma: GammaPolicy = Fixed(4)) -> Step:
    """A drafter over a table that knows nothing at first, and learns each row that is read."""
    table = Recycled(4, k=2, n=2)
    target, processor, rng = world.target, world.processor, world.rng
    return ngram_step(drafter(table), target, processor, rng, Recycle(table), gamma)


CORPUS: Final = Corpus.of([(0, 1, 0, 0, 1, 1, 0), (1, 0, 1)], 2)
"""Of two tokens, which all models here know."""


def guessing(world: World) -> Step:
    storage = fresh(world)
    return learning(world, storage, apart(GuessingNGramDrafter(storage, world.target((0,), ()).shape[-1])))


def size_of(world: World) -> int:
    """How many tokens the target knows."""
    return world.target((0,), ()).shape[-1]


def kept_while_likely(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], tuple[float, ...]]:
    """A policy that keeps the unlikely token it saw, and stops behind it."""
    taken = []
    for proposal in stream:
        taken.append(proposal)
        if not isinstance(proposal.q, BlackBox) and proposal.q.of(proposal.token) < 0.5:
            break
    return tuple(taken), state.pace


def likely_up_to_four(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], tuple[float, ...]]:
    return kept_while_likely(islice(stream, 4), state)


RULES: Final[dict[str, Callable[[Randomness], Rule]]] = {
    "token rejection": Reject,
    "sample-and-match": Match,
    "block verification": Block,
    "traversal": Traverse,
}

CHAINS: Final[dict[str, Callable[[World], Drafter]]] = {
    "sampled drafts": samples,
    "certain drafts": lambda w: guesses,
    "certain and sampled drafts": by_turns,
    "suffix, then a model": lambda w: then(SuffixDrafter(most=1), samples(w)),
    "a model, then suffix": lambda w: then(at_most(1, samples(w)), SuffixDrafter()),
}

CERTAIN_TREES: Final[dict[str, Callable[[World], Drafter]]] = {
    "a certain tree": lambda w: bush,
    "a tree of lookups": lambda w: LookupTree(),
    "a static tree over bigrams": lambda w: RecyclingTree(Bigrams.of(w.target, (0,), size_of(w), 2)),
    "a tree of a corpus": lambda w: CorpusTree(CORPUS),
    "two trees, merged": lambda w: merged(LookupTree(), bush),
}

TREES: Final[dict[str, Callable[[World], Drafter]]] = {
    "a tree of a model": forked,
    "three siblings of a model": lambda w: forked(w, (3,)),
    "drawn and certain siblings": thicket,
    "a tree behind a lookup": lambda w: then(at_most(1, guesses), forked(w)),
    "a lookup behind a tree": lambda w: then(at_most(2, forked(w)), PromptLookup()),
}

TREE_CASES: Final = (
    Case(2, (0,), 4, seed=15),
    Case(2, (1, 0), 4, frozenset({1}), seed=16),
    Case(3, (2,), 2, seed=41),
    Case(3, (0, 1), 3, frozenset({2}), seed=2),
    Case(3, (1, 1), 3, frozenset({0, 2}), lambda rng: TopKProcessor(1.2, 2), 3),
    Case(3, (2, 0), 3, processor=lambda rng: TopKProcessor(0.8, 2), seed=6),
    Case(4, (2, 2), 3, frozenset({0}), lambda rng: NucleusProcessor(1.5, 0.7), 9),
    Case(2, (1, 1), 3, processor=HiddenProcessor, seed=12),
    Case(2, (0,), 3, frozenset({1}), HiddenProcessor, 11),
    Case(3, (0, 1), 6, processor=lambda rng: GreedyProcessor(), seed=13),
    Case(4, (3,), 6, frozenset({0, 1}), lambda rng: GreedyProcessor(0.7), 14),
)
"""Sampled, hidden and greedy, each with stop tokens and without; small, as a drawn tree has many branches.

Every mistake on trees of `tests.mutants` is refused on one of them.
"""

DECODERS: dict[str, Callable[[World], Step]] = {
    "autoregressive": plain,
    "autoregressive, a drafter without words": lambda w: rejecting(w, propose_nothing),
    "sampled drafts, token rejection": lambda w: rejecting(w, samples(w)),
    "sampled drafts, token rejection, gamma 1": lambda w: rejecting(w, samples(w), Fixed(1)),
    "sampled drafts, token rejection, gamma 2": lambda w: rejecting(w, samples(w), Fixed(2)),
    "sampled drafts, sample-and-match, gamma 2": lambda w: matching(w, samples(w), Fixed(2)),
    "sampled drafts, block verification": lambda w: by_blocks(w, samples(w)),
    "sampled drafts, block verification, gamma 2": lambda w: by_blocks(w, samples(w), Fixed(2)),
    "sampled drafts, block verification, a confidence stop": lambda w: by_blocks(w, samples(w), kept_while_likely),
    "sampled drafts, token rejection, a confidence stop": lambda w: rejecting(w, samples(w), kept_while_likely),
    "sampled drafts, traversal, a confidence stop": lambda w: by_paths(w, samples(w), kept_while_likely),
    "shared noise, sample-and-match": lambda w: coupled(w, sharing(w)),
    "certain drafts, token rejection": lambda w: rejecting(w, guesses),
    "certain drafts, sample-and-match": lambda w: matching(w, guesses),
    "certain drafts, block verification": lambda w: by_blocks(w, guesses),
    "certain and sampled drafts, token rejection": lambda w: rejecting(w, by_turns(w)),
    "certain and sampled drafts, block verification": lambda w: by_blocks(w, by_turns(w)),
    "n-gram storage": lambda w: nasd(w, fresh(w)),
    "n-gram storage of one level, nothing but the text learned": lambda w: nasd(w, fresh(w, OneLevelNGramStorage), 1),
    "n-gram storage that guesses": guessing,
    "suffix": lambda w: rejecting(w, SuffixDrafter()),
    "suffix, block verification": lambda w: by_blocks(w, SuffixDrafter()),
    "prompt lookup": lambda w: rejecting(w, PromptLookup()),
    "the longest of suffix, lookup and guesses": lambda w: matching(
        w, longest(SuffixDrafter(most=2), PromptLookup(), at_most(2, guesses))
    ),
    "suffix, else a model": lambda w: rejecting(w, first_of(SuffixDrafter(shortest=2), samples(w))),
    "suffix, then a model, block verification": lambda w: by_blocks(w, then(SuffixDrafter(most=1), samples(w))),
    "the first token from the target": lambda w: once(plain(w), rejecting(w, samples(w), Fixed(2))),
    "a tree": lambda w: rejecting(w, bush, Fixed(4)),
    "a tree of one draft": lambda w: rejecting(w, bush, Fixed(1)),
    "a tree that is a chain": lambda w: rejecting(w, guesses, Fixed(3)),
    "a tree of lookups": lambda w: rejecting(w, LookupTree(), Fixed(4)),
    "token recycling": lambda w: recycling(w, RecyclingTree),
    "token recycling, chains": lambda w: recycling(w, RecyclingTree, Fixed(2)),
    "guesses from the last row, each with a lookup": lambda w: recycling(w, LogitTree),
    "a tree of lookups over a table that learns": lambda w: recycling(w, LookupTree),
    "trees of lookups and of guesses, merged": lambda w: rejecting(w, merged(LookupTree(), bush), Fixed(4)),
    "a tree of a corpus": lambda w: rejecting(w, CorpusTree(CORPUS), Fixed(4)),
}
"""One line for each decoder, each certified on every case."""

COUPLED: dict[str, Callable[[World], Step]] = {
    "no drafter": lambda w: autoregressive_step(w.target, w.processor, w.noise),
    "a drafter without words": lambda w: coupled(w, propose_nothing),
    "sampled drafts, noise shared": lambda w: coupled(w, sharing(w)),
    "sampled drafts, noise shared, gamma 1": lambda w: coupled(w, sharing(w), Fixed(1)),
    "sampled drafts, a confidence stop": lambda w: coupled(w, sharing(w), kept_while_likely),
    "sampled drafts, noise of their own": lambda w: coupled(w, samples(w), Fixed(2)),
    "certain drafts": lambda w: coupled(w, guesses),
    "suffix": lambda w: coupled(w, SuffixDrafter()),
    "n-gram storage": lambda w: coupled(w, apart(NGramDrafter(fresh(w)))),
    "suffix, then a model": lambda w: coupled(w, then(SuffixDrafter(most=1), sharing(w))),
    "the first token from the target": lambda w: once(coupled(w, propose_nothing), coupled(w, sharing(w), Fixed(2))),
    "a tree": lambda w: coupled(w, bush, Fixed(4)),
}
"""One line for each decoder whose text depends on the seed alone."""


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_exact(name: str) -> None:
    certificate = certify(DECODERS[name])
    assert certificate.cases == len(CASES)
    assert certificate.distance < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", [*CHAINS, *CERTAIN_TREES])
def test_every_rule_is_exact_on_chains_and_on_certain_trees(name: str, rule: str) -> None:
    drafter = (CHAINS | CERTAIN_TREES)[name]
    certificate = certify(lambda world: by_rule(RULES[rule], world, drafter(world), Fixed(3)))
    assert certificate.cases == len(CASES)
    assert certificate.distance < 1e-12
    assert 0 < certificate.accepted < 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", TREES)
def test_every_rule_is_exact_on_drawn_trees(name: str, rule: str) -> None:
    certificate = certify(lambda world: by_rule(RULES[rule], world, TREES[name](world), Fixed(4)), cases=TREE_CASES)
    assert certificate.cases == len(TREE_CASES)
    assert certificate.distance < 1e-12
    assert 0 < certificate.accepted < 1


@final
@frozen
class OneByOne:
    """A predictor that reads ahead, of one that does not."""

    world: World
    limits: Limits = Limits()

    def read_ahead(self, tokens: Tokens, most: int, choose: Choose, /) -> Tokens:
        """Each token after those before it."""
        end = len(tokens) + most
        while len(tokens) < end:
            tokens = (*tokens, int(choose(self.world.drafter(tokens, ())[0], len(tokens))))
        return tokens[-most:]


def a_block(world: World) -> Drafter:
    """Two samples at once, drawn with noise; hidden and greedy ones come one by one."""
    processor = world.processor
    if not isinstance(processor, MultinomialProcessor):
        return sharing(world)
    return SampledBlockDrafter(OneByOne(world), processor, world.noise, ahead=2)


NOISY: Final[dict[str, Callable[[World], Drafter]]] = {
    "a chain": sharing,
    "a block": a_block,
    "siblings": lambda w: LLMDrafter(w.drafter, w.processor, w.noise, widths=(2,)),
    "a draft before samples": lambda w: then(at_most(1, sharing(w)), samples(w)),
    "a draft behind samples": lambda w: then(at_most(1, samples(w)), sharing(w)),
}
"""What draws with noise that belongs to positions, which the next step draws with again."""

NOISY_CASES: Final = (
    Case(2, (0,), 3, seed=15),
    Case(3, (2,), 3, seed=1),
    Case(2, (1, 1), 3, processor=HiddenProcessor, seed=12),
    Case(3, (0, 1), 4, processor=lambda rng: GreedyProcessor(), seed=13),
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NOISY)
def test_every_rule_is_exact_on_drafts_drawn_with_noise(name: str, rule: str) -> None:
    certificate = certify(lambda world: by_rule(RULES[rule], world, NOISY[name](world), Fixed(2)), cases=NOISY_CASES)
    assert certificate.distance < 1e-12
    assert 0 < certificate.accepted < 1


def zeros_left_out(stream: Iterator[Proposal], state: DecodeState) -> tuple[tuple[Proposal, ...], tuple[float, ...]]:
    """A policy that looks at a draft before it takes it, where it is certain."""
    first = tuple(islice(stream, 1))
    return tuple(draft for draft in first if draft.q != PointMass(0)), state.pace


def test_policies_do_not_choose_among_drafts_drawn_with_noise() -> None:
    """They would choose where the noise decides, and where fresh randomness does."""

    def step(world: World, drafter: Drafter) -> Step:
        draft, verify = Draft(drafter, zeros_left_out), Verify(world.target, world.processor, Match(world.noise))
        return lambda state: flow(state, draft, verify, Adjust(world.rng), commit, advance)

    def as_certain(world: World) -> Drafter:
        return lambda tokens: (Proposal(draft.token) for draft in sharing(world)(tokens))

    certify(lambda world: step(world, sharing(world)), cases=NOISY_CASES)
    with pytest.raises(ExactnessError):
        certify(lambda world: step(world, as_certain(world)), cases=NOISY_CASES)


@pytest.mark.parametrize("gamma", [1, 2, 3, 5])
@pytest.mark.parametrize("rule", ["token rejection", "block verification", "traversal"])
def test_a_tree_may_be_cut_anywhere(rule: str, gamma: int) -> None:
    for drafter in (forked, thicket):
        certify(lambda w: by_rule(RULES[rule], w, drafter(w), Fixed(gamma)), cases=TREE_CASES[1::2])  # noqa: B023


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_may_end_behind_an_unlikely_draft(rule: str) -> None:
    """A policy that looks at what it took; the token that it saw is kept."""
    for drafter in (forked, thicket):
        certify(
            lambda w: by_rule(RULES[rule], w, drafter(w), likely_up_to_four),  # noqa: B023 - called here
            cases=TREE_CASES[:5],
        )


@pytest.mark.parametrize("name", COUPLED)
def test_a_seed_has_one_text(name: str) -> None:
    certify_seed(COUPLED[name])


@pytest.mark.parametrize("name", [*CERTAIN_TREES, *TREES])
def test_a_seed_has_one_text_on_trees(name: str) -> None:
    """Of a model's tree that draws its siblings from the same noise, without putting back."""
    seeded = tuple(case for case in TREE_CASES if case.processor is not HiddenProcessor)

    def compose(world: World) -> Step:
        drafter = (CERTAIN_TREES | TREES)[name]
        return coupled(world, drafter(evolve(world, rng=Undecided(world.noise))), Fixed(4))

    certify_seed(compose, cases=seeded)


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_asks_a_processor_behind_a_stop_token(rule: str) -> None:
    def compose(world: World, processor: Processor, drafter: Callable[[World], Drafter]) -> Step:
        return verified_step(drafter(world), world.target, processor, world.rng, RULES[rule](world.rng), Fixed(3))

    for case in TREE_CASES:
        if case.stop:
            for drafter in (forked, thicket, samples):
                heard_of(lambda world, processor: compose(world, processor, drafter))(case)  # noqa: B023


def test_the_mutants_for_trees_have_one_mistake() -> None:
    """Without it they are exact."""
    for compose in (
        lambda world: by_siblings(world, lambda laws: len(laws) - 1, -1),
        lambda world: traversal(world, traversed),
        lambda world: by_rule(highest_ratios, world, forked(world), Fixed(3)),
    ):
        certify(compose, cases=TREE_CASES[:7])


def highest_ratios(rng: Randomness) -> Rule:
    """Hierarchical verification without a mistake."""
    return hierarchical(rng, highest, capped_ratio)


def test_the_mutants_of_hierarchical_verification_have_one_mistake() -> None:
    known = [case for case in CASES if case.processor is not HiddenProcessor]
    certify(lambda world: by_rule(highest_ratios, world, samples(world)), cases=known)


@one_process
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_mistakes_are_refused(mutant: Mutant) -> None:
    assert mutant.refusals()


@one_process
def test_the_cases_of_trees_are_enough_for_every_mistake_on_trees() -> None:
    on_trees = [mutant for mutant in MUTANTS if re.search("tree|sibling|traversal", mutant.mistake)]
    assert len(on_trees) == 9
    for mutant in on_trees:
        assert evolve(mutant, cases=TREE_CASES[:7]).refusals(), mutant.mistake


@one_process
def test_the_documented_table_is_what_the_command_prints() -> None:
    assert table() in DOCS.read_text()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("filler_top_k", [1, 2])
def test_a_storage_holds_what_it_would_hold_without_drafts(case: Case, filler_top_k: int) -> None:
    contents_of(lambda world, storage: learning(world, storage, samples(world), filler_top_k), filler_top_k)(case)
    contents_of(lambda world, storage: nasd(world, storage, filler_top_k), filler_top_k)(case)


def in_a_row(state: DecodeState) -> bool:
    """A condition that can come true in the middle of a block, and across its borders."""
    return len(state.output) > 1 and state.tokens[-1] == state.tokens[-2]


def stopping(world: World) -> Step:
    draft, verify = Draft(samples(world)), Verify(world.target, world.processor, Block(world.rng))
    adjust, stop = Adjust(world.rng), StopWhen(in_a_row)
    return lambda state: flow(state, draft, verify, adjust, stop, commit, advance)


def test_a_condition_ends_the_text_where_it_would_end_without_drafts() -> None:
    certify(stopping, until=in_a_row)
    with pytest.raises(ExactnessError):
        certify(stopping)


def test_a_mistake_is_shown_with_both_probabilities() -> None:
    (mutant,) = (mutant for mutant in MUTANTS if "redraws from p" in mutant.mistake)
    with pytest.raises(ExactnessError) as refused:
        mutant.check(Case(2, (0,), 4, seed=15))
    error = refused.value
    said = (
        "total variation 0.314 from the law it should have. Worst: (1, 1, 1, 1), length limit: it has probability 0.4"
    )
    assert str(error).startswith(said)
    assert f"{error.probability:.9g}" in str(error)
    assert f"{error.expected:.9g}" in str(error)
    assert "vocabulary 2, prompt (0,), 4 new tokens" in str(error)


def test_seed_coupling_needs_shared_noise_and_the_matching_rule() -> None:
    with pytest.raises(ExactnessError):
        certify_seed(lambda world: matching(world, samples(world)))
    with pytest.raises(ExactnessError):
        certify_seed(lambda world: rejecting(world, sharing(world)))


def test_what_is_remembered_must_be_built_afresh() -> None:
    seen: list[int] = []

    def forgetful(world: World) -> Step:
        seen.append(1)
        return rejecting(world, samples(world) if len(seen) % 2 else propose_nothing)

    with pytest.raises(AssertionError, match="build afresh"):
        certify(forgetful)


@pytest.mark.parametrize("draw", [lambda: Dice().accept(0.5), random.random], ids=["torch", "python"])
def test_other_randomness_is_noticed(draw: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="global generator"):
        list(branches(lambda branch: draw()))


def test_a_step_that_emits_nothing_is_noticed() -> None:
    with pytest.raises(DecodeError, match="adds nothing"):
        certify(lambda world: lambda state: state)


def test_all_branches_weigh_one() -> None:
    for case in CASES:
        law = case.law(lambda world: once(plain(world), rejecting(world, samples(world)))(world.start))
        assert fsum(law.probabilities.values()) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_noise_has_the_law_it_is_asked_for_at_every_position(seed: int) -> None:
    """Whatever was drawn before at the same position, each single draw has its law: a coupling of all of them."""
    random_laws = TableModel(3, seed)
    laws = [Categorical(random_laws((context,), ())[0].exp()) for context in range(3)]

    def draws(branch: Branch) -> tuple[int, ...]:
        noise = Noise(branch)
        return tuple(noise.draw(law, 0) for law in (*laws, *reversed(laws)))

    joint = exact_law(draws)
    assert all(drawn == drawn[::-1] for drawn in joint.probabilities)
    for i, law in enumerate(laws):
        single = joint.map(itemgetter(i))
        for token in range(3):
            assert single.of(token) == pytest.approx(law.of(token), abs=1e-14)


def test_noise_at_different_positions_is_independent() -> None:
    law = Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64))

    def two(branch: Branch) -> tuple[int, int]:
        noise = Noise(branch)
        return noise.draw(law, 0), noise.draw(law, 1)

    joint = exact_law(two)
    assert joint.probabilities == {(0, 0): 0.0625, (0, 1): 0.1875, (1, 0): 0.1875, (1, 1): 0.5625}


def test_the_expected_number_of_accepted_drafts_is_exact() -> None:
    """γ = 1 accepts with probability 1 - TV(p, q)."""
    case = Case(3, (0,), 2, seed=1)

    def accepted(world: World) -> int:
        outcome = rejecting(world, samples(world), Fixed(1))(world.start)
        return (outcome.state if isinstance(outcome, Finished) else outcome).tally.accepted

    p, q = (TableModel(3, seed)((0,), ())[0].exp() for seed in (2, 3))
    assert case.law(accepted).mean(float) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=1e-15)
