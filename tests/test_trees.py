"""Trees of drafts: how they are read, verified and drafted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice, takewhile
from pathlib import Path
from random import Random

import numpy
import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from typing_extensions import override

from specflow import (
    TEXT,
    Block,
    CachedPredictor,
    Categorical,
    DecodeError,
    DecodeState,
    Dice,
    Drafted,
    Drafter,
    EachPrefix,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    Match,
    MultinomialProcessor,
    PointMass,
    Predictor,
    PromptLookup,
    Proposal,
    Reject,
    Rule,
    SharedNoise,
    SuffixDrafter,
    Tokens,
    Traverse,
    along_paths,
    autoregressive_step,
    chain,
    run,
    seed_coupled_step,
    speculative_step,
    start,
    verified_step,
)
from specflow.accelerate import bit_for_bit, fast
from specflow.caches import KVCache, Roomy
from specflow.distribution import BlackBox, Distribution
from specflow.drafters import Bigrams, as_chain
from specflow.drafters.siblings import siblings
from specflow.drafters.tree import LONGEST
from specflow.predictors import UncachedPredictor, path_by_path
from specflow.randomness import Randomness
from specflow.stages import Draft, Verify
from specflow.state import CertainDrafter, Count, Request, parents_of
from specflow.testing import TableModel, conformance, through_trees
from specflow.trees import leaves, lineage, path_along, path_to, preorder
from tests.architectures import ARCHITECTURES, WINDOW
from tests.toys import VOCABULARY, disturbed, once, oracle, passes_of, tiny_gpt2, tiny_llama

TREE = (
    Proposal(7),
    Proposal(8, parent=TEXT),
    Proposal(9, parent=0),
    Proposal(10, parent=1),
    Proposal(11),
    Proposal(12, parent=1),
)
PARENTS = (TEXT, TEXT, 0, 1, 3, 1)
RULES: dict[str, Callable[[Randomness], Rule]] = {
    "Reject": Reject,
    "Match": Match,
    "Block": Block,
    "Traverse": Traverse,
}


def bush(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
    """Drafts that are made by chance, but always the same behind a text."""
    random = Random(sum(tokens) + len(tokens))
    for number in range(30):
        token, parent = random.randrange(VOCABULARY), random.randrange(-1, number)
        yield Proposal(token, parent=parent, source="bush", chance=1 / (number + 2))


def near_misses(model: PreTrainedModel) -> CertainDrafter:
    """The target's own token among others, three times: what is drafted is accepted, by different branches."""
    predictor = once(model)

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        parent, number = TEXT, 0
        for depth in range(3):
            right = int(predictor(tokens, ())[0].argmax())
            place = (len(tokens) + depth) % 3
            for i in range(3):
                yield Proposal((right + i - place) % VOCABULARY, parent=parent)
            parent, number, tokens = number + place, number + 3, (*tokens, right)

    return draft


# How trees hang together


trees = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=12).map(
    lambda pairs: tuple([Proposal(token, parent=parent % (i + 2) - 2) for i, (token, parent) in enumerate(pairs)])
)
"""Drafts behind others, behind the text, and behind those before them."""


@given(trees)
def test_a_tree_in_depth_first_order_has_the_same_paths(drafts: tuple[Proposal, ...]) -> None:
    def paths(drafts: tuple[Proposal, ...]) -> list[Tokens]:
        parents = parents_of(drafts)
        return sorted(tuple(drafts[j].token for j in path_to(parents, i)) for i in range(len(drafts)))

    ordered = preorder(drafts)
    parents = parents_of(ordered)
    assert paths(ordered) == paths(drafts)
    assert all(parent < i for i, parent in enumerate(parents))
    for i, parent in enumerate(parents):  # nothing lies between a draft and what is below it
        assert parent == TEXT or all(parent in path_to(parents, j) for j in range(parent + 1, i + 1))


@given(trees)
def test_what_a_draft_sees_is_its_path(drafts: tuple[Proposal, ...]) -> None:
    parents = parents_of(drafts)
    seen = lineage(parents)
    for i in range(len(drafts)):
        assert numpy.flatnonzero(seen[i]).tolist() == path_to(parents, i)
    assert set(leaves(parents)) == {i for i in range(len(drafts)) if all(parent != i for parent in parents)}


