"""Trees of drafts: how they are read, verified and drafted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from random import Random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from specflow import (
    Bigrams,
    CachedPredictor,
    CertainDrafter,
    Count,
    DecodeError,
    DecodeState,
    Dice,
    Distribution,
    DraftedTree,
    Fixed,
    GreedyProcessor,
    LookupTree,
    MultinomialProcessor,
    Node,
    PromptLookup,
    Request,
    SharedNoise,
    SuffixDrafter,
    Tokens,
    TreeDrafter,
    UncachedPredictor,
    as_chain,
    as_tree,
    autoregressive_step,
    path_by_path,
    run,
    start,
    tree_step,
)
from specflow.accelerate import bit_for_bit, fast
from specflow.caching import Roomy
from specflow.drafters.tree import LONGEST
from specflow.kv_cache import KVCache
from specflow.stages import DraftTree, VerifyTree
from specflow.state import TEXT
from specflow.testing import TableModel, conformance, through_trees
from specflow.trees import leaves, lineage, path_along, path_to, preorder
from tests.architectures import ARCHITECTURES, WINDOW
from tests.toys import VOCABULARY, oracle, passes_of, tiny_gpt2, tiny_llama

TREE = (Node(7), Node(8), Node(9, 0), Node(10, 1), Node(11, 3), Node(12, 1))


def bush(tokens: Tokens) -> Iterator[Node]:
    """Nodes that are made by chance, but always the same behind a text."""
    random = Random(sum(tokens) + len(tokens))
    for number in range(30):
        yield Node(random.randrange(VOCABULARY), random.randrange(-1, number), 1 / (number + 2), "bush")


def near_misses(model: PreTrainedModel) -> TreeDrafter:
    """The target's own token among others, three times: what is drafted is accepted, by different branches."""
    predictor = UncachedPredictor(model)

    def draft(tokens: Tokens) -> Iterator[Node]:
        parent, number = TEXT, 0
        for depth in range(3):
            right = int(predictor(tokens, 1)[0].argmax())
            place = (len(tokens) + depth) % 3
            for i in range(3):
                yield Node((right + i - place) % VOCABULARY, parent)
            parent, number, tokens = number + place, number + 3, (*tokens, right)

    return draft


# How trees hang together


trees = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=12).map(
    lambda pairs: tuple([Node(token, parent % (i + 1) - 1) for i, (token, parent) in enumerate(pairs)])
)


@given(trees)
def test_a_tree_in_depth_first_order_has_the_same_paths(nodes: tuple[Node, ...]) -> None:
    def paths(nodes: Sequence[Node]) -> list[Tokens]:
        return sorted(tuple(nodes[j].token for j in path_to(nodes, i)) for i in range(len(nodes)))

    ordered = preorder(nodes)
    assert paths(ordered) == paths(nodes)
    assert all(node.parent < i for i, node in enumerate(ordered))
    for i, node in enumerate(ordered):  # nothing lies between a node and what is below it
        assert node.parent == TEXT or all(node.parent in path_to(ordered, j) for j in range(node.parent + 1, i + 1))


@given(trees)
def test_what_a_node_sees_is_its_path(nodes: tuple[Node, ...]) -> None:
    seen = lineage([node.parent for node in nodes])
    for i in range(len(nodes)):
        assert numpy.flatnonzero(seen[i]).tolist() == path_to(nodes, i)
    assert set(leaves(nodes)) == {i for i in range(len(nodes)) if all(node.parent != i for node in nodes)}


def test_a_path_is_followed_as_far_as_it_goes() -> None:
    assert path_along(TREE, (8, 10, 11, 3)) == [1, 3, 4]
    assert path_along(TREE, (9,)) == []
    assert path_along(TREE, ()) == []


# Reading


def conforms(model: Module, predictor: CachedPredictor, *, tolerance: float, seed: int = 0) -> None:
    """The memo answers like a fresh pass, whatever trees it has read and whichever of their paths were taken."""
    fresh = UncachedPredictor(model)
    report = conformance(
        through_trees(predictor.read_tree, VOCABULARY, seed=seed),
        fresh,
        VOCABULARY,
        tolerance=tolerance,
        seed=seed,
        prune=predictor.prune,
    )
    assert report.holds, report


def reads_at_once(model: Module, predictor: CachedPredictor) -> bool:
    """Whether a tree took one pass, else as many as it has leaves."""
    passes = passes_of(model)
    predictor.read_tree((1, 2, 3), TREE)  # behind the hook the model is another one: read again, perhaps tried again
    passes.clear()
    predictor.read_tree((1, 2, 3), TREE)
    assert len(passes) in (1, len(leaves(TREE)))
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
    predictor.read_tree((1, 2, 3, 4), TREE)
    passes.clear()
    predictor.read_tree((1, 2, 3, 4, 5), TREE)
    predictor.prune((1, 2, 3, 4, 5, 8, 10, 11, 60))
    predictor.read_tree((1, 2, 3, 4, 5, 8, 10, 11, 60), TREE[:2])
    predictor((1, 2, 3, 4, 5, 8, 10, 11, 60, 8, 61), 1)
    assert passes == [1 + 6, 1 + 2, 1]


