"""Trees of drafts: propose several ways in which the text may go on, and let the target take one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import final

from attrs import evolve, frozen
from torch import Tensor

from specflow.distribution import Distribution, PointMass
from specflow.errors import DecodeError
from specflow.gamma import Fixed
from specflow.processors import Processor
from specflow.random import Sampling, draws
from specflow.state import (
    TEXT,
    DecodeState,
    Drafted,
    DraftedTree,
    Node,
    Proposal,
    TreeDrafter,
    TreePolicy,
    TreePredictor,
    Verified,
)
from specflow.trees import children_of, preorder


@final
@frozen
class DraftTree:
    """Takes as many nodes from the drafter as the policy wants, up to the first that is too deep for the room.

    A path has at most room - 1 nodes, so that the bonus token fits. The nodes are put in depth-first order, so that the
    likeliest path lies together, in the pass and in the cache. `DecodeError` for a node that does not come behind its
    parent.
    """

    drafter: TreeDrafter
    gamma: TreePolicy = Fixed(8)

    def __call__(self, state: DecodeState, /) -> DraftedTree:
        nodes, pace = self.gamma(_no_deeper(self.drafter(state.tokens), state.room - 1), state)
        return DraftedTree(evolve(state, pace=pace), preorder(nodes))


@final
@frozen
class VerifyTree:
    """Draws s ~ p where the text ends and goes on at the node s, if it is there, and so on down the tree.

    Exact whatever the nodes are, since every emitted token is the target's own sample: P(a node's child is taken) is
    the mass that p has on its children. So one pass judges several drafts for each place. With `SharedNoise` the text
    depends on the seed alone. What comes out is the path that was taken, as if it alone had been drafted; the other
    nodes are `beside` it.

    Laws are made along the likeliest path, and anew where the target leaves it; so are the samples, on a device.
    Source: Miao et al. 2305.09781 (SpecInfer), section 4, its token tree and naive sampling, which for certain drafts
    accepts as often as any rule. For drafts that were drawn, their multi-step rule would accept more.
    """

    target: TreePredictor
    processor: Processor
    rng: Sampling

    def __call__(self, drafted: DraftedTree, /) -> Verified:
        text, nodes = drafted.state.tokens, drafted.nodes
        logits = self.target(text, nodes)
        children = children_of(nodes)
        known: dict[int, Distribution] = {}
        samples: Iterator[int] = iter(())
        here, path = TEXT, list[int]()
        while True:
            if here not in known:
                trunk = _trunk(children, here)
                ahead = [nodes[i].token for i in (*path, *trunk[1:])]
                laws = self.processor.laws((*text, *ahead), _rows(logits, trunk))
                known |= zip(trunk, laws, strict=True)
                samples = draws(self.rng, laws[:-1], len(text) + len(path))
            correction = known[here]
            if here not in children:
                break
            sample = next(samples)
            if sample not in children[here]:
                correction = PointMass(sample)
                break
            here = children[here][sample]
            path.append(here)
        way = (TEXT, *path)
        beside = [i for i in range(len(nodes)) if i not in path]
        taken = Drafted(drafted.state, _proposals(nodes, path), _proposals(nodes, beside))
        laws = tuple([known[i] for i in way])
        return Verified(taken, len(path), correction, laws, _rows(logits, way))


def _trunk(children: Mapping[int, Mapping[int, int]], here: int) -> list[int]:
    """From here down, always to the first child, which is the likeliest."""
    trunk = [here]
    while trunk[-1] in children:
        trunk.append(next(iter(children[trunk[-1]].values())))
    return trunk


def _rows(logits: Tensor, way: Sequence[int]) -> Tensor:
    """The logits behind the nodes of a way, without a copy where they lie together."""
    first, last = way[0] + 1, way[-1] + 1
    return logits[first : last + 1] if last - first == len(way) - 1 else logits[[i + 1 for i in way]]


def _proposals(nodes: Sequence[Node], chosen: Iterable[int]) -> tuple[Proposal, ...]:
    return tuple([Proposal(nodes[i].token, PointMass(nodes[i].token), nodes[i].source) for i in chosen])


def _no_deeper(stream: Iterator[Node], most: int) -> Iterator[Node]:
    """The stream up to the first node whose path has more than `most` nodes."""
    depths: list[int] = []
    for number, node in enumerate(stream):
        if not TEXT <= node.parent < number:
            happened, remedy = f"node {number} of a tree does not come behind its parent", "yield parents first"
            raise DecodeError("drafter", happened, node, remedy)
        depths.append(1 if node.parent == TEXT else depths[node.parent] + 1)
        if depths[-1] > most:
            return
        yield node
