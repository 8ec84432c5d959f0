"""The records of a step: DecodeState → Drafted → Scored → Verified → Adjusted → Committed → DecodeState | Finished.

The text is the state. A `DecodeState` is ints and tuples: it prints, compares, hashes and pickles, and stepping the
same one twice is always allowed. Whatever a provider remembers (a KV cache, n-gram counts) lives with the provider.
"""

# ruff: noqa: PLC0414 - those who read a state find tokens and drafts here too

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import zip_longest
from sys import maxsize
from typing import TYPE_CHECKING, Generic, Never, Self, TypeAlias, final

from attrs import Factory, field, frozen
from torch import Tensor
from typing_extensions import TypeVar

from specflow.distribution import Distribution, PointMass
from specflow.errors import DeadEndError, DecodeError
from specflow.guards.checks import a, calls, is_whole, or_none, shown, valid, whole
from specflow.guards.ids import Tokens as Tokens
from specflow.laws import Laws, Lazily
from specflow.trees import BEFORE as BEFORE
from specflow.trees import TEXT as TEXT
from specflow.trees import Proposal as Proposal
from specflow.trees import Q as Q
from specflow.trees import chain as chain
from specflow.trees import children_of, path_to
from specflow.trees import parents_of as parents_of

if TYPE_CHECKING:
    from specflow.randomness import Randomness, Sampling

Pace: TypeAlias = tuple[float, ...]
"""What a gamma policy carries from one step to the next. It belongs to the policy; nothing else reads it."""

R = TypeVar("R")
S = TypeVar("S", bound="Sampling", contravariant=True, default="Randomness")

_is_stage = calls("a stage", "give a function of the record, such as Draft(drafter)")


class Record:
    """What a stage takes and gives: `state.then(draft).then(verify)…` has its order checked by every type checker."""

    __slots__ = ()

    def then(self, stage: Callable[[Self], R], /) -> R:
        """What `stage` makes of this record. `DecodeError` for what cannot be called."""
        _is_stage("stage", stage)
        return stage(self)


@final
@frozen
class Request:
    """What was asked: the prompt, the most tokens the whole text may have, and the tokens that end it.

    `limit` counts the prompt too, so a text has room for `limit - len(tokens)` more tokens. `vocab_size` is how many
    tokens the target knows, None where that is unknown; what is drafted is held against it. `DecodeError` for values of
    other kinds.
    """

    prompt: Tokens = field(validator=valid(a(tuple, "give ids as a tuple, or use `start`")))
    limit: int = field(validator=valid(whole(0, "give the most tokens that the text may have", maxsize)))
    stop: frozenset[int] = field(default=frozenset(), validator=valid(a(frozenset, "give ids as a frozenset")))
    vocab_size: int | None = field(
        default=None, validator=valid(or_none(whole(1, "give the number of tokens that the target knows")))
    )


_is_count = valid(whole(0, "give how many there were"))


@final
@frozen
class Count:
    """How many tokens one source drafted, and how many of them were accepted. A monoid under +."""

    drafted: int = field(default=0, validator=_is_count)
    accepted: int = field(default=0, validator=_is_count)

    def __add__(self, more: Count) -> Count:
        return Count(self.drafted + more.drafted, self.accepted + more.accepted)

    def __sub__(self, before: Count) -> Count:
        return Count(self.drafted - before.drafted, self.accepted - before.accepted)


def _is_source(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Count)


def _are_sources(name: str, pairs: object) -> None:
    if not (isinstance(pairs, tuple) and all(map(_is_source, pairs))):
        raise DecodeError(name, f"{name} are not names and counts", shown(pairs), 'give pairs: (("llm", Count(5, 3)),)')


def _are_counts(name: str, counts: object) -> None:
    if not isinstance(counts, tuple) or not {*map(type, counts)} <= {int} or min(counts, default=0) < 0:
        raise DecodeError(name, f"{name} are not counts", shown(counts), "give how many there were at each position")