@given(trees)
def test_a_record_of_drafts_knows_how_they_hang_together(drafts: tuple[Proposal, ...]) -> None:
    drafted = Drafted(DecodeState(Request((1,), 50), (1,)), drafts)
    parents = parents_of(drafts)
    assert drafted.parents == parents
    assert drafted.tokens == tuple(draft.token for draft in drafts)
    for i in range(TEXT, len(drafts)):
        children = [k for k, parent in enumerate(parents) if parent == i]
        assert list(drafted.children(i)) == children
        assert drafted.followers(i) == {drafts[k].token: k for k in reversed(children)}
        assert list(drafted.path(i)) == path_to(parents, i)
        assert drafted.text(i) == (1, *[drafts[k].token for k in path_to(parents, i)])
        trunk = drafted.trunk(i)
        assert trunk[0] == i
        assert [drafted.children(here)[:1] for here in trunk] == [(below,) for below in trunk[1:]] + [()]


@pytest.mark.parametrize(
    ("q", "what"),
    [
        (PointMass(2), "certainty of token 2"),
        (Categorical(torch.ones(1)), "1 probabilities"),
        (Categorical(torch.tensor([0.5, 0.0, 0.5])), "q(1) = 0"),
    ],
)
def test_a_law_that_cannot_draw_the_token_is_refused(q: PointMass | Categorical, what: str) -> None:
    with pytest.raises(DecodeError, match=re.escape(f"received {what}")):
        Proposal(1, q)


def test_behind_a_stop_token_no_draft_follows() -> None:
    drafted = Drafted(DecodeState(Request((1,), 50, frozenset({8})), (8,)), TREE)
    assert drafted.parents == PARENTS
    assert [drafted.children(i) for i in range(TEXT, 6)] == [(0, 1), (2,), (), (), (4,), (), ()]
    assert drafted.followers(1) == {}
    assert drafted.trunk(1) == (1,)


@pytest.mark.parametrize("parent", [1, 2, -3])
def test_a_draft_before_its_parent_is_refused(parent: int) -> None:
    drafts = (Proposal(4), Proposal(5, parent=parent))
    with pytest.raises(DecodeError, match="draft 1 of the source 'draft' does not come after its parent"):
        drafted(lambda tokens: iter(drafts), 9)
    with pytest.raises(DecodeError, match="draft 1 of the source 'draft' does not come after its parent"):
        Drafted(DecodeState(Request((1,), 50), (1,)), drafts)


def test_a_path_is_followed_as_far_as_it_goes() -> None:
    drafted, parents = tuple([draft.token for draft in TREE]), parents_of(TREE)
    assert path_along(drafted, parents, (8, 10, 11, 3)) == [1, 3, 4]
    assert path_along(drafted, parents, (9,)) == []
    assert path_along(drafted, parents, ()) == []


# Reading


def conforms(model: Module, predictor: CachedPredictor, *, tolerance: float, seed: int = 0) -> None:
    """The memo answers like a fresh pass, whatever trees it has read and whichever of their paths were taken."""
    fresh = UncachedPredictor(model)
    report = conformance(
        through_trees(predictor, VOCABULARY, seed=seed),
        fresh,
        VOCABULARY,
        tolerance=tolerance,
        seed=seed,
        prune=predictor.prune,
    )
    assert report.holds, report


def honest(model: Module) -> Predictor:
    """The whole text down to each draft, each in a pass of its own."""
    return along_paths(lambda tokens: model(torch.tensor([tokens])).logits[0, -1])


def reads_at_once(model: Module, predictor: CachedPredictor) -> bool:
    """Whether a tree took one pass, else as many as it has leaves."""
    passes = passes_of(model)
    predictor((1, 2, 3), TREE)  # behind the hook the model is another one: read again, perhaps tried again
    passes.clear()
    predictor((1, 2, 3), TREE)
    assert len(passes) in (1, len(leaves(PARENTS)))
    return len(passes) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_memo_reads_trees_as_it_reads_their_paths(make: Callable[[], PreTrainedModel], seed: int) -> None:
    model = make()
    predictor = CachedPredictor(model)
    conforms(model, predictor, tolerance=1e-9, seed=seed)
    assert reads_at_once(model, predictor)


@pytest.mark.parametrize("seed", range(3))
def test_an_accelerated_model_reads_trees_as_it_reads_their_paths(seed: int) -> None:
    model = tiny_llama()
    accelerated = fast(model)
    predictor = CachedPredictor(accelerated)
    conforms(model, predictor, tolerance=1e-9, seed=seed)
    assert reads_at_once(accelerated, predictor)


def test_trees_see_through_sliding_windows() -> None:
    model = next(architecture for architecture in ARCHITECTURES if architecture.kind == "mistral").build()
    accelerated = fast(model)
    predictor = CachedPredictor(accelerated)
    passes = passes_of(accelerated)
    conforms(model, predictor, tolerance=1e-9)
    assert max(passes) > WINDOW
    assert reads_at_once(accelerated, predictor)
    predictor = CachedPredictor(model)  # transformers' own windows are no rows to choose from
    conforms(model, predictor, tolerance=1e-9)
    assert not reads_at_once(model, predictor)


