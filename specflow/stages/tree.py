"""Trees of drafts: propose several ways in which the text may go on, and let the target take one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import final

from attrs import evolve, field, frozen
from torch import Tensor

from specflow.asked import fits, laws_of, looked_at, node_of, stream_of
from specflow.checks import a, calls, named, shown, valid
from specflow.distribution import Distribution, PointMass
from specflow.errors import DecodeError
from specflow.gamma import Fixed
from specflow.processors import Laws, Processor
from specflow.random import Sampling, draws
from specflow.stages.draft import a_state
from specflow.stages.verify import a_processor, is_sampling
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
    likeliest path lies together, in the pass and in the cache. `DecodeError`, naming the source, for what is no node,
    for a node that does not come behind its parent, and for a token that is no id of the vocabulary.
    """

    drafter: TreeDrafter = field(validator=valid(calls("a tree drafter", "give a function of the tokens so far")))
    gamma: TreePolicy = field(
        default=Fixed(8), validator=valid(calls("a tree policy", "give Fixed(8), or a function of stream and state"))
    )

    def __call__(self, state: DecodeState, /) -> DraftedTree:
        a_state("state", state)
        stream = self._no_deeper(stream_of(self.drafter, self.drafter(state.tokens)), state)
        took: object = self.gamma(stream, state)
        match took:
            case (tuple() | list() as nodes, tuple() as pace):
                whole = [node_of(self.gamma, node, i, state.request.vocab_size) for i, node in enumerate(nodes)]
                return DraftedTree(evolve(state, pace=pace), preorder(whole))
        happened = f"the policy {named(self.gamma)} returns no nodes and pace"
        raise DecodeError("gamma", happened, shown(took), "return (the nodes taken, state.pace)")

    def _no_deeper(self, stream: Iterator[object], state: DecodeState) -> Iterator[Node]:
        """The stream up to the first node whose path has no room."""
        depths: list[int] = []
        for number, value in enumerate(stream):
            node = node_of(self.drafter, value, number, state.request.vocab_size)
            depths.append(1 if node.parent == TEXT else depths[node.parent] + 1)
            if depths[-1] > state.room - 1:
                return
            yield node


@final
@frozen
class VerifyTree:
    """Draws s ~ p where the text ends and goes on at the node s, if it is there, and so on down the tree.

    Exact whatever the nodes are, since every emitted token is the target's own sample: P(a node's child is taken) is
    the mass that p has on its children. So one pass judges several drafts for each place. With `SharedNoise` the text
    depends on the seed alone, and so it does with `Dice`, which draw once for each token that is committed. What comes
    out is the path that was taken, as if it alone had been drafted; the other nodes are `beside` it. The walk ends at a
    stop token.

    Laws that a processor makes at once are made along the likeliest path, and anew where the target leaves it; so are
    the samples, on a device. Others are made node by node along the path that is taken.
    Source: Miao et al. 2305.09781 (SpecInfer), section 4, its token tree and naive sampling, which for certain drafts
    accepts as often as any rule. For drafts that were drawn, their multi-step rule would accept more.
    """

    target: TreePredictor = field(
        validator=valid(calls("a tree predictor", "give predictor.read_tree, or path_by_path(predictor)"))
    )
    processor: Processor = field(validator=valid(a_processor))
    rng: Sampling = field(validator=is_sampling)

    def __call__(self, drafted: DraftedTree, /) -> Verified:
        a(DraftedTree, "put it behind DraftTree")("drafted", drafted)
        text, nodes, stop = drafted.state.tokens, drafted.nodes, drafted.state.request.stop
        logits = looked_at(self.target(text, nodes), len(nodes) + 1, self.target, len(text) + len(nodes))
        for node in nodes:
            fits(node.token, node.source, logits.shape[1])
        children = children_of(nodes)
        path, laws = list[int](), list[Distribution]()
        correction: Distribution | None = None
        while correction is None and not (path and nodes[path[-1]].token in stop):
            trunk = _trunk(children, path[-1] if path else TEXT)
            ahead = [nodes[i].token for i in (*path, *trunk[1:])]
            _, known = laws_of(self.processor, (*text, *ahead), _rows(logits, trunk))
            correction = self._along(trunk, known, drafted, children, path, laws)
        way = (TEXT, *path)
        beside = [i for i in range(len(nodes)) if i not in path]
        taken = Drafted(drafted.state, _proposals(nodes, path), _proposals(nodes, beside))
        return Verified(taken, len(path), correction, tuple(laws), _rows(logits, way))

    def _along(
        self,
        trunk: Sequence[int],
        known: Laws,
        drafted: DraftedTree,
        children: Mapping[int, Mapping[int, int]],
        path: list[int],
        laws: list[Distribution],
    ) -> Distribution | None:
        """Lengthens `path` and `laws` as far as the target follows the trunk, and by the node at which it leaves it.

        The law of the token behind the path, if it ends there; None where it goes on beside the trunk, or is over.
        """
        nodes, stop = drafted.nodes, drafted.state.request.stop
        start = len(drafted.state.tokens) + len(path)
        with closing(draws(self.rng, known, start, range(len(trunk) - 1))) as samples:
            for at, here in enumerate(trunk):
                laws.append(known[at])
                if here not in children:
                    return laws[-1]
                sample = next(samples)
                if sample not in children[here]:
                    return PointMass(sample)
                path.append(children[here][sample])
                if path[-1] != trunk[at + 1] or nodes[path[-1]].token in stop:
                    break
        return None


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
