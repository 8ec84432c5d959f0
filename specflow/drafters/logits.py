"""Guesses of the token after next, from the row that the last token was chosen from; each keys a retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Final, NamedTuple, final

from attrs import field, frozen

from specflow.asked import proposal_of, stream_of
from specflow.distribution import PointMass
from specflow.drafters.followers import REACH, Followers, are_shares, followers_of, is_followers
from specflow.drafters.lookup import PromptLookup
from specflow.guards.checks import a, calls, valid
from specflow.guards.ids import text_of
from specflow.state import TEXT, CertainDrafter, Proposal, Tokens
from specflow.trees import parent_of

GUESSES: Final = (0.1, 0.06, 0.04, 0.03, 0.02, 0.02)
"""How often the second, third, … token of a row is the token after the first."""

GOES_ON: Final = 0.5
"""How often what was retrieved goes on as it did, where the drafter that retrieves it tells no chance."""


class _Stream(NamedTuple):
    """What is retrieved after the draft number `parent`, or the text, and the numbers that its drafts have here."""

    parent: int
    chance: float
    proposals: Iterator[object]
    numbers: list[int]


class _Candidate(NamedTuple):
    """A draft that waits for its turn, the likeliest first and the older of equals. A guess is of no stream yet."""

    unlikely: float
    order: int
    token: int
    parent: int
    source: str
    stream: _Stream | None


@final
@frozen
class LogitTree:
    """Drafts what `retrieve` finds after the text, and after the text and each guess of its next token.

    The tokens that the target nearly said in place of the last one often come right after it. `table` knows them: what
    follows the text without its last token, which a `Recycle` stage learned when that row was read. The r-th of them is
    guessed to come next with `guesses[r]`; what is retrieved after it, with that times the chance that `retrieve`
    tells, or times ½ for each token where it tells none. All of it is one tree, the likeliest first.

    A function of the text, and of what `table` and `retrieve` know. `retrieve` is any certain drafter: a lookup in the
    text, an n-gram storage, a corpus. `DecodeError` for guesses that are not in (0, 1], that grow, or that are more
    than 1 together.
    Source: LogitSpec, 2507.01449, sections 3.2 and 3.3; the chances are ours.

    >>> from specflow.drafters import Recycled
    >>> table = Recycled(vocab_size=10)
    >>> table.learn([(5,)], [[(6, 0.7), (8, 0.2)]])
    >>> drafter = LogitTree(table, PromptLookup(num_output_tokens=2))
    >>> [(draft.token, draft.parent) for draft in drafter((8, 1, 2, 5, 6))]
    [(8, -1), (1, 0), (2, 1)]
    """

    table: Followers = field(validator=valid(is_followers))
    retrieve: CertainDrafter = field(
        default=PromptLookup(3), validator=valid(calls("a drafter", "give one, such as PromptLookup()"))
    )
    guesses: tuple[float, ...] = field(default=GUESSES, validator=valid(are_shares))
    source: str = field(default="logits", validator=valid(a(str, "name the drafter")))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        tokens = text_of(tokens)
        order = count()
        waiting: list[_Candidate] = []
        numbers: dict[tuple[int, int], int] = {}  # of each draft, by its parent and token
        chances: list[float] = []

        def retrieved(text: Tokens, parent: int, chance: float) -> _Stream:
            return _Stream(parent, chance, stream_of(self.retrieve, self.retrieve(text)), [])

        def go_on(stream: _Stream) -> None:
            value = next(stream.proposals, None)
            if value is None:
                return
            proposal = proposal_of(self.retrieve, value, None)
            above = parent_of(proposal, len(stream.numbers))
            parent = stream.parent if above == TEXT else stream.numbers[above]
            if proposal.chance is None:
                likely = GOES_ON * (stream.chance if parent == TEXT else chances[parent])
            else:
                likely = stream.chance * proposal.chance
            heappush(waiting, _Candidate(-likely, next(order), proposal.token, parent, proposal.source, stream))

        go_on(retrieved(tokens, TEXT, 1.0))
        row = followers_of(self.table, tokens[:-1][-REACH:]) if len(tokens) > 1 else ()
        for (token, _), share in zip((pair for pair in row if pair[0] != tokens[-1]), self.guesses, strict=False):
            heappush(waiting, _Candidate(-share, next(order), token, TEXT, self.source, None))
        while waiting:
            unlikely, _, token, parent, source, stream = heappop(waiting)
            number = numbers.setdefault((parent, token), len(chances))
            if number == len(chances):
                chances.append(-unlikely)
                yield Proposal(token, PointMass(token), parent, source, -unlikely)
            if stream is None:
                stream = retrieved((*tokens, token), number, -unlikely)
            else:
                stream.numbers.append(number)
            go_on(stream)