@final
@frozen
class Tally:
    """Steps taken, what each source of drafts did, and how far drafts stood. A monoid under +, with `Tally()` its unit.

    `judged_at` and `accepted_at` count by position in a step, the first draft's first: a position is judged where all
    drafts before it stand and something was drafted there, of a tree at that depth. `after.tally - before.tally` is
    what the steps between two states did; `DecodeError` where the second has counted what the first has not.

    >>> both = Tally(1, (("llm", Count(5, 3)),)) + Tally(1, (("llm", Count(5, 0)), ("ngram", Count(2, 2))))
    >>> both.steps, both.drafted, both.accepted, round(both.acceptance_rate, 3)
    (2, 12, 5, 0.417)
    >>> (Tally(1, judged_at=(1, 1), accepted_at=(1,)) + Tally(1, judged_at=(1,))).acceptance_by_position
    (0.5, 0.0)
    >>> (both - Tally(1, (("llm", Count(5, 3)),))).sources
    (('llm', Count(drafted=5, accepted=0)), ('ngram', Count(drafted=2, accepted=2)))
    """

    steps: int = field(default=0, validator=_is_count)
    sources: tuple[tuple[str, Count], ...] = field(default=(), validator=valid(_are_sources))
    judged_at: tuple[int, ...] = field(default=(), repr=False, validator=valid(_are_counts))
    accepted_at: tuple[int, ...] = field(default=(), repr=False, validator=valid(_are_counts))

    def __add__(self, more: Tally) -> Tally:
        merged = dict(self.sources)
        for name, count in more.sources:
            merged[name] = merged[name] + count if name in merged else count
        judged = _added(self.judged_at, more.judged_at)
        accepted = _added(self.accepted_at, more.accepted_at)
        return Tally(self.steps + more.steps, tuple(sorted(merged.items())), judged, accepted)

    def __sub__(self, before: Tally) -> Tally:
        mine, earlier = dict(self.sources), dict(before.sources)
        since = [(name, mine.get(name, Count()) - earlier.get(name, Count())) for name in sorted(mine | earlier)]
        counted = tuple([(name, count) for name, count in since if count != Count()])
        judged, accepted = _since(self.judged_at, before.judged_at), _since(self.accepted_at, before.accepted_at)
        return Tally(self.steps - before.steps, counted, judged, accepted)

    @property
    def drafted(self) -> int:
        """All drafts, also those that no rule reached; where a text ends inside a step, those up to its end."""
        return sum(count.drafted for _, count in self.sources)

    @property
    def accepted(self) -> int:
        """Drafts that became text."""
        return sum(count.accepted for _, count in self.sources)

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted, and 0.0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """accepted / judged at each position of a step, the first draft's first."""
        pairs = zip_longest(self.judged_at, self.accepted_at, fillvalue=0)
        return tuple([accepted / judged if judged else 0.0 for judged, accepted in pairs])