def test_a_tree_is_read_in_one_pass_and_its_path_is_not_read_again() -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model)
    passes = passes_of(model)
    predictor((1, 2, 3, 4), TREE)
    passes.clear()
    predictor((1, 2, 3, 4, 5), TREE)
    predictor.prune((1, 2, 3, 4, 5, 8, 10, 11, 60))
    predictor((1, 2, 3, 4, 5, 8, 10, 11, 60), TREE[:2])
    predictor((1, 2, 3, 4, 5, 8, 10, 11, 60, 8, 61), ())
    assert passes == [1 + 6, 1 + 2, 1]


@pytest.mark.parametrize("prompt", [(1,), (1, 2, 3, 4)])
def test_a_model_is_tried_with_its_first_tree_and_not_again(prompt: Tokens) -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].shape[-1]))
    predictor(prompt, TREE[:2])
    predictor((1, 2, 3, 4), ())
    passes.clear()
    predictor((1, 2, 3, 4, 5), TREE)
    assert passes == [1 + 6]


def test_a_long_text_is_read_before_its_tree() -> None:
    model = tiny_llama()
    predictor, text = CachedPredictor(model), tuple(range(60))
    predictor((1, 2), TREE)
    passes = passes_of(model)
    logits = predictor(text, TREE)
    assert passes == [59, 1 + 6]
    assert torch.allclose(logits, honest(model)(text, TREE), atol=1e-9)


def test_without_drafts_a_tree_is_a_text() -> None:
    model = tiny_llama()
    for read in (
        CachedPredictor(model),
        UncachedPredictor(model),
        path_by_path(lambda tokens, last: rows(model, tokens, last)),
    ):
        assert torch.allclose(read((1, 2, 3), ()), honest(model)((1, 2, 3), ()), atol=1e-9)


def rows(model: Module, tokens: Tokens, last: int) -> Tensor:
    """Logits [last, V] behind each of the last prefixes of a text, in one pass."""
    logits: Tensor = model(torch.tensor([tokens])).logits[0, -last:]
    return logits


def test_every_reading_of_a_tree_is_that_of_its_paths() -> None:
    model = tiny_llama()
    readings = (
        CachedPredictor(model),
        UncachedPredictor(model),
        path_by_path(lambda tokens, last: rows(model, tokens, last)),
    )
    for drafts in (TREE, preorder(TREE), chain((7, 9, 3)), ()):
        for read in readings:
            assert torch.allclose(read((1, 2, 3), drafts), honest(model)((1, 2, 3), drafts), atol=1e-9)


def test_a_cache_that_cannot_keep_a_path_is_read_path_by_path() -> None:
    model = tiny_llama()
    static = CachedPredictor(model, make_cache=lambda: StaticCache(model.config, max_cache_len=64))
    truth = honest(model)((1, 2, 3), TREE)
    assert torch.allclose(static((1, 2, 3), TREE), truth, atol=1e-9)
    assert not reads_at_once(model, static)


def test_bit_for_bit_a_tree_is_read_path_by_path() -> None:
    model = bit_for_bit(tiny_llama(dtype=torch.float32))
    predictor = CachedPredictor(model)
    fresh = CachedPredictor(model)
    logits = predictor((1, 2, 3, 4), TREE)
    for i in range(len(TREE)):
        path = tuple(TREE[j].token for j in path_to(PARENTS, i))
        assert torch.equal(logits[i + 1], fresh((1, 2, 3, 4, *path), ())[0])
    with pytest.raises(DecodeError, match="bit for bit"):
        model(torch.tensor([[1, 2]]), parents=[-1, -1])


def test_an_interrupted_pass_leaves_no_tree() -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model)
    predictor((1, 2, 3), TREE)

    def interrupt(module: Module, arguments: object) -> None:
        raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        predictor((1, 2, 3, 8, 10), TREE)
    hook.remove()
    truth = honest(model)((1, 2, 3, 8, 10), TREE)
    assert torch.allclose(predictor((1, 2, 3, 8, 10), TREE), truth, atol=1e-9)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model)
    predictor((1, 2, 3), TREE)

    def spoil(module: Module, arguments: object, output: CausalLMOutputWithPast) -> None:
        assert output.logits is not None
        output.logits.fill_(torch.nan)

    model.register_forward_hook(spoil)
    with pytest.raises(DecodeError, match="not finite"):
        predictor((1, 2, 3), TREE)


