"""The algebra of drafters: drafters combine into drafters, to any depth.

Proposals pass through as they are, with the law q they were drawn from and the name of their source, so a combination
is as exact as its parts, and the tally tells who proposed and who was accepted. One thing must hold: which drafter is
heard must not depend on the tokens drawn. A `Drafter` decides whether it proposes a token before it draws it, so it
is safe to ask whether a stream goes on (`first_of`, `then`, `at_most`); only `longest` and `merged` ask for more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import islice
from math import inf
from typing import TypeAlias, final

from attrs import evolve, field, frozen

from specflow.asked import proposal_of, stream_of
from specflow.distribution import PointMass
from specflow.guards.checks import MOST, calls, each, number, whole
from specflow.state import BEFORE, TEXT, CertainDrafter, Proposal, Q, Tokens, parents_of
from specflow.trees import depths, parent_of

DrafterOf: TypeAlias = Callable[[Tokens], Iterator[Proposal[Q]]]
"""A drafter whose proposals have laws of type Q: combinations of certain drafters are certain."""

_is_drafter = calls("a drafter", "give a function of the tokens so far")
_are_drafters = each(_is_drafter)
_is_chance = number("a draft's chance is not a finite number", "give a probability")


def propose_nothing(tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
    """The unit of `first_of`, `then` and `longest`. Decoding with it is autoregressive.

    >>> list(propose_nothing((1, 2)))
    []
    """
    return iter(())


def first_of(*drafters: DrafterOf[Q]) -> DrafterOf[Q]:
    """The first drafter that proposes anything; those after it are not asked.

    Laws: associative; `propose_nothing` is its unit on both sides, and `first_of()` is it.

    >>> from specflow.drafters import PromptLookup, SuffixDrafter
    >>> drafter = first_of(SuffixDrafter(shortest=3), PromptLookup(num_output_tokens=2))
    >>> [(proposal.source, proposal.token) for proposal in drafter((1, 2, 7, 1, 2))]
    [('lookup', 7), ('lookup', 1)]
    """
    _are_drafters("drafters", drafters)

    def draft(tokens: Tokens, /) -> Iterator[Proposal[Q]]:
        for drafter in drafters:
            stream = _stream(drafter, tokens)
            for proposal in stream:
                yield proposal
                yield from stream
                return

    return draft


def then(*drafters: DrafterOf[Q]) -> DrafterOf[Q]:
    """Each drafter goes on where the one before it ended, reading the tokens drafted so far as text.

    After a tree it goes on at the end of the path of first drafts, which should be the likeliest.
    A drafter without an end, such as a language model, lets nobody speak after it: give it an end with `at_most`. A
    language model after another drafter needs a processor that has a law after any text, or says so (`LLMDrafter`).
    Laws: associative; `propose_nothing` is its unit on both sides, and `then()` is it.

    >>> from specflow.drafters import PromptLookup
    >>> twice = then(PromptLookup(num_output_tokens=2), PromptLookup(num_output_tokens=1))
    >>> [proposal.token for proposal in twice((1, 2, 7, 8, 1))]
    [2, 7, 8]
    """
    _are_drafters("drafters", drafters)

    def draft(tokens: Tokens, /) -> Iterator[Proposal[Q]]:
        before, end = 0, TEXT
        for drafter in drafters:
            trunk, number = [TEXT], -1
            for number, value in enumerate(_stream(drafter, tokens)):
                proposal = proposal_of(drafter, value, None)
                parent = parent_of(proposal, number)
                if parent == trunk[-1]:
                    trunk.append(number)
                    tokens = (*tokens, proposal.token)
                if not before or (value.parent == BEFORE and (number or end == before - 1)):
                    yield value  # it follows the proposal before it, here too: a chain stays one
                else:
                    yield evolve(value, parent=end if parent == TEXT else before + parent)
            end = before + trunk[-1] if len(trunk) > 1 else end
            before += number + 1

    return draft


def longest(*drafters: CertainDrafter, most: int = 32) -> CertainDrafter:
    """The longest of the drafts, the earliest drafter's among equals, each read up to `most` proposals.

    Some drafts never end (an n-gram table runs in circles). `most` ≥ 1, else `DecodeError`.

    Only for certain drafters; type checkers refuse others. A certain draft is verified by whether the target's own
    token is the draft, which is exact however it was found. Where drafts are drawn, lengths may depend on the draws (a
    model that stops once it is unsure), and the drafts that win no longer have the law q that they carry.

    Laws: associative; `propose_nothing` is its unit on both sides, and `longest()` is it; longest(a, a) = a.

    >>> from specflow.drafters import PromptLookup, SuffixDrafter
    >>> drafter = longest(PromptLookup(num_output_tokens=2), SuffixDrafter(most=3))
    >>> [(proposal.source, proposal.token) for proposal in drafter((1, 2, 7, 1, 2))]
    [('suffix', 7), ('suffix', 1), ('suffix', 2)]
    """
    _are_drafters("drafters", drafters)
    whole(1, "compare at least one proposal", MOST)("most", most)

    def draft(tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        drafts = [tuple(islice(_stream(drafter, tokens), most)) for drafter in drafters]
        yield from max(drafts, key=lambda each: max(depths(parents_of(each)), default=-1), default=())

    return draft


def merged(*drafters: CertainDrafter) -> CertainDrafter:
    """The drafts of all of them in one tree, the likeliest first; what several propose is proposed once.

    Of the next drafts of all streams the one with the largest chance comes first, the earliest drafter's among equals;
    one without a chance comes before any. So where each drafter proposes its likeliest drafts first, as the trees of
    specflow do, the tree does, for every number of drafts. One draft of each is read ahead.

    Only for certain drafters, as `longest`. `DecodeError` for a chance that is not a finite number.

    Laws: `propose_nothing` is its unit on both sides, and `merged()` is it; merged(a, a) = a where a proposes nothing
    twice; associative where each drafter proposes its likeliest drafts first.

    >>> text = lambda tokens: iter((Proposal(5, chance=0.6), Proposal(6, chance=0.2)))
    >>> head = lambda tokens: iter((Proposal(5, chance=0.5), Proposal(7, chance=0.4)))
    >>> [(draft.token, draft.parent, draft.chance) for draft in merged(text, head)((1,))]
    [(5, -2, 0.6), (7, -2, 0.4), (6, 0, 0.2)]
    """
    _are_drafters("drafters", drafters)

    def draft(tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        streams = [_Stream(drafter, _stream(drafter, tokens)) for drafter in drafters]
        numbers: dict[tuple[int, int], int] = {}  # of what was proposed: by what it follows, and its token
        waiting: list[tuple[float, int, Proposal[PointMass]]] = []
        asked = [*range(len(streams))]
        while True:
            for i in asked:
                for unlikely, proposal in streams[i].ahead():
                    heappush(waiting, (unlikely, i, proposal))
            if not waiting:
                return
            _, i, proposal = heappop(waiting)
            asked = [i]
            parent = streams[i].parent(proposal)
            place = parent, proposal.token
            if place not in numbers:
                numbers[place] = len(numbers)
                goes_on = proposal.parent == BEFORE and parent == numbers[place] - 1
                yield proposal if goes_on else evolve(proposal, parent=parent)
            streams[i].numbers.append(numbers[place])

    return draft


@final
@frozen(eq=False)
class _Stream:
    """What a drafter proposes, and the numbers of those proposals in the tree that it is merged into."""

    drafter: CertainDrafter
    proposals: Iterator[Proposal[PointMass]]
    numbers: list[int] = field(init=False, factory=list)

    def ahead(self) -> Iterator[tuple[float, Proposal[PointMass]]]:
        """The next proposal, if there is one, behind how unlikely it is."""
        for value in islice(self.proposals, 1):
            chance = proposal_of(self.drafter, value, None).chance
            if chance is not None:
                _is_chance("chance", chance)
            yield -inf if chance is None else -chance, value

    def parent(self, proposal: Proposal[PointMass]) -> int:
        """What the next proposal follows, by its number in the merged tree."""
        parent = parent_of(proposal, len(self.numbers))
        return TEXT if parent == TEXT else self.numbers[parent]


def at_most(k: int, drafter: DrafterOf[Q]) -> DrafterOf[Q]:
    """The first k proposals of a drafter; the next one is never computed. k ≥ 0, else `DecodeError`.

    Laws: at_most(0, a) proposes nothing; at_most(j, at_most(k, a)) = at_most(min(j, k), a); at_most(k, first_of(a, b))
    = first_of(at_most(k, a), at_most(k, b)) for k ≥ 1.

    >>> from specflow.drafters import PromptLookup
    >>> [proposal.token for proposal in at_most(1, PromptLookup())((1, 2, 7, 1, 2))]
    [7]
    """
    whole(0, "give 0 or more", MOST)("k", k)
    _is_drafter("drafter", drafter)
    return lambda tokens: islice(_stream(drafter, tokens), k)


def as_chain(drafter: CertainDrafter, least: float = 0.1) -> CertainDrafter:
    """The path of first drafts of a tree, as long as its chance is at least `least`: for models that cannot read trees.

    A draft without a chance is taken. as_chain(d) drafts what d drafts, where that is a chain.

    >>> tree = (Proposal(5, chance=0.5), Proposal(6, parent=-1, chance=0.4), Proposal(7, chance=0.3))
    >>> stream = lambda tokens: iter((*tree, Proposal(8, parent=0, chance=0.2)))
    >>> [proposal.token for proposal in as_chain(stream)((1,))]
    [5, 8]
    """
    _is_drafter("drafter", drafter)
    number("least is not a finite number", "give a probability")("least", least)

    def draft(tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        end = TEXT
        for i, value in enumerate(_stream(drafter, tokens)):
            proposal = proposal_of(drafter, value, None)
            if proposal.chance is not None:
                _is_chance("chance", proposal.chance)
                if proposal.chance < least:
                    return
            if parent_of(proposal, i) == end:
                end = i
                yield Proposal(value.token, value.q, source=value.source, chance=value.chance)

    return draft


def _stream(drafter: DrafterOf[Q], tokens: Tokens) -> Iterator[Proposal[Q]]:
    stream = drafter(tokens)
    stream_of(drafter, stream)
    return iter(stream)
