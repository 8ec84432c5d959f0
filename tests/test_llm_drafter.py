"""A model that drafts: chains, and trees whose siblings are drawn one after the other. See also test_trees.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, permutations
from math import inf, prod
from typing import final

import pytest
import torch
from attrs import define, field
from torch import Tensor
from typing_extensions import override

from specflow import (
    TEXT,
    Categorical,
    DecodeError,
    Dice,
    EachPrefix,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    PointMass,
    Predictor,
    Processor,
    Proposal,
    SharedNoise,
    Tokens,
    TopKProcessor,
    along_paths,
    autoregressive_step,
    run,
    seed_coupled_step,
    start,
)
from specflow.constraints import LogitBias, RepetitionPenalty
from specflow.errors import DeadEndError
from specflow.state import parents_of
from specflow.testing import Branch, TableModel, exact_law

SAMPLED = MultinomialProcessor(1.0)


@final
@define(eq=False)
class Counted:
    """A predictor that remembers how many drafts it was given each time."""

    predictor: Predictor
    asked: list[int] = field(factory=list)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        self.asked.append(len(drafts))
        return self.predictor(tokens, drafts)


def always(row: list[float]) -> Predictor:
    return along_paths(lambda tokens: torch.tensor(row))


def shape(drafter: LLMDrafter, text: Tokens, most: int) -> tuple[int, ...]:
    return parents_of(tuple(islice(drafter(text), most)))


def behind(model: Predictor, text: Tokens) -> Tensor:
    return model(text, ())[0].softmax(-1)


@pytest.mark.parametrize(
    ("widths", "parents"),
    [
        ((1,), (-1, 0, 1, 2)),
        ((2,), (-1, -1, 0, 1, 2, 3)),
        ((1, 2, 1), (-1, 0, 0, 1, 2, 3, 4)),
        ((2, 2), (-1, -1, 0, 0, 1, 1, 2, 3, 4, 5)),
        ((3, 1, 2), (-1, -1, -1, 0, 1, 2, 3, 3, 4, 4, 5, 5, 6)),
    ],
)
@pytest.mark.parametrize("processor", [SAMPLED, GreedyProcessor()], ids=["sampled", "greedy"])
def test_a_tree_is_as_wide_as_was_asked_level_by_level(
    widths: tuple[int, ...], parents: tuple[int, ...], processor: Processor
) -> None:
    model = along_paths(lambda tokens: torch.tensor([1.0, 0.5, 0.2, 0.9, 0.1]).roll(tokens[-1]))
    drafter = LLMDrafter(model, processor, Dice(), widths=widths)
    drafts = tuple(islice(drafter((0,)), len(parents)))
    assert parents_of(drafts) == parents
    for parent in parents:
        siblings = [draft.token for draft, other in zip(drafts, parents, strict=True) if other == parent]
        assert len(set(siblings)) == len(siblings)


def test_a_level_is_one_pass_and_none_is_made_for_what_nobody_takes() -> None:
    model = Counted(TableModel(5, 1))
    stream = LLMDrafter(model, SAMPLED, Dice(), widths=(3, 2))((0, 1))
    assert model.asked == []
    pulled = 0
    for taken, asked in ((1, [0]), (3, [0]), (4, [0, 3]), (9, [0, 3]), (10, [0, 3, 9]), (15, [0, 3, 9])):
        pulled += len(list(islice(stream, taken - pulled)))
        assert pulled == taken
        assert model.asked == asked


@pytest.mark.parametrize("seed", range(3))
def test_siblings_have_the_law_of_drawing_without_putting_back(seed: int) -> None:
    """p(a), then p(b) / (1 - p(a)), then what is left: on every branch, and what is told as q is what it was."""
    model = TableModel(4, seed)
    p = behind(model, (0,)).tolist()

    def siblings(branch: Branch) -> tuple[Tokens, float]:
        drafts = tuple(islice(LLMDrafter(model, SAMPLED, branch, widths=(3,))((0,)), 3))
        level = [draft for draft, parent in zip(drafts, parents_of(drafts), strict=True) if parent == TEXT]
        told = prod(draft.q.of(draft.token) for draft in level if isinstance(draft.q, Categorical))
        return tuple([draft.token for draft in level]), round(told, 9)

    law = exact_law(siblings).probabilities
    possible = [token for token in range(4) if p[token] > 0]
    expected = {}
    for order in permutations(possible, min(3, len(possible))):
        left, weight = 1.0, 1.0
        for token in order:
            weight *= p[token] / left
            left -= p[token]
        expected[order] = weight
    summed: dict[Tokens, float] = {}
    for (order, told), weight in law.items():
        summed[order] = summed.get(order, 0.0) + weight
        assert told == pytest.approx(expected[order], abs=1e-8)
    assert summed == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_on_shared_noise_the_first_path_is_the_chain_and_siblings_come_as_the_noise_prefers_them(seed: int) -> None:
    """Of any tokens that are left the noise prefers the one that stands first among the siblings."""
    model, noise = TableModel(5, seed), SharedNoise(seed)
    text = (0, 3)
    p = behind(model, text)
    possible = int((p > 0).sum())
    tree = tuple(islice(LLMDrafter(model, SAMPLED, noise, widths=(5,))(text), possible + 1))
    chain = tuple(islice(LLMDrafter(model, SAMPLED, noise)(text), 2))
    siblings = [draft.token for draft in tree[:possible]]
    assert parents_of(tree) == (*[TEXT] * possible, 0)
    assert sorted(siblings) == [token for token in range(5) if p[token] > 0]
    assert [tree[0].token, tree[possible].token] == [draft.token for draft in chain]
    for out in range(1, 2**5):
        left = p.clone()
        left[[token for token in range(5) if out >> token & 1]] = 0.0
        if left.sum() > 0:
            preferred = noise.draw(Categorical(left / left.sum()), len(text))
            assert preferred == next(token for token in siblings if left[token] > 0)


def test_on_shared_noise_a_tree_is_accepted_further_than_its_chain() -> None:
    """And the text is that of the seed."""
    rows = 2 * torch.randn(8, 8, dtype=torch.float64)
    target = along_paths(lambda tokens: rows[tokens[-1]])
    near = along_paths(lambda tokens: (rows + torch.ones(8).roll(tokens[-1]).cumsum(0) / 4)[tokens[-1]])
    lengths = [0.0, 0.0]
    for seed in range(5):
        noise = SharedNoise(seed)
        alone = run(autoregressive_step(target, SAMPLED, noise), start((1,), 60).unwrap()).state
        for i, (widths, gamma) in enumerate((((), 2), ((3, 1), 6))):
            drafter = LLMDrafter(near, SAMPLED, noise, widths=widths)
            end = run(seed_coupled_step(drafter, target, SAMPLED, noise, Fixed(gamma)), start((1,), 60).unwrap()).state
            assert end.output == alone.output
            lengths[i] += end.mean_accepted_length / 5
    assert lengths[0] + 0.2 < lengths[1]


@pytest.mark.parametrize("context", range(1, 9))
@pytest.mark.parametrize("widths", [(2,), (2, 2), (1, 3)])
def test_a_tree_is_as_deep_as_a_chain_where_the_model_ends(context: int, widths: tuple[int, ...]) -> None:
    model, text = TableModel(5, 2), (1, 2, 3)
    chain = list(LLMDrafter(model, SAMPLED, Dice(), context)(text))
    tree = tuple(LLMDrafter(model, SAMPLED, Dice(), context, widths=widths)(text))
    assert len(chain) == max(0, context - 2)
    depth = [0]
    for parent in parents_of(tree):
        depth.append(1 + (0 if parent == TEXT else depth[parent + 1]))
    assert max(depth) == len(chain)


def test_behind_a_token_that_the_model_does_not_know_there_is_no_tree() -> None:
    assert list(LLMDrafter(TableModel(5), SAMPLED, Dice(), vocab_size=5, widths=(2,))((1, 5))) == []
    assert shape(LLMDrafter(TableModel(5), SAMPLED, Dice(), vocab_size=5, widths=(2,)), (1, 4), 2) == (TEXT, TEXT)


def test_siblings_are_tokens_that_the_processor_allows() -> None:
    for _ in range(20):
        drafts = tuple(islice(LLMDrafter(TableModel(6, 3), TopKProcessor(1.0, 2), Dice(), widths=(4,))((0,)), 3))
        best = behind(TableModel(6, 3), (0,)).topk(2).indices.tolist()
        assert sorted(draft.token for draft in drafts[:2]) == sorted(best)
        assert parents_of(drafts) == (TEXT, TEXT, 0)


def test_beside_a_greedy_choice_stand_the_next_best_tokens_each_of_them_certain() -> None:
    """Ties too: of equals each is drafted once."""
    for row in ([0.3, 2.0, 1.0, 1.5, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0, 3.0]):
        drafter = LLMDrafter(always(row), GreedyProcessor(), Dice(), widths=(5,))
        drafts = list(islice(drafter((0,)), 5))
        assert sorted(draft.token for draft in drafts) == list(range(5))
        assert [row[draft.token] for draft in drafts] == sorted(row, reverse=True)
        assert all(draft.q == PointMass(draft.token) for draft in drafts)
        assert drafts[0].token == max(range(5), key=row.__getitem__)


def test_beside_a_processors_choice_stands_what_it_would_choose_next() -> None:
    """Not what the raw logits say: of what it forbids nothing is drafted, and no more than there is."""
    row = [0.3, 2.0, 1.0, 1.5, -1.0]
    forbids = LogitBias(GreedyProcessor(), {1: -inf, 3: -inf})
    drafts = list(islice(LLMDrafter(always(row), forbids, Dice(), widths=(5,))((0,)), 4))
    assert [(draft.token, parent) for draft, parent in zip(drafts, parents_of(drafts), strict=True)] == [
        (2, TEXT), (0, TEXT), (4, TEXT), (2, 0)
    ]  # fmt: skip
    punishes = RepetitionPenalty(GreedyProcessor(), 4.0)
    drafts = list(islice(LLMDrafter(always(row), punishes, Dice(), widths=(3,))((1,)), 3))
    assert [draft.token for draft in drafts] == [3, 2, 1]


def test_where_a_processor_of_ones_own_allows_one_token_there_is_none_beside_it() -> None:
    """Without that one it leaves NaN, which nobody can tell from a fault: only a law was made of the logits before."""

    class Three(GreedyProcessor):
        @override
        def _process(self, logits: Tensor) -> Tensor:
            return torch.full_like(logits, -inf).index_copy(-1, torch.tensor([3]), logits[..., 3:4])

    drafts = list(islice(LLMDrafter(always([0.3, 2.0, 1.0, 1.5, -1.0]), Three(), Dice(), widths=(3,))((0,)), 2))
    assert ([draft.token for draft in drafts], parents_of(drafts)) == ([3, 3], (TEXT, 0))


def test_a_draft_ends_where_its_processor_says_that_nothing_can_follow() -> None:
    def two(prefix: Tokens, logits: Tensor) -> PointMass:
        if len(prefix) > 2 or prefix[-1] == 3:
            raise DeadEndError("tokens", "the text is over", len(prefix), "end it")
        return PointMass(int(logits.argmax()))

    model = always([0.3, 2.0, 1.0, 1.5, -1.0])
    for widths, parents in (((), (TEXT, 0)), ((1,), (TEXT, 0)), ((3, 2), (TEXT, TEXT, TEXT, 0, 0, 2, 2))):
        assert parents_of(list(LLMDrafter(model, EachPrefix(two), Dice(), widths=widths)((0,)))) == parents
    assert list(LLMDrafter(model, EachPrefix(two), Dice(), widths=(2,))((3,))) == []

    def fails(prefix: Tokens, logits: Tensor) -> PointMass:
        raise DecodeError("processor", "it does not work", "nothing", "mend it")

    for widths in ((), (2,)):
        with pytest.raises(DecodeError, match="it does not work"):
            next(LLMDrafter(model, EachPrefix(fails), Dice(), widths=widths)((0,)))


@pytest.mark.parametrize("widths", [0, 2, "ab", None, (0,), (2, 0), (-1,), (1.5,), (True,), ("2",), torch.tensor(2)])
def test_widths_are_whole_numbers_of_one_or_more(widths: tuple[int, ...]) -> None:
    with pytest.raises(DecodeError, match="widths"):
        LLMDrafter(TableModel(3), SAMPLED, Dice(), widths=widths)