def test_rows_of_a_cache_are_kept_in_order() -> None:
    with pytest.raises(DecodeError, match="the cache holds 3 tokens"):
        KVCache(torch.zeros(1, 2, 1, 8, 1), length=3).keep(2, [1])
    rows = torch.arange(6.0).reshape(1, 1, 6, 1)
    Roomy().keep(0, [])  # nothing was read into it
    plain = DynamicLayer()
    plain.update(rows, -rows)
    layer = Roomy.of(plain)
    layer.update(rows[..., :1, :], rows[..., :1, :])
    layer.keep(2, [1, 4])
    assert layer.keys is not None
    assert layer.values is not None
    assert layer.keys.flatten().tolist() == [0, 1, 3, 0]
    assert layer.values.flatten().tolist() == [0, -1, -3, 0]


# Verifying


DRAFTERS: dict[str, Callable[[PreTrainedModel], CertainDrafter]] = {
    "by chance": lambda model: bush,
    "near misses": near_misses,
    "lookups": lambda model: LookupTree(),
    "lookups and bigrams": lambda model: LookupTree(Bigrams.of(CachedPredictor(model), (1,), VOCABULARY), branches=2),
    "a chain": lambda model: SuffixDrafter(),
}


PROMPT = (5, 9, 2, 5, 9)


@cache
def given_of(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, list[int]]:
    """A model, and what it says after the prompt."""
    model = make()
    return model, oracle(PROMPT, model, 60)


@cache
def target_of(make: Callable[[], PreTrainedModel], accelerated: bool) -> Module:
    """What the text is decoded with."""
    model, _ = given_of(make)
    return fast(model) if accelerated else model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(("make", "accelerated"), [(tiny_llama, False), (tiny_llama, True), (tiny_gpt2, False)])
def test_greedy_text_is_that_of_autoregressive_decoding(
    make: Callable[[], PreTrainedModel], accelerated: bool, name: str, rule: str
) -> None:
    model, expected = given_of(make)
    drafter, target, dice = DRAFTERS[name](model), CachedPredictor(target_of(make, accelerated)), Dice()
    step = verified_step(drafter, target, GreedyProcessor(), dice, RULES[rule](dice), Fixed(9), prune=(target,))
    end = run(step, start(PROMPT, 60).unwrap())
    assert list(end.state.output) == expected
    if name == "near misses":
        assert end.state.tally.accepted == 60 - end.state.tally.steps
        assert end.state.mean_accepted_length > 3


def test_sampled_text_depends_on_the_seed_alone() -> None:
    model = tiny_llama()
    processor, prompt = MultinomialProcessor(1.0), (5, 9, 2)
    plain = autoregressive_step(UncachedPredictor(model), processor, SharedNoise(4))
    expected = run(plain, start(prompt, 40).unwrap()).state.output
    for name in ("by chance", "near misses"):
        target = CachedPredictor(model)
        step = seed_coupled_step(DRAFTERS[name](model), target, processor, SharedNoise(4), Fixed(9))
        assert run(step, start(prompt, 40).unwrap()).state.output == expected


def verified(
    drafts: tuple[Proposal, ...], following: Tokens, rule: str = "Match", tokens: Tokens = (1,)
) -> tuple[Tokens, list[tuple[int, int]]]:
    """What a target that says `following` takes of a tree, and the calls of its processor: text and rows."""
    calls: list[tuple[int, int]] = []

    def says(tokens: Tokens, last: int) -> Tensor:
        rows = [torch.eye(20)[following[min(len(tokens) - i, len(following)) - 1]] for i in reversed(range(last))]
        return torch.stack(rows)

    class Counting:
        def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[Distribution, ...]:
            calls.append((len(tokens), len(logits)))
            return GreedyProcessor().laws(tokens, logits)

    drafted = Drafted(DecodeState(Request(tokens, 99), tokens), drafts)
    taken = Verify(path_by_path(says), Counting(), RULES[rule](Dice()))(drafted)
    laws = [taken.scored.made(i) for i in (TEXT, *taken.path)]
    assert len(taken.logits) == taken.accepted + 1
    assert laws == [PointMass(token) for token in following[: taken.accepted + 1]]
    assert [int(row.argmax()) for row in taken.logits] == list(following[: taken.accepted + 1])
    assert taken.drafted is drafted
    assert taken.correction == PointMass(following[taken.accepted])
    return taken.tokens, calls


@pytest.mark.parametrize("rule", RULES)
def test_the_path_that_the_target_takes_is_what_stands(rule: str) -> None:
    tree = preorder(TREE)
    trunk = (3, 3)  # the laws behind the text, 7, and 7 9, before the target has left them
    assert verified(tree, (8, 10, 11, 5), rule) == ((8, 10, 11), [trunk, (4, 3)])
    assert verified(tree, (7, 9, 3), rule) == ((7, 9), [trunk])
    assert verified(tree, (8, 12, 3), rule) == ((8, 12), [trunk, (4, 3), (3, 1)])
    assert verified(tree, (3, 9), rule) == ((), [trunk])
    assert verified((), (3,), rule) == ((), [(1, 1)])


