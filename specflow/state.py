"""The records of a step: DecodeState → Drafted → Verified → Adjusted → Committed → DecodeState | Finished.

The text is the state. A `DecodeState` is ints and tuples: it prints, compares, hashes and pickles, and stepping the
same one twice is always allowed. Whatever a provider remembers (a KV cache, n-gram counts) lives with the provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from sys import maxsize
from typing import Final, Generic, TypeAlias, final

from attrs import field, frozen
from torch import Tensor
from typing_extensions import TypeVar

from specflow.checks import a, is_id, or_none, shown, valid, whole
from specflow.distribution import Distribution, PointMass
from specflow.errors import DecodeError

Tokens: TypeAlias = tuple[int, ...]

Pace: TypeAlias = tuple[float, ...]
"""What a gamma policy carries from one step to the next. It belongs to the policy; nothing else reads it."""

Q = TypeVar("Q", bound=Distribution, covariant=True, default=Distribution)


@final
@frozen
class Request:
    """What was asked: the prompt, the most tokens the whole text may have, and the tokens that end it.

    `limit` counts the prompt too, so a text has room for `limit - len(tokens)` more tokens. `vocab_size` is how many
    tokens the target knows, None where nobody told; what is drafted is held against it. `DecodeError` for values of
    other kinds.
    """

    prompt: Tokens = field(validator=valid(a(tuple, "give ids as a tuple, or use `start`")))
    limit: int = field(validator=valid(whole(0, "give the most tokens that the text may have", maxsize)))
    stop: frozenset[int] = field(default=frozenset(), validator=valid(a(frozenset, "give ids as a frozenset")))
    vocab_size: int | None = field(
        default=None, validator=valid(or_none(whole(1, "give the number of tokens that the target knows")))
    )


_COUNT: Final = "give a whole number of 0 or more"


@final
@frozen
class Count:
    """How many tokens one source drafted, and how many of them were accepted. A monoid under +."""

    drafted: int = 0
    accepted: int = 0

    def __attrs_post_init__(self) -> None:
        if not (is_id(self.drafted) and is_id(self.accepted)):
            raise DecodeError("count", "a count is no number of tokens", shown((self.drafted, self.accepted)), _COUNT)

    def __add__(self, more: Count) -> Count:
        return Count(self.drafted + more.drafted, self.accepted + more.accepted)


def _is_source(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Count)


@final
@frozen
class Tally:
    """Steps taken, and what each source of drafts did. A monoid under +, with `Tally()` as its unit.

    >>> both = Tally(1, (("llm", Count(5, 3)),)) + Tally(1, (("llm", Count(5, 0)), ("ngram", Count(2, 2))))
    >>> both.steps, both.drafted, both.accepted, round(both.acceptance_rate, 3)
    (2, 12, 5, 0.417)
    """

    steps: int = 0
    sources: tuple[tuple[str, Count], ...] = ()

    def __attrs_post_init__(self) -> None:
        steps: object = self.steps
        if not is_id(steps):
            raise DecodeError("steps", "steps are no number of them", shown(steps), _COUNT)
        sources: object = self.sources
        if not (isinstance(sources, tuple) and all(map(_is_source, sources))):
            remedy = 'give pairs in a tuple, such as (("llm", Count(5, 3)),)'
            raise DecodeError("sources", "sources are no names and counts", shown(sources), remedy)

    def __add__(self, more: Tally) -> Tally:
        merged = dict(self.sources)
        for name, count in more.sources:
            merged[name] = merged.get(name, Count()) + count
        return Tally(self.steps + more.steps, tuple(sorted(merged.items())))

    @property
    def drafted(self) -> int:
        """Drafts that were judged: those behind a stop do not count."""
        return sum(count.drafted for _, count in self.sources)

    @property
    def accepted(self) -> int:
        """Drafts that became text."""
        return sum(count.accepted for _, count in self.sources)

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted, and 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@final
@frozen
class DecodeState:
    """Between two steps: the text so far, and what the next step needs to know.

    >>> state = DecodeState(Request(prompt=(5, 6), limit=4), tokens=(5, 6, 7))
    >>> state.output, state.room
    ((7,), 1)
    """

    request: Request
    tokens: Tokens
    pace: Pace = ()
    tally: Tally = Tally()

    def __attrs_post_init__(self) -> None:
        request: object = self.request
        tokens: object = self.tokens
        if not (isinstance(request, Request) and isinstance(tokens, tuple)):
            received = f"{shown(self.request)} and {shown(self.tokens)}"
            raise DecodeError("state", "a state is no request and a tuple of tokens", received, "use `start`")
        tally: object = self.tally
        if not isinstance(tally, Tally):
            raise DecodeError("tally", "the tally of a state is none", shown(tally), "use `start`")

    @property
    def output(self) -> Tokens:
        """The tokens behind the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def room(self) -> int:
        """How many more tokens the text may take."""
        return self.request.limit - len(self.tokens)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per target pass, the bonus or corrected token included; 0.0 before the first step."""
        return len(self.output) / self.tally.steps if self.tally.steps else 0.0


@final
@frozen(eq=False)
class Proposal(Generic[Q]):
    """One drafted token, with the law `q` it was really drawn from.

    `source` names who drafted it, for the statistics. `logits` [V] are the drafter's own, before any processing, where
    the drafter is a model; policies that look at the drafter's entropy read them.

    >>> Proposal(7, PointMass(7), source="mine").q.of(7)
    1.0
    """

    token: int
    q: Q
    source: str = "draft"
    logits: Tensor | None = field(default=None, repr=False)


@final
@frozen(eq=False)
class Drafted:
    """What is proposed: γ = len(proposals) tokens that would follow `state.tokens`.

    `beside` is what was proposed in other branches of a tree than these, and refused with them.
    """

    state: DecodeState
    proposals: tuple[Proposal, ...]
    beside: tuple[Proposal, ...] = ()

    @property
    def tokens(self) -> Tokens:
        """The drafted tokens."""
        return tuple([proposal.token for proposal in self.proposals])


TEXT: Final = -1
"""The parent of a node that follows the text itself."""


@final
@frozen
class Node:
    """One drafted token of a tree: it follows the node number `parent`, or the text itself.

    `chance` is the drafter's guess at the probability that the target takes the whole path down to here; tree policies
    read it. Nodes are certain, as a lookup is: they were not drawn.

    >>> Node(7), Node(8, parent=0, chance=0.5)
    (Node(token=7, parent=-1, chance=1.0, source='draft'), Node(token=8, parent=0, chance=0.5, source='draft'))
    """

    token: int
    parent: int = TEXT
    chance: float = 1.0
    source: str = "draft"


@final
@frozen
class DraftedTree:
    """What is proposed as a tree: several ways in which `state.tokens` may go on. A node comes behind its parent."""

    state: DecodeState
    nodes: tuple[Node, ...]


@final
@frozen(eq=False)
class Verified:
    """The target's judgement of a draft.

    `logits` [γ + 1, V] are the target's, row i following i drafts; `laws` are the laws p that were made of them, which
    may be fewer: nobody asks for the law behind a draft that cannot stand. The first `accepted` drafts stand, and
    `correction` is the law of the token behind them: the bonus token's p when all stand, else whatever keeps the text's
    law exact. It is None where the text ends with an accepted stop token.
    """

    drafted: Drafted
    accepted: int
    correction: Distribution | None
    laws: tuple[Distribution, ...] = field(repr=False)
    logits: Tensor = field(repr=False)


class Reason(Enum):
    """Why a text ended."""

    STOP = "stop token"
    CONDITION = "stop condition"
    LIMIT = "length limit"


@final
@frozen(eq=False)
class Adjusted:
    """The new tokens of this step: the accepted drafts and the token behind them, if any, unless a stage cut them.

    A stage that ends the text shortens `tokens` and names the `reason`; `commit` cuts at stop tokens and the limit.
    """

    verified: Verified
    tokens: Tokens
    reason: Reason | None = None


@final
@frozen(eq=False)
class Committed:
    """The step as it will stand: `state` is the text after it, `reason` tells why it ended, if it did.

    From here on nothing can fail to have happened: learning and pruning look at `tokens`, which hold nothing behind a
    stop or the limit.
    """

    adjusted: Adjusted
    state: DecodeState
    reason: Reason | None

    @property
    def before(self) -> DecodeState:
        """The state that the step started from."""
        return self.adjusted.verified.drafted.state

    @property
    def tokens(self) -> Tokens:
        """The tokens that this step added."""
        return self.state.tokens[len(self.before.tokens) :]


@final
@frozen
class Finished:
    """A text that ended, and why. To go on from it, give `state.request` a new limit and step `state` again."""

    state: DecodeState
    reason: Reason


Step: TypeAlias = Callable[[DecodeState], DecodeState | Finished]
"""One round of decoding. It emits at least one token: `unfold` refuses one that does not."""

Predictor: TypeAlias = Callable[[Tokens, int], Tensor]
"""(tokens, last) → logits [last, V] of what follows each of the last `last` prefixes. A pure function of tokens."""

Drafter: TypeAlias = Callable[[Tokens], Iterator[Proposal]]
"""tokens → a lazy stream of proposals that would follow them. It ends when the drafter has nothing to say."""

CertainDrafter: TypeAlias = Callable[[Tokens], Iterator[Proposal[PointMass]]]
"""A drafter whose every proposal is certain: a table, a lookup, a greedy model. Any `CertainDrafter` is a `Drafter`."""

TreePredictor: TypeAlias = Callable[[Tokens, Sequence[Node]], Tensor]
"""(tokens, nodes) → logits [n + 1, V] of what follows the tokens, and the tokens and the path down to each node.

A pure function: its rows are those of a `Predictor`."""

TreeDrafter: TypeAlias = Callable[[Tokens], Iterator[Node]]
"""tokens → a lazy stream of nodes, each behind its parent, the likeliest first. Any beginning of it is a tree."""

TreePolicy: TypeAlias = Callable[[Iterator[Node], DecodeState], tuple[tuple[Node, ...], Pace]]
"""(stream, state) → the nodes taken from the beginning of the stream, and the pace to carry on."""

GammaPolicy: TypeAlias = Callable[[Iterator[Proposal], DecodeState], tuple[tuple[Proposal, ...], Pace]]
"""(stream, state) → the proposals taken from the stream, and the pace to carry on.

Exact as long as whether a token is taken does not depend on that token: decide before pulling it, or keep it and stop.
"""
