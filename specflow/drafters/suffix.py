"""Suffix drafting: what followed the last time that the text ended like this, or almost like this."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from math import floor
from threading import Lock
from typing import Final, NamedTuple, final

from attrs import define, field

from specflow.distribution import PointMass
from specflow.guards.checks import a, drafts, number, valid, whole
from specflow.guards.ids import ids_of
from specflow.prefix import TEXTS, begins, tokens_of
from specflow.state import Proposal, Tokens

NESTED: Final = 32
"""How many nested matches each token brings up to date. A match has as many inside it only in a text that repeats
itself more often than that; there an older occurrence may stand for the latest one."""

FORGIVEN: Final = 8  # a copy that was rejected is worth one token for so many that it was worth before


class Match(NamedTuple):
    """The longest ending of a text that occurred in it before: its length, and where that occurrence ended.

    The text went on with `tokens[end]`. No match has length 0.
    """

    length: int
    end: int


NO_MATCH: Final = Match(0, 0)


class Copy(NamedTuple):
    """An earlier place that the text repeats, `tokens[end]` next: `run` tokens since it was last rejected, if it was.

    `before` is what it was worth when it was rejected, 0 where it never was.
    """

    end: int
    run: int
    before: int = 0

    @property
    def worth(self) -> int:
        """The length of a match that is as good."""
        return self.run + self.before // FORGIVEN

    def after(self, tokens: Tokens, position: int) -> Copy:
        """The same copy one token on, after `tokens[position]`, which it foretold or not."""
        if self == NO_COPY:
            return self
        end, token = self.end, tokens[position]
        if tokens[end] == token:
            return Copy(end + 1, self.run + 1, self.before)
        if self.run == 0 and tokens[end - 1] == token:  # what was rejected comes now: a token had been inserted
            return Copy(end, 1, self.before)
        if end + 1 < position and tokens[end + 1] == token:  # what was rejected is left out
            return Copy(end + 2, 1, self.worth)
        return Copy(end + 1, 0, self.worth) if self.worth else NO_COPY


NO_COPY: Final = Copy(0, 0)


class Reading(NamedTuple):
    """What there is to know of the first `length` tokens of a text that may have grown since.

    The longest `match` of their ending, of its earlier occurrences the latest; the `copy` that is followed, which is
    that or a rejected one that is worth as much; and where each occurrence of each token ended.
    """

    length: int
    match: Match
    copy: Copy
    places: Mapping[int, Sequence[int]]

    def latest(self, token: int, most: int) -> Sequence[int]:
        """Where occurrences of a token ended, at most so many, the latest first.

        >>> SuffixDrafter().read((5, 6, 5, 7)).latest(5, 10)
        [3, 1]
        """
        ends = self.places.get(token, ())
        last = bisect_right(ends, self.length)
        return ends[max(0, last - most) : last][::-1]


@final
@define(eq=False)
class SuffixDrafter:
    """Drafts what followed the latest earlier occurrence of the longest ending of the text that has one.

    A copy that is rejected at a token is not lost: it goes on after the token that replaced it, that was inserted or
    that was left out, as in an edited text. If it was worth w tokens before, it is now worth m = ⌊w / 8⌋, and one more
    for each token that it foretells again; it is followed as long as no match has more than m tokens.

    With a match of m tokens, or a copy worth as much, it proposes min(most, ⌊factor·m + offset⌋): a long match is worth
    a long draft. Where the copy runs into the end of the text it goes on with itself, so that a loop is continued.
    Matches shorter than `shortest` are not used, nor copies worth less; with 0, a copy worth nothing is, where the text
    has no match.

    It is a pure function of the text. A suffix automaton of the last few texts is kept as a memo: a text that grew
    costs O(1) amortised a token, another one is read once. Threads may share a drafter. `most` is at least 1,
    `shortest` at least 0, factor and offset finite, else `DecodeError`, and so for a text that holds no ids.
    Source: suffix decoding (Oliaro et al. 2411.04975, section 4), whose tree of counts to a fixed depth is replaced by
    the longest match of any length and its latest occurrence. Going on after a rejected token is ours.

    >>> [proposal.token for proposal in SuffixDrafter(factor=1, offset=0)((5, 1, 2, 3, 9, 1, 2))]
    [3, 9]
    >>> edited = (*range(20), *range(9), 70)  # 70 has replaced 9
    >>> [proposal.token for proposal in SuffixDrafter(most=3)(edited)]
    [10, 11, 12]
    """

    most: int = field(default=20, validator=valid(drafts))
    factor: float = field(default=2.0, validator=valid(number("factor is not finite", "give a number")))
    offset: float = field(default=3.0, validator=valid(number("offset is not finite", "give a number")))
    shortest: int = field(default=1, validator=valid(whole(0, "give 0 or more")))
    source: str = field(default="suffix", validator=valid(a(str, "name the drafter")))
    _memos: list[_Automaton] = field(init=False, factory=list, repr=False)
    _lock: Lock = field(init=False, factory=Lock, repr=False)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        tokens = tokens_of(tokens)
        copy = self.read(tokens).copy
        if copy == NO_COPY or copy.worth < self.shortest:
            return
        period = len(tokens) - copy.end
        for i in range(floor(max(0.0, min(self.most, self.factor * copy.worth + self.offset)))):
            token = tokens[copy.end + i % period]
            yield Proposal(token, PointMass(token), source=self.source)

    def read(self, tokens: Tokens) -> Reading:
        """What the drafts are made from.

        >>> SuffixDrafter().read((1, 2, 7, 1, 2, 8, 1, 2)).match
        Match(length=2, end=5)
        """
        tokens = tokens_of(tokens)
        # A memo is out of the list while it grows: an interruption loses it, and another thread never meets it.
        with self._lock:
            automaton = next((memo for memo in self._memos if begins(memo.text, tokens)), None) or _Automaton()
            self._memos[:] = [memo for memo in self._memos if memo is not automaton]
        read = automaton.extend(tokens)
        with self._lock:
            self._memos[:] = [automaton, *self._memos[: TEXTS - 1]]
        return read


@final
@define(eq=False)
class _Automaton:
    """The suffix automaton of `text`, grown token by token.

    A state is a class of substrings that end at the same positions: the longest has `lengths[state]` tokens, the latest
    position is `ends[state]`, and `links[state]` is the state of the longest suffix that also ends elsewhere. So the
    link of the whole text's state is the longest match. State 0 is the empty substring, without a link (-1).
    Source: Blumer et al., The smallest automaton recognizing the subwords of a text, 1985; `ends` is ours.
    """

    text: list[int] = field(factory=list)
    match: Match = NO_MATCH
    copy: Copy = NO_COPY
    places: dict[int, list[int]] = field(factory=dict)
    _whole: int = 0
    _lengths: list[int] = field(factory=lambda: [0])
    _links: list[int] = field(factory=lambda: [-1])
    _ends: list[int] = field(factory=lambda: [0])
    _edges: list[dict[int, int]] = field(factory=lambda: [{}])

    def extend(self, tokens: Tokens) -> Reading:
        """Grow to `tokens`, which begin with this text."""
        ids_of("tokens", tokens[len(self.text) :])
        for position in range(len(self.text), len(tokens)):
            self._append(tokens[position], position + 1)
            self.places.setdefault(tokens[position], []).append(position + 1)
            copy = self.copy.after(tokens, position)
            self.copy = copy if copy.worth >= self.match.length else Copy(self.match.end, self.match.length)
        self.text += tokens[len(self.text) :]
        return Reading(len(tokens), self.match, self.copy, self.places)

    def _append(self, token: int, length: int) -> None:
        links, ends, edges = self._links, self._ends, self._edges
        state, whole = self._whole, self._add(length, length, {})
        while state >= 0 and token not in edges[state]:
            edges[state][token] = whole
            state = links[state]
        link = 0 if state < 0 else self._state_after(state, token)
        links[whole], self._whole = link, whole
        self.match = Match(self._lengths[link], ends[link])
        for _ in range(NESTED):
            if link <= 0:
                break
            ends[link] = length
            link = links[link]

    def _state_after(self, state: int, token: int) -> int:
        """The state of `state`'s longest substring and `token`: a part of the class its edge leads to is split off."""
        lengths, links, edges = self._lengths, self._links, self._edges
        after = edges[state][token]
        if lengths[after] == lengths[state] + 1:
            return after
        part = self._add(lengths[state] + 1, self._ends[after], dict(edges[after]))
        links[part], links[after] = links[after], part
        while state >= 0 and edges[state].get(token) == after:
            edges[state][token] = part
            state = links[state]
        return part

    def _add(self, length: int, end: int, edges: dict[int, int]) -> int:
        self._lengths.append(length)
        self._links.append(0)
        self._ends.append(end)
        self._edges.append(edges)
        return len(self._lengths) - 1