def test_all_drafts_count_as_drafted_and_the_path_as_accepted() -> None:
    state = DecodeState(Request((1,), 50), (1,))
    step = speculative_step(lambda tokens: iter(TREE), TableModel(20), GreedyProcessor(), Dice(), Fixed(6))
    after = step(state)
    assert isinstance(after, DecodeState)
    assert after.tally.sources == (("draft", Count(6, len(after.output) - 1)),)


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_siblings_the_first_is_taken(rule: str) -> None:
    siblings = (Proposal(4), Proposal(5, parent=0), Proposal(4, parent=TEXT), Proposal(6, parent=2))
    assert verified(siblings, (4, 6), rule) == ((4,), [(3, 3)])


# Drafting


def drafted(drafter: Drafter, room: int, gamma: int = 8, stop: frozenset[int] = frozenset()) -> tuple[Proposal, ...]:
    tokens = (1, 2, 3)
    return Draft(drafter, Fixed(gamma))(DecodeState(Request(tokens, 3 + room, stop), tokens)).proposals


def shape(drafts: Iterable[Proposal]) -> list[tuple[int, int]]:
    """The tokens, and what they follow."""
    several = tuple(drafts)
    return list(zip([draft.token for draft in several], parents_of(several), strict=True))


def told(drafts: Iterable[Proposal]) -> list[tuple[int, int, float | None, str]]:
    """All that is told of certain drafts."""
    several = tuple(drafts)
    assert all(draft.q == PointMass(draft.token) and draft.logits is None for draft in several)
    return [(draft.token, draft.parent, draft.chance, draft.source) for draft in several]


def test_no_path_is_longer_than_the_room() -> None:
    def copied(tokens: Tokens) -> Iterator[Proposal]:
        return PromptLookup(num_output_tokens=9)((*range(12), 0))

    assert [len(drafted(copied, room)) for room in (1, 2, 3, 9, 20)] == [0, 1, 2, 8, 8]
    wide = [Proposal(token, parent=parent) for token, parent in ((4, TEXT), (5, TEXT), (6, 1), (7, TEXT))]
    assert shape(drafted(lambda tokens: iter(wide), 2)) == [(4, TEXT), (5, TEXT)]
    pulled = iter((Proposal(4), Proposal(5, parent=TEXT)))
    assert shape(drafted(lambda tokens: pulled, 2)) == [(4, TEXT)]  # it may be a chain, of which no more is computed
    assert next(pulled).token == 5


def test_a_chain_ends_at_a_stop_token_and_a_tree_goes_on_beside_it() -> None:
    stop = frozenset({8})
    assert shape(drafted(lambda tokens: iter(chain((7, 8, 9))), 9, stop=stop)) == [(7, TEXT), (8, 0)]
    explicit = [evolve(draft, parent=parent) for draft, parent in zip(TREE, PARENTS, strict=True)]
    assert shape(drafted(lambda tokens: iter(explicit), 9, stop=stop)) == [(7, TEXT), (9, 0), (8, TEXT)]


@pytest.mark.parametrize("widths", [(), (1,), (1, 1)])
def test_a_drawn_chain_ends_at_a_stop_token_too(widths: tuple[int, ...]) -> None:
    """However it is asked for, nothing is drafted behind it."""
    asked: list[Tokens] = []

    def row(tokens: Tokens) -> Tensor:
        asked.append(tokens)
        return torch.eye(16)[len(tokens) + 3]

    drafter = LLMDrafter(along_paths(row), GreedyProcessor(), Dice(), widths=widths)
    assert shape(drafted(drafter, 9, stop=frozenset({7}))) == [(6, TEXT), (7, 0)]
    assert max(map(len, asked)) == 4


def test_what_is_taken_of_a_tree_is_put_in_depth_first_order() -> None:
    assert shape(drafted(lambda tokens: iter(TREE), 9)) == [(7, TEXT), (9, 0), (8, TEXT), (10, 2), (11, 3), (12, 2)]
    assert shape(drafted(lambda tokens: iter(TREE), 9, gamma=4)) == [(7, TEXT), (9, 0), (8, TEXT), (10, 2)]
    assert shape(drafted(lambda tokens: iter(chain((7, 9))), 9)) == [(7, TEXT), (9, 0)]


TABLE = Bigrams(
    numpy.array([[(i + 1) % 8, (i + 3) % 8, (i + 5) % 8] for i in range(8)]), numpy.array([[0.5, 0.25, 0.125]] * 8)
)
texts = st.lists(st.integers(0, 7), min_size=1, max_size=40).map(tuple)


