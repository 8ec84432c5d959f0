"""Drafts from a head: samples of it, and the dynamic tree of what it finds most probable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple, final

import torch
from attrs import field, frozen
from torch import Tensor

from specflow.distribution import PointMass
from specflow.drafters.siblings import drawn_tree
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, does, each, valid, whole
from specflow.guards.ids import text_of
from specflow.heads.reading import HeadPredictor
from specflow.processors import Processor
from specflow.randomness import Sampling
from specflow.state import TEXT, Proposal, Tokens

_is_predictor = valid(a(HeadPredictor, "give HeadPredictor(head, target)"))
_name = valid(a(str, "give a name"))


@final
@frozen
class HeadDrafter:
    """Drafts by sampling from a head's own processed law, and that law is the q that verification uses.

    A chain; with `widths` a tree, level by level, each in one pass of the head: `widths[0]` different tokens after the
    text, `widths[1]` after each of them, and so on; deeper, one after each. Siblings are drawn one after the other
    without replacement; those of a greedy choice are what the processor would choose next. `LLMDrafter` does the same
    with a model.

    It ends where the head or the target can go no further, or the processor says that nothing can follow, and says
    nothing of a text of one token.

    >>> from specflow.heads import Jump, Vocabulary
    >>> from specflow.testing import TableModel
    >>> from torch.nn import Embedding, Linear
    >>> head = Jump(4, Vocabulary(5, 5), (0,), Embedding(5, 4), Linear(4, 5, bias=False)).double()
    >>> from specflow import Dice, Fixed, GreedyProcessor, start
    >>> drafter = HeadDrafter(HeadPredictor(head, TableModel(5, width=4)), GreedyProcessor(), Dice())
    >>> len(Fixed(3)(drafter((0, 4)), start((0, 4), 9).unwrap())[0])
    3
    """

    predictor: HeadPredictor = field(validator=_is_predictor)
    processor: Processor = field(
        validator=valid(does("a processor", "give a Processor, such as GreedyProcessor()", "laws"))
    )
    rng: Sampling = field(validator=valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw")))
    widths: tuple[int, ...] = field(default=(), validator=valid(each(whole(1, "draft one token at least", MOST))))
    source: str = field(default="head", validator=_name)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal]:
        text = text_of(tokens)

        def rows(drafted: Sequence[Proposal], last: int) -> Tensor:
            return self.predictor.head.vocabulary.spread(self.predictor.rows(text, drafted, last))

        levels = self.predictor.reach(text)
        yield from drawn_tree(text, rows, self.processor, self.rng, self.widths, self.source, levels)


class _Node(NamedTuple):
    """A token that may be drafted after another one, `parent`: its number among them."""

    token: int
    parent: int
    chance: float


@final
@frozen
class HeadTree:
    """The dynamic tree of EAGLE-2: what the head finds most probable, in the order of the chances of whole paths.

    Level by level, up to `depth` of them, the head reads the `beam` likeliest drafts of a level in one pass, and each
    of them has its `beam` likeliest followers as candidates for the next. The chance of a draft is the product of the
    head's probabilities down its path. All candidates are proposed in the order of their chances, so that the first n
    are the n with the largest ones, for every n: `Fixed(n)` takes them, and `CostAware` works out how many pay.

    Of heads that do not look at drafts (`Medusa`) the tree is that part of the cartesian product of their guesses.
    The drafts are certain: they are exact under every law of the target.
    Source: Li et al. 2406.16858, section 4 (expansion and reranking); Cai et al. 2401.10774, section 2.1.2.

    >>> from specflow.heads import Jump, Vocabulary
    >>> from specflow.testing import TableModel
    >>> from torch.nn import Embedding, Linear
    >>> head = Jump(4, Vocabulary(5, 5), (0,), Embedding(5, 4), Linear(4, 5, bias=False)).double()
    >>> drafts = [*HeadTree(HeadPredictor(head, TableModel(5, width=4)), beam=2, depth=2)((0, 4))]
    >>> len(drafts), max(drafts, key=lambda draft: draft.chance) is drafts[0]
    (6, True)
    """

    predictor: HeadPredictor = field(validator=_is_predictor)
    beam: int = field(default=10, validator=valid(whole(1, "read one draft of a level at least", MOST)))
    depth: int = field(default=6, validator=valid(whole(1, "draft one level at least", MOST)))
    source: str = field(default="head", validator=_name)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        text = text_of(tokens)
        nodes: list[_Node] = []
        waiting: list[tuple[float, int]] = []  # those not drafted yet, the likeliest first and the older of equals
        numbers = {TEXT: TEXT}  # of those drafted, in the stream
        places = {TEXT: TEXT}  # of those that the head reads, among them
        read: list[Proposal] = []
        level: list[tuple[float, int]] = [(1.0, TEXT)]

        def likelier(least: float) -> Iterator[Proposal[PointMass]]:
            while waiting and -waiting[0][0] >= least:
                _, i = heappop(waiting)
                token, parent, chance = nodes[i]
                numbers[i] = len(numbers) - 1
                yield Proposal(token, PointMass(token), numbers[parent], self.source, chance)

        reach = self.predictor.reach(text)
        for _ in range(int(self.depth) if reach is None else min(int(self.depth), reach)):
            found: list[tuple[float, int]] = []
            for (before, parent), followers in zip(level, self._followers(text, read, len(level)), strict=True):
                for token, chance in followers:
                    found.append((-before * chance, len(nodes)))
                    nodes.append(_Node(token, parent, before * chance))
            for each_found in found:
                heappush(waiting, each_found)
            level = [(-unlikely, i) for unlikely, i in sorted(found)[: self.beam]]
            for _, i in level:
                places[i] = len(read)
                read.append(Proposal(nodes[i].token, parent=places[nodes[i].parent]))
            yield from likelier(level[0][0])  # what is found from now on is less likely
        yield from likelier(0.0)

    def _followers(self, text: Tokens, read: Sequence[Proposal], last: int) -> list[list[tuple[int, float]]]:
        """The likeliest tokens after each of the last that the head reads, with their probabilities, none of them 0."""
        vocabulary = self.predictor.head.vocabulary
        logits = vocabulary.speakable(self.predictor.rows(text, read, last))
        probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        best = probs.topk(min(int(self.beam), probs.shape[-1]))
        rows: list[list[float]] = best.values.tolist()
        if not all(row[0] > 0 for row in rows):  # NaN is not
            happened, remedy = "the head's logits are not finite", "see its weights"
            raise DecodeError("head", happened, f"{rows[0][0]} after a text of {len(text)} tokens", remedy)
        ids: list[list[int]] = vocabulary.named(best.indices).tolist()
        return [
            [(token, chance) for token, chance in zip(tokens, chances, strict=True) if chance > 0]
            for tokens, chances in zip(ids, rows, strict=True)
        ]