def test_a_model_is_tried_with_the_prompt_and_not_in_a_pass_that_is_timed() -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].shape[-1]))
    predictor.read_tree((1, 2, 3, 4), ())
    passes.clear()
    predictor.read_tree((1, 2, 3, 4, 5), TREE)
    assert passes == [1 + 6]


def test_a_long_text_is_read_before_its_tree() -> None:
    model = tiny_llama()
    predictor, text = CachedPredictor(model), tuple(range(60))
    predictor.read_tree((1, 2), TREE)
    passes = passes_of(model)
    logits = predictor.read_tree(text, TREE)
    assert passes == [59, 1 + 6]
    assert torch.allclose(logits, path_by_path(UncachedPredictor(model))(text, TREE), atol=1e-9)


def test_without_nodes_a_tree_is_a_text() -> None:
    model = tiny_llama()
    for read in (CachedPredictor(model).read_tree, path_by_path(UncachedPredictor(model))):
        assert torch.allclose(read((1, 2, 3), ()), UncachedPredictor(model)((1, 2, 3), 1), atol=1e-9)


def test_a_cache_that_cannot_keep_a_path_is_read_path_by_path() -> None:
    model = tiny_llama()
    static = CachedPredictor(model, make_cache=lambda: StaticCache(model.config, max_cache_len=64))
    truth = path_by_path(UncachedPredictor(model))((1, 2, 3), TREE)
    assert torch.allclose(static.read_tree((1, 2, 3), TREE), truth, atol=1e-9)
    assert not reads_at_once(model, static)


def test_bit_for_bit_a_tree_is_read_path_by_path() -> None:
    model = bit_for_bit(tiny_llama(dtype=torch.float32))
    predictor = CachedPredictor(model)
    fresh = CachedPredictor(model)
    logits = predictor.read_tree((1, 2, 3, 4), TREE)
    for i in range(len(TREE)):
        path = tuple(TREE[j].token for j in path_to(TREE, i))
        assert torch.equal(logits[i + 1], fresh((1, 2, 3, 4, *path), 1)[0])
    with pytest.raises(DecodeError, match="bit for bit"):
        model(torch.tensor([[1, 2]]), parents=[-1, -1])


def test_an_interrupted_pass_leaves_no_tree() -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model)
    predictor.read_tree((1, 2, 3), TREE)

    def interrupt(module: Module, arguments: object) -> None:
        raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        predictor.read_tree((1, 2, 3, 8, 10), TREE)
    hook.remove()
    truth = path_by_path(UncachedPredictor(model))((1, 2, 3, 8, 10), TREE)
    assert torch.allclose(predictor.read_tree((1, 2, 3, 8, 10), TREE), truth, atol=1e-9)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny_llama()
    predictor = CachedPredictor(model)
    predictor.read_tree((1, 2, 3), TREE)

    def spoil(module: Module, arguments: object, output: CausalLMOutputWithPast) -> None:
        assert output.logits is not None
        output.logits.fill_(torch.nan)

    model.register_forward_hook(spoil)
    with pytest.raises(DecodeError, match="not finite"):
        predictor.read_tree((1, 2, 3), TREE)


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