def chance_of(draft: Proposal) -> float:
    """The chance that it was drafted with."""
    assert draft.chance is not None
    return draft.chance


@given(texts, st.sampled_from([LookupTree(), LookupTree(TABLE), LookupTree(TABLE, branches=1)]))
def test_a_lookup_tree_is_a_tree_and_the_likeliest_come_first(tokens: Tokens, drafter: LookupTree) -> None:
    nodes = list(islice(drafter(tokens), 40))
    assert all(TEXT <= node.parent < i for i, node in enumerate(nodes))
    assert len({(node.parent, node.token) for node in nodes}) == len(nodes)
    chances = [chance_of(node) for node in nodes]
    assert chances == sorted(chances, reverse=True)
    assert all(0 < chance < 1 for chance in chances)
    for parent in {node.parent for node in nodes}:
        assert sum(chance_of(node) for node in nodes if node.parent == parent) <= (
            chance_of(nodes[parent]) if parent >= 0 else 1
        )
    assert told(nodes) == told(islice(drafter(tokens), 40))
    assert drafter == LookupTree(drafter.followers, drafter.branches)


@given(texts)
def test_the_first_branch_is_the_copy_that_a_suffix_drafter_follows(tokens: Tokens) -> None:
    copy, node = SuffixDrafter().read(tokens).copy, next(LookupTree(branches=1)(tokens), None)
    if copy.worth:
        assert node is not None
        assert node.token == tokens[copy.end]
        assert node.chance == pytest.approx((copy.worth - 0.6) / (copy.worth + 1.2))
    else:
        assert node is None or tokens[-1] in tokens[:-1]


@pytest.mark.parametrize("seed", range(40))
def test_branches_are_what_followed_the_longest_matches_the_latest_first(seed: int) -> None:
    tokens = tuple(Random(seed).choices(range(2 + seed % 5), k=40))

    def common(end: int) -> int:
        alike = takewhile(lambda back: tokens[end - 1 - back] == tokens[-1 - back], range(min(end, LONGEST)))
        return sum(1 for _ in alike)

    copy = SuffixDrafter().read(tokens).copy
    ends = [end for end in range(1, len(tokens)) if common(end) and end != copy.end]
    ends = [copy.end] * (copy.worth > 0) + sorted(ends, key=lambda end: (-common(end), -end))
    nodes = islice(LookupTree(branches=8)(tokens), 60)
    first = [node.token for node in nodes if node.parent == TEXT]
    assert first == [*dict.fromkeys(tokens[end] for end in ends)][: len(first)]
    assert bool(first) == bool(ends)


def test_a_stream_is_of_its_own_text_whatever_is_read_meanwhile() -> None:
    tokens, drafter = (5, 6, 7, 5, 4, 5), LookupTree(TABLE)
    alone = list(islice(LookupTree(TABLE)(tokens), 30))
    stream = drafter(tokens)
    first = next(stream)
    next(drafter((*tokens, 0, 1, 2, 3, 0, 2, 1, 5)))
    assert told([first, *islice(stream, 29)]) == told(alone)


def test_edited_texts_are_copied_across_their_edits() -> None:
    edited = (*range(20), *range(9))
    for came, following in ((70,), 10), ((70, 9), 10), ((10,), 11):
        assert next(LookupTree()((*edited, *came))).token == following


def test_a_loop_is_continued() -> None:
    nodes = list(islice(LookupTree(branches=1)((1, 2, 3) * 4), 7))
    assert [node.token for node in nodes] == [1, 2, 3, 1, 2, 3, 1]


def test_bigrams_are_drafted_where_nothing_matches() -> None:
    nodes = list(islice(LookupTree(TABLE)((0,)), 4))
    assert told(nodes) == [
        (1, TEXT, 0.5, "follower"),
        (3, TEXT, 0.25, "follower"),
        (2, 0, 0.25, "follower"),
        (5, TEXT, 0.125, "follower"),
    ]
    assert list(LookupTree()((0,))) == []


def test_behind_a_bigram_the_text_is_looked_through_again() -> None:
    nodes = list(islice(LookupTree(TABLE)((3, 7, 0)), 40))
    (three,) = [i for i, node in enumerate(nodes) if (node.token, node.parent) == (3, TEXT)]
    assert any((node.token, node.parent, node.source) == (7, three, "suffix") for node in nodes)


def test_a_token_that_both_know_has_both_chances() -> None:
    copied, both = next(LookupTree()((1, 2, 1))), next(LookupTree(TABLE)((1, 2, 1)))
    assert copied.token == both.token == 2
    one = chance_of(copied)
    assert both.chance == pytest.approx(one + (1 - one) / 2 * 0.5)
    assert both.source == "suffix"