def _added(some: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([a + b for a, b in zip_longest(some, more, fillvalue=0)]) if some and more else some or more


def _since(some: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    left = [a - b for a, b in zip_longest(some, before, fillvalue=0)]
    while left and left[-1] == 0:
        left.pop()
    return tuple(left)


@final
@frozen
class DecodeState(Record):
    """Between two steps: the text so far, and what the next step needs to know.

    >>> state = DecodeState(Request(prompt=(5, 6), limit=4), tokens=(5, 6, 7))
    >>> state.output, state.room
    ((7,), 1)
    """

    request: Request = field(validator=valid(a(Request, "use `start`")))
    tokens: Tokens = field(validator=valid(a(tuple, "give ids as a tuple, or use `start`")))
    pace: Pace = ()
    tally: Tally = field(default=Tally(), validator=valid(a(Tally, "give Tally(), or use `start`")))

    @property
    def output(self) -> Tokens:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def room(self) -> int:
        """How many more tokens the text may take."""
        return self.request.limit - len(self.tokens)

    @property
    def mean_accepted_length(self) -> float:
        """New tokens / steps, the bonus or corrected token included; 0.0 before the first step."""
        return len(self.output) / self.tally.steps if self.tally.steps else 0.0


a_state = a(DecodeState, "give a state, such as start(prompt, 32).unwrap()")


@final
@frozen(eq=False)
class Drafted(Record):
    """What is proposed: drafts that would follow `state.tokens`, as a chain or a tree.

    `parents` are what they follow, by number. `DecodeError` for a draft that does not come after its parent, and where
    one is asked about that is not there.

    >>> drafted = Drafted(DecodeState(Request((1,), 9), (1,)), (Proposal(5), Proposal(6, parent=TEXT), Proposal(7)))
    >>> drafted.parents, drafted.children(TEXT), drafted.path(2), drafted.text(2)
    ((-1, -1, 1), (0, 1), (1, 2), (1, 6, 7))
    """

    state: DecodeState = field(validator=valid(a_state))
    proposals: tuple[Proposal, ...]
    parents: tuple[int, ...] = field(
        init=False, repr=False, default=Factory(lambda self: parents_of(self.proposals), takes_self=True)
    )
    _children: Mapping[int, tuple[int, ...]] = field(
        init=False, repr=False, default=Factory(lambda self: children_of(self.parents), takes_self=True)
    )

    @property
    def tokens(self) -> Tokens:
        """The drafted tokens, in the order in which they were proposed."""
        return tuple([proposal.token for proposal in self.proposals])

    def children(self, i: int) -> tuple[int, ...]:
        """The drafts that directly follow draft i, or the text; none follows a stop token."""
        _is_number(i, len(self.proposals))
        if i != TEXT and self.proposals[i].token in self.state.request.stop:
            return ()
        return self._children.get(i, ())

    def followers(self, i: int) -> dict[int, int]:
        """token → the draft of it that directly follows draft i, or the text; the first of equals."""
        return {self.proposals[child].token: child for child in reversed(self.children(i))}

    def path(self, i: int) -> tuple[int, ...]:
        """The drafts from the text down to draft i, itself included."""
        _is_number(i, len(self.proposals))
        return tuple(path_to(self.parents, i))

    def text(self, i: int) -> Tokens:
        """The text and the drafts down to draft i."""
        return self.state.tokens + tuple([self.proposals[k].token for k in self.path(i)])

    def trunk(self, i: int) -> tuple[int, ...]:
        """Draft i, or the text, and from there down always the first child, which should be the likeliest."""
        trunk = [i]
        while children := self.children(trunk[-1]):
            trunk.append(children[0])
        return tuple(trunk)


def _is_number(i: object, drafts: int) -> None:
    """Refuses what is neither the number of one of so many drafts nor `TEXT`."""
    if not is_whole(i) or not TEXT <= i < drafts:
        raise DecodeError("i", f"there is no such draft among {drafts}", shown(i), "give a draft's number, or TEXT")


@final
@frozen
class Stretch:
    """Drafts that follow one another, `way`, and the laws after each of them; `way` may begin with the text.

    `start` is where in the text the token stands that is drawn from the first of the laws.
    """

    way: tuple[int, ...]
    laws: Laws
    start: int


@final
@frozen(eq=False)
class Scored(Record):
    """What the target says of a draft: `logits` [n + 1, V], after the text and after each draft, rejected ones too.

    The target's law after a draft is made when a rule asks for it, so that no processor hears of a draft that cannot
    stand; `make` makes those along a stretch of drafts. Rules ask here which drafts are to be judged.

    >>> from specflow import GreedyProcessor, start
    >>> from specflow.stages import Score
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start((0,), 9).unwrap(), chain((4, 3)))
    >>> scored = Score(TableModel(5, seed=1), GreedyProcessor())(drafted)
    >>> scored.law(TEXT), scored.law(0)
    (PointMass(token=4), PointMass(token=2))
    """

    drafted: Drafted
    logits: Tensor = field(repr=False)
    make: Callable[[tuple[int, ...]], Laws] = field(repr=False)
    _known: dict[int, tuple[Stretch, int]] = field(init=False, factory=dict, repr=False)
    _ends: dict[int, bool] = field(init=False, factory=dict, repr=False)

    def children(self, i: int) -> tuple[int, ...]:
        """The drafts to be judged directly after draft i, or after the text: none where nothing can follow it."""
        children = self.drafted.children(i)
        return () if children and self.ends(i) else children

    def followers(self, i: int) -> dict[int, int]:
        """token → the draft of it among `children(i)`; the first of equals."""
        return self.drafted.followers(i) if self.children(i) else {}

    def ends(self, i: int) -> bool:
        """Whether nothing can follow draft i: it is a stop token, or the processor has no law (`DeadEndError`).

        A draft is asked about once it can stand. The text itself goes on, or `law` raises there.
        """
        _is_number(i, len(self.drafted.proposals))
        if i == TEXT:
            return False
        if i not in self._ends:
            is_stop = self.drafted.proposals[i].token in self.drafted.state.request.stop
            self._ends[i] = is_stop or not self._has_law(i)
        return self._ends[i]

    def _has_law(self, i: int) -> bool:
        try:
            self.law(i)
        except DeadEndError:
            return False
        return True

    def law(self, i: int) -> Distribution:
        """The target's law p of the token after draft i, or after the text (`TEXT`)."""
        stretch, at = self.stretch(i)
        return stretch.laws[at]

    def stretch(self, i: int) -> tuple[Stretch, int]:
        """A stretch of drafts that has draft i on it, and where."""
        _is_number(i, len(self.drafted.proposals))
        if i not in self._known:
            way = self.drafted.trunk(i)
            start = len(self.drafted.state.tokens) + len(self.drafted.path(i))
            stretch = Stretch(way, self.make(way), start)
            self._known.update({draft: (stretch, at) for at, draft in enumerate(way)})
        return self._known[i]

    def made(self, i: int) -> Distribution | None:
        """The law after draft i, where it was asked for."""
        _is_number(i, len(self.drafted.proposals))
        if i not in self._known:
            return None
        stretch, at = self._known[i]
        laws = stretch.laws.made if isinstance(stretch.laws, Lazily) else stretch.laws
        return laws[at] if at < len(laws) else None

    def rows(self, path: Sequence[int]) -> Tensor:
        """The logits after drafts that follow one another, without a copy where they lie together."""
        given: object = path
        if not isinstance(given, Sequence) or not given:
            raise DecodeError("path", "a path is not numbers of drafts", shown(given), "give some, such as (TEXT, 0)")
        for i in path:
            _is_number(i, len(self.drafted.proposals))
        return rows_along(self.logits, path)


def rows_along(logits: Tensor, path: Sequence[int]) -> Tensor:
    """Of logits [n + 1, V] those after the drafts of `path`; a view where they lie together."""
    first, last = path[0] + 1, path[-1] + 1
    return logits[first : last + 1] if last - first == len(path) - 1 else logits[[i + 1 for i in path]]


@final
@frozen(eq=False)
class Verdict(Generic[S]):
    """What a rule says: the drafts that stand, from the text down, and the law of the token after them.

    `correction` is None where that is the target's own law there. S is what the token may be drawn with: fresh
    `Randomness`, unless a rule says that any `Sampling` keeps the text's law.

    >>> Verdict((0, 1)).path, Verdict((), PointMass(3)).correction
    ((0, 1), PointMass(token=3))
    """

    path: tuple[int, ...]
    correction: Distribution | None = None


Rule: TypeAlias = Callable[[Scored], Verdict[S]]
"""What judges drafts: a value without target and processor. It asks `Scored` about a draft once that can stand."""


@final
@frozen(eq=False)
class Verified(Record, Generic[S]):
    """The target's judgement of a draft: the drafts on `path` stand, from the text down.

    `correction` is the law of the token after them: the bonus token's p when the path cannot go on, else whatever
    keeps the text's law exact. It is None where nothing can follow the accepted drafts, such as after a stop token.

    >>> from specflow import Dice, GreedyProcessor, Match, start
    >>> from specflow.stages import Verify
    >>> from specflow.testing import TableModel
    >>> verify = Verify(TableModel(5, seed=1), GreedyProcessor(), Match(Dice()))
    >>> verified = verify(Drafted(start((0,), 9).unwrap(), chain((4, 3))))
    >>> verified.path, verified.tokens, verified.correction
    ((0,), (4,), PointMass(token=2))
    """

    scored: Scored
    path: tuple[int, ...]
    correction: Distribution | None

    @property
    def drafted(self) -> Drafted:
        """What was proposed."""
        return self.scored.drafted

    @property
    def accepted(self) -> int:
        """How many drafts stand."""
        return len(self.path)

    @property
    def tokens(self) -> Tokens:
        """The drafted tokens that stand."""
        return tuple([self.drafted.proposals[i].token for i in self.path])

    @property
    def logits(self) -> Tensor:
        """The target's logits [accepted + 1, V] after the text and after each draft that stands."""
        return self.scored.rows((TEXT, *self.path))


class Reason(Enum):
    """Why a text ended."""

    STOP = "stop token"
    CONDITION = "stop condition"
    LIMIT = "length limit"


@final
@frozen(eq=False)
class Adjusted(Record):
    """The new tokens of this step: the accepted drafts and the `bonus` after them, if any, cut to `keep` of them.

    A stage that ends the text says how many tokens to `keep` and names the `reason`; it can add nothing. `commit` cuts
    at stop tokens and the limit. `DecodeError` for a bonus that is not a token id, and for values of other kinds.

    >>> from specflow import Dice, GreedyProcessor, Match, start
    >>> from specflow.stages import Verify
    >>> from specflow.testing import TableModel
    >>> verify = Verify(TableModel(5, seed=1), GreedyProcessor(), Match(Dice()))
    >>> verified = verify(Drafted(start((0,), 9).unwrap(), chain((4, 3))))
    >>> Adjusted(verified, bonus=2).tokens, Adjusted(verified, bonus=2, keep=1).tokens
    ((4, 2), (4,))
    """

    verified: Verified[Never] = field(validator=valid(a(Verified, "give what Judge returns")))
    bonus: int | None = field(validator=valid(or_none(whole(0, "give a token id, or None"))))
    keep: int | None = field(default=None, validator=valid(or_none(whole(0, "give how many tokens stand, or None"))))
    reason: Reason | None = field(default=None, validator=valid(or_none(a(Reason, "give a Reason, or None"))))

    @property
    def tokens(self) -> Tokens:
        """The new tokens."""
        new = self.verified.tokens if self.bonus is None else (*self.verified.tokens, self.bonus)
        return new if self.keep is None else new[: self.keep]


@final
@frozen(eq=False)
class Committed(Record):
    """The step as it will stand: `state` is the text after it, `reason` tells why it ended, if it did.

    From here on nothing can fail to have happened: learning and pruning look at `tokens`, which hold nothing after a
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
    """A text that ended, and why. To go on from it, give `state.request` a new limit and step `state` again.

    >>> end = Finished(DecodeState(Request((1,), 3), (1, 5, 6)), Reason.LIMIT)
    >>> end.state.output, end.reason.value
    ((5, 6), 'length limit')
    """

    state: DecodeState
    reason: Reason


Step: TypeAlias = Callable[[DecodeState], DecodeState | Finished]
"""One round of decoding. It emits at least one token: `unfold` refuses one that does not."""

Predictor: TypeAlias = Callable[[Tokens, Sequence[Proposal]], Tensor]
"""(text, drafts) → logits [n + 1, V] of what follows the text, and of what follows the text and the path down to each
draft. A pure function of tokens: of the drafts it reads `token` and `parent`."""

Drafter: TypeAlias = Callable[[Tokens], Iterator[Proposal]]
"""tokens → a lazy stream of proposals that would follow them, each after its parent, siblings the likeliest first.

Any beginning of it can be verified. It ends when the drafter has nothing to say."""

CertainDrafter: TypeAlias = Callable[[Tokens], Iterator[Proposal[PointMass]]]
"""A drafter whose every proposal is certain: a table, a lookup, a greedy model. Any `CertainDrafter` is a `Drafter`."""

GammaPolicy: TypeAlias = Callable[[Iterator[Proposal], DecodeState], tuple[tuple[Proposal, ...], Pace]]
"""(stream, state) → the proposals taken from the beginning of the stream, and the pace to carry on.

Exact as long as whether a token is taken does not depend on that token: decide before pulling it, or keep it and stop.
"""