DRAFTERS: dict[str, Callable[[PreTrainedModel], TreeDrafter]] = {
    "by chance": lambda model: bush,
    "near misses": near_misses,
    "lookups": lambda model: LookupTree(),
    "lookups and bigrams": lambda model: LookupTree(
        Bigrams.of(CachedPredictor(model).read_tree, (1,), VOCABULARY), branches=2
    ),
    "a chain": lambda model: as_tree(SuffixDrafter()),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_greedy_text_is_that_of_autoregressive_decoding(
    make: Callable[[], PreTrainedModel], accelerated: bool, name: str
) -> None:
    model = make()
    drafter = DRAFTERS[name](model)
    target = CachedPredictor(fast(model) if accelerated and make is tiny_llama else model)
    prompt = (5, 9, 2, 5, 9)
    step = tree_step(drafter, target.read_tree, GreedyProcessor(), Dice(), Fixed(9), prune=(target,))
    end = run(step, start(prompt, 60).unwrap())
    assert list(end.state.output) == oracle(prompt, model, 60)
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
        step = tree_step(DRAFTERS[name](model), target.read_tree, processor, SharedNoise(4), Fixed(9))
        assert run(step, start(prompt, 40).unwrap()).state.output == expected


def verified(nodes: tuple[Node, ...], following: Tokens, tokens: Tokens = (1,)) -> tuple[Tokens, list[tuple[int, int]]]:
    """What a target that says `following` takes of a tree, and the calls of its processor: text and rows."""
    calls: list[tuple[int, int]] = []

    def says(tokens: Tokens, last: int) -> Tensor:
        rows = [torch.eye(20)[following[min(len(tokens) - i, len(following)) - 1]] for i in reversed(range(last))]
        return torch.stack(rows)

    class Counting:
        def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[Distribution, ...]:
            calls.append((len(tokens), len(logits)))
            return GreedyProcessor().laws(tokens, logits)

    state = DecodeState(Request(tokens, 99), tokens)
    taken = VerifyTree(path_by_path(says), Counting(), Dice())(DraftedTree(state, nodes))
    assert len(taken.laws) == len(taken.logits) == taken.accepted + 1
    assert [int(row.argmax()) for row in taken.logits] == list(following[: taken.accepted + 1])
    return taken.drafted.tokens, calls


def test_the_path_that_the_target_takes_is_what_was_drafted() -> None:
    tree = preorder(TREE)
    trunk = (3, 3)  # the laws behind the text, 7, and 7 9, before the target has left them
    assert verified(tree, (8, 10, 11, 5)) == ((8, 10, 11), [trunk, (4, 3)])
    assert verified(tree, (7, 9, 3)) == ((7, 9), [trunk])
    assert verified(tree, (8, 12, 3)) == ((8, 12), [trunk, (4, 3), (3, 1)])
    assert verified(tree, (3, 9)) == ((), [trunk])
    assert verified((), (3,)) == ((), [(1, 1)])


def test_all_nodes_count_as_drafted_and_the_path_as_accepted() -> None:
    state = DecodeState(Request((1,), 50), (1,))
    step = tree_step(lambda tokens: iter(TREE), path_by_path(TableModel(20)), GreedyProcessor(), Dice(), Fixed(6))
    after = step(state)
    assert isinstance(after, DecodeState)
    assert after.tally.sources == (("draft", Count(6, len(after.output) - 1)),)


def test_of_equal_siblings_the_first_is_taken() -> None:
    assert verified((Node(4), Node(5, 0), Node(4), Node(6, 2)), (4, 6)) == ((4,), [(3, 3)])


# Drafting


def drafted(drafter: TreeDrafter, room: int, gamma: int = 8) -> tuple[Node, ...]:
    tokens = (1, 2, 3)
    return DraftTree(drafter, Fixed(gamma))(DecodeState(Request(tokens, 3 + room), tokens)).nodes


def test_no_path_is_longer_than_the_room() -> None:
    chain = as_tree(lambda tokens: PromptLookup(num_output_tokens=9)((*range(12), 0)))
    assert [len(drafted(chain, room)) for room in (1, 2, 3, 9, 20)] == [0, 1, 2, 8, 8]
    wide = (Node(4), Node(5), Node(6, 1), Node(7))
    assert drafted(lambda tokens: iter(wide), 2) == (Node(4), Node(5))


@pytest.mark.parametrize("parent", [1, 2, -2])
def test_a_node_before_its_parent_is_refused(parent: int) -> None:
    with pytest.raises(DecodeError, match="node 1 of a tree does not come behind its parent"):
        drafted(lambda tokens: iter((Node(4), Node(5, parent))), 9)


TABLE = Bigrams(
    numpy.array([[(i + 1) % 8, (i + 3) % 8, (i + 5) % 8] for i in range(8)]), numpy.array([[0.5, 0.25, 0.125]] * 8)
)
texts = st.lists(st.integers(0, 7), min_size=1, max_size=40).map(tuple)


@given(texts, st.sampled_from([LookupTree(), LookupTree(TABLE), LookupTree(TABLE, branches=1)]))
def test_a_lookup_tree_is_a_tree_and_the_likeliest_come_first(tokens: Tokens, drafter: LookupTree) -> None:
    nodes = list(islice(drafter(tokens), 40))
    assert all(TEXT <= node.parent < i for i, node in enumerate(nodes))
    assert len({(node.parent, node.token) for node in nodes}) == len(nodes)
    chances = [node.chance for node in nodes]
    assert chances == sorted(chances, reverse=True)
    assert all(0 < chance < 1 for chance in chances)
    for parent in {node.parent for node in nodes}:
        assert sum(node.chance for node in nodes if node.parent == parent) <= (
            nodes[parent].chance if parent >= 0 else 1
        )
    assert nodes == list(islice(drafter(tokens), 40))
    assert drafter == LookupTree(drafter.bigrams, drafter.branches)


@given(texts)
def test_the_first_branch_is_the_copy_that_a_suffix_drafter_follows(tokens: Tokens) -> None:
    copy, node = SuffixDrafter().copy(tokens), next(LookupTree(branches=1)(tokens), None)
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

    copy = SuffixDrafter().copy(tokens)
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
    assert [first, *islice(stream, 29)] == alone


def test_edited_texts_are_copied_across_their_edits() -> None:
    edited = (*range(20), *range(9))
    for came, following in ((70,), 10), ((70, 9), 10), ((10,), 11):
        assert next(LookupTree()((*edited, *came))).token == following


def test_a_loop_is_continued() -> None:
    nodes = list(islice(LookupTree(branches=1)((1, 2, 3) * 4), 7))
    assert [node.token for node in nodes] == [1, 2, 3, 1, 2, 3, 1]


def test_bigrams_are_drafted_where_nothing_matches() -> None:
    nodes = list(islice(LookupTree(TABLE)((0,)), 4))
    assert nodes == [
        Node(1, TEXT, 0.5, "bigram"),
        Node(3, TEXT, 0.25, "bigram"),
        Node(2, 0, 0.25, "bigram"),
        Node(5, TEXT, 0.125, "bigram"),
    ]
    assert list(LookupTree()((0,))) == []


def test_behind_a_bigram_the_text_is_looked_through_again() -> None:
    nodes = list(islice(LookupTree(TABLE)((3, 7, 0)), 40))
    (three,) = [i for i, node in enumerate(nodes) if (node.token, node.parent) == (3, TEXT)]
    assert any((node.token, node.parent, node.source) == (7, three, "suffix") for node in nodes)


def test_a_token_that_both_know_has_both_chances() -> None:
    copied, both = next(LookupTree()((1, 2, 1))), next(LookupTree(TABLE)((1, 2, 1)))
    assert copied.token == both.token == 2
    assert both.chance == pytest.approx(copied.chance + (1 - copied.chance) / 2 * 0.5)
    assert both.source == "suffix"


@given(texts)
def test_a_chain_as_a_tree_as_a_chain_is_the_chain(tokens: Tokens) -> None:
    def drafted(drafter: CertainDrafter) -> list[tuple[int, str]]:
        return [(proposal.token, proposal.source) for proposal in drafter(tokens)]

    assert drafted(as_chain(as_tree(SuffixDrafter()))) == drafted(SuffixDrafter())


def test_the_likeliest_path_is_drafted_as_long_as_it_is_likely() -> None:
    nodes = (
        Node(5, chance=0.5),
        Node(6, chance=0.4),
        Node(7, 1, 0.3),
        Node(8, 0, 0.2),
        Node(9, 3, 0.1),
        Node(3, 4, 0.05),
    )
    for least, path in ((0.1, [5, 8, 9]), (0.15, [5, 8]), (0.45, [5]), (0.6, [])):
        assert [proposal.token for proposal in as_chain(lambda tokens: iter(nodes), least)((1,))] == path


def test_branches_are_at_least_one() -> None:
    with pytest.raises(DecodeError, match="branches is below 1"):
        LookupTree(branches=0)


# Bigrams


def test_bigrams_are_what_the_model_says_behind_each_token() -> None:
    model = tiny_llama()
    table = Bigrams.of(CachedPredictor(model).read_tree, (3, 1), VOCABULARY, k=4)
    for token in (0, 17, 63):
        best = torch.softmax(model(torch.tensor([[3, 1, token]])).logits[0, -1], dim=-1).topk(4)
        found = table.behind(token)
        assert [follower for follower, _ in found] == best.indices.tolist()
        assert [chance for _, chance in found] == pytest.approx(best.values.tolist())


def test_a_vocabulary_is_asked_about_in_a_few_passes() -> None:
    model = tiny_llama(vocab_size=300)
    predictor = CachedPredictor(model)
    passes = passes_of(model)
    predictor.read_tree((3, 1), TREE)
    passes.clear()
    table = Bigrams.of(predictor.read_tree, (3, 1), 300, k=1)
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
        (lambda: Bigrams.of(path_by_path(TableModel(4)), (0,), 4, k=5), "k is above 4"),
        (lambda: Bigrams.of(path_by_path(TableModel(4)), (0,), 4, k=0), "k is below 1"),
    ],
)
def test_tables_that_cannot_be_are_refused(make: Callable[[], Bigrams], said: str) -> None:
    with pytest.raises(DecodeError, match=said):
        make()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_files_that_hold_no_table_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is None:
        save_file({"tokens": numpy.zeros((1, 1))}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(DecodeError, match="make the table again"):
        Bigrams.load(path)