@given(texts)
def test_a_chain_as_a_chain_is_the_chain(tokens: Tokens) -> None:
    def drafted(drafter: CertainDrafter) -> list[tuple[int, str]]:
        return [(proposal.token, proposal.source) for proposal in drafter(tokens)]

    assert drafted(as_chain(SuffixDrafter())) == drafted(SuffixDrafter())


def test_the_likeliest_path_is_drafted_as_long_as_it_is_likely() -> None:
    nodes: tuple[Proposal[PointMass], ...] = (
        Proposal(5, chance=0.5),
        Proposal(6, parent=TEXT, chance=0.4),
        Proposal(7, parent=1, chance=0.3),
        Proposal(8, parent=0, chance=0.2),
        Proposal(9, parent=3, chance=0.1),
        Proposal(3, chance=0.05),
    )
    for least, path in ((0.1, [5, 8, 9]), (0.15, [5, 8]), (0.45, [5]), (0.6, [])):
        assert [proposal.token for proposal in as_chain(lambda tokens: iter(nodes), least)((1,))] == path


def test_branches_are_at_least_one() -> None:
    with pytest.raises(DecodeError, match="branches is below 1"):
        LookupTree(branches=0)


# A model that drafts trees


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_greedy_model_drafts_its_best_tokens_level_by_level(make: Callable[[], PreTrainedModel]) -> None:
    model, text = make(), (5, 9, 2)
    drafter = LLMDrafter(CachedPredictor(model), GreedyProcessor(), Dice(), source="small", widths=(3, 2))
    passes = passes_of(model)
    tree = tuple(islice(drafter(text), 3 + 6 + 6 + 1))
    assert len(passes) == 4  # one for each level
    parents = parents_of(tree)
    assert parents == (*[TEXT] * 3, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9)
    for i, draft in enumerate(tree):
        assert (draft.q, draft.source) == (PointMass(draft.token), "small")
        path = text + tuple(tree[k].token for k in path_to(parents, i)[:-1])
        said = honest(model)(path, ())[0]
        assert draft.logits is not None
        assert torch.allclose(draft.logits, said, atol=1e-9)
        sibling = [k for k, parent in enumerate(parents) if parent == parents[i]].index(i)
        assert draft.token == int(said.topk(3).indices[sibling])
    assert shape(islice(LLMDrafter(CachedPredictor(model), GreedyProcessor(), Dice())(text), 3)) == [
        (tree[0].token, TEXT),
        (tree[3].token, 0),
        (tree[9].token, 1),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_siblings_are_drawn_without_putting_back_and_each_tells_its_own_law(seed: int) -> None:
    small, dice = TableModel(5, seed), Dice(torch.Generator().manual_seed(seed))
    tree = tuple(islice(LLMDrafter(small, MultinomialProcessor(1.0), dice, widths=(3, 2))((0,)), 9))
    parents = parents_of(tree)
    assert parents == (TEXT, TEXT, TEXT, 0, 0, 1, 1, 2, 2)
    for i, draft in enumerate(tree):
        assert isinstance(draft.q, Categorical)
        before = [tree[k].token for k in range(i) if parents[k] == parents[i]]
        path = (0, *[tree[k].token for k in path_to(parents, i)[:-1]])
        left = small(path, ())[0].exp().index_fill(0, torch.tensor(before, dtype=torch.long), 0.0)
        torch.testing.assert_close(draft.q.probs, left / left.sum(), rtol=0, atol=1e-12)
        assert draft.q.of(draft.token) > 0


def test_there_are_no_more_siblings_than_tokens_that_can_be() -> None:
    rows = along_paths(lambda tokens: torch.tensor([0.0, 1.0, -torch.inf, -torch.inf]))
    sampled = LLMDrafter(rows, MultinomialProcessor(1.0), Dice(), widths=(4,))
    assert sorted(shape(islice(sampled((0,)), 3))[:2]) == [(0, TEXT), (1, TEXT)]
    assert parents_of(tuple(islice(sampled((0,)), 4))) == (TEXT, TEXT, 0, 1)
    greedy = LLMDrafter(TableModel(3), GreedyProcessor(), Dice(), widths=(4,))
    assert parents_of(tuple(islice(greedy((0,)), 4))) == (TEXT, TEXT, 0, 1)  # the third token cannot be


def test_a_users_sampler_draws_no_siblings() -> None:
    """Nobody knows what it would draw if it could not draw what it drew."""

    class Hidden(MultinomialProcessor):
        @override
        def sample(self, probs: Tensor) -> Tensor:
            return probs.argmin(dim=-1, keepdim=True)

    tree = tuple(islice(LLMDrafter(TableModel(4), Hidden(1.0), Dice(), widths=(2, 2))((0,)), 3))
    assert parents_of(tree) == (TEXT, 0, 1)
    assert all(isinstance(draft.q, BlackBox) for draft in tree)


def test_a_tree_ends_where_its_model_does() -> None:
    model = tiny_llama(context=8)
    drafter = LLMDrafter(CachedPredictor(model), GreedyProcessor(), Dice(), context=8, vocab_size=60, widths=(2, 2))
    assert [len(list(drafter((3,) * k))) for k in (6, 7, 8, 9)] == [2 + 4 + 4, 2 + 4, 2, 0]
    assert list(drafter((3, 60))) == []


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_of_a_close_model_is_accepted_further_than_its_chain(rule: str) -> None:
    """Of equally deep drafts; and the text stays greedy."""
    model = tiny_llama(3)
    lengths = []
    for widths, gamma in (((1,), 3), ((3, 1, 1), 9)):
        small, target, dice = disturbed(model, 1, 0.15), CachedPredictor(model), Dice()
        drafter = LLMDrafter(CachedPredictor(small), GreedyProcessor(), dice, widths=widths)
        step = verified_step(drafter, target, GreedyProcessor(), dice, RULES[rule](dice), Fixed(gamma), (target,))
        end = run(step, start((5, 9, 2), 40).unwrap())
        assert list(end.state.output) == oracle((5, 9, 2), model, 40)
        lengths.append(end.state.mean_accepted_length)
    assert lengths[0] + 0.1 < lengths[1]


# Bigrams


def test_bigrams_are_what_the_model_says_behind_each_token() -> None:
    model = tiny_llama()
    table = Bigrams.of(CachedPredictor(model), (3, 1), VOCABULARY, k=4)
    for token in (0, 17, 63):
        best = torch.softmax(model(torch.tensor([[3, 1, token]])).logits[0, -1], dim=-1).topk(4)
        found = table.after((9, token))
        assert [follower for follower, _ in found] == best.indices.tolist()
        assert [chance for _, chance in found] == pytest.approx(best.values.tolist())


def test_a_vocabulary_is_asked_about_in_a_few_passes() -> None:
    model = tiny_llama(vocab_size=300)
    predictor = CachedPredictor(model)
    passes = passes_of(model)
    predictor((3, 1), TREE)
    passes.clear()
    table = Bigrams.of(predictor, (3, 1), 300, k=1)
    assert passes == [128, 128, 47]
    assert table.tokens.shape == (300, 1)


def test_a_table_is_saved_and_read(tmp_path: Path) -> None:
    path = tmp_path / "bigrams.safetensors"
    TABLE.save(path)
    again = Bigrams.load(path)
    assert again.tokens.tolist() == TABLE.tokens.tolist()
    assert again.chances.tolist() == TABLE.chances.tolist()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Bigrams(numpy.zeros((2, 3), int), numpy.zeros((3, 2))), "not both"),
        (lambda: Bigrams(numpy.zeros((2, 0), int), numpy.zeros((2, 0))), "not both"),
        (lambda: Bigrams(numpy.array([[2], [0]]), numpy.zeros((2, 1))), "not in the vocabulary"),
        (lambda: Bigrams(numpy.array([[-1], [0]]), numpy.zeros((2, 1))), "not in the vocabulary"),
        (lambda: Bigrams.of(TableModel(4), (0,), 4, k=5), "k is above 4"),
        (lambda: Bigrams.of(TableModel(4), (0,), 4, k=0), "k is below 1"),
    ],
)
def test_tables_that_cannot_be_are_refused(make: Callable[[], Bigrams], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        make()


def test_a_table_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bigrams.safetensors"
    TABLE.save(path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DecodeError, match=r"the file (is|holds|does not hold)"):
            Bigrams.load(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_files_that_hold_no_table_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is None:
        save_file({"tokens": numpy.zeros((1, 1))}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(DecodeError, match="make the table again"):
        Bigrams.load(path)


def test_no_law_is_made_of_a_sibling_that_nobody_asks_for() -> None:
    """On a device it would be waited for."""
    asked: list[Tensor] = []

    def certain(prefix: Tokens, logits: Tensor) -> PointMass:
        asked.append(logits)
        return PointMass(int(logits.argmax()))

    logits = torch.tensor([0.0, 2.0, 1.0])
    assert [*siblings(EachPrefix(certain), (0,), logits, Dice(), 1)] == [(1, PointMass(1))]
    assert len(asked) == 1
    assert [token for token, _ in siblings(EachPrefix(certain), (0,), logits, Dice(), 3)] == [1, 2, 0]
    assert logits.tolist() == [0.0, 2.0, 1.0]
