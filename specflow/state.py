"""The records of a step: DecodeState → Drafted → Scored → Verified → Adjusted → Committed → DecodeState | Finished.

The text is the state. A `DecodeState` is ints and tuples: it prints, compares, hashes and pickles, and stepping the
same one twice is always allowed. Whatever a provider remembers (a KV cache, n-gram counts) lives with the provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from numbers import Integral
from sys import maxsize
from typing import TYPE_CHECKING, Final, Generic, Never, Self, TypeAlias, final

from attrs import Factory, field, frozen
from torch import Tensor
from typing_extensions import TypeVar

from specflow.distribution import Categorical, Distribution, PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import a, calls, is_id, or_none, shown, valid, whole
from specflow.guards.finite import is_near
from specflow.guards.ids import Tokens as Tokens  # noqa: PLC0414 - who reads a state finds it here
from specflow.guards.ids import ids_of
from specflow.laws import Laws, Lazily

if TYPE_CHECKING:
    from specflow.randomness import Randomness, Sampling

Pace: TypeAlias = tuple[float, ...]
"""What a gamma policy carries from one step to the next. It belongs to the policy; nothing else reads it."""

Q = TypeVar("Q", bound=Distribution, covariant=True, default=Distribution)
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
        """Drafts that were judged: those after a stop do not count."""
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
class DecodeState(Record):
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
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def room(self) -> int:
        """How many more tokens the text may take."""
        return self.request.limit - len(self.tokens)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per target pass, the bonus or corrected token included; 0.0 before the first step."""
        return len(self.output) / self.tally.steps if self.tally.steps else 0.0


TEXT: Final = -1
"""The parent of a draft that follows the text itself."""

BEFORE: Final = -2
"""The parent of a draft that follows the one drafted before it, or the text where it is the first."""


@final
@frozen(eq=False)
class Proposal(Generic[Q]):
    """One drafted token, the law `q` that it was really drawn from, and what it follows.

    Without a `q` it is certain, as a lookup is: it was not drawn. It follows the proposal before it unless `parent` is
    the number of another one, or `TEXT`: so a stream that never says `parent` is a chain, and any beginning of any
    stream is a tree. Siblings are drawn one after the other: the q of a later one is its law given the earlier ones.

    `source` names who drafted it, for the statistics. `chance` is the drafter's guess at the probability that the
    target takes the whole path down to here, where it has one. `logits` [V] are the drafter's own, before any
    processing, where the drafter is a model; policies read both. `DecodeError` for a q that does not hold the token.

    >>> Proposal(7, source="mine").q.of(7), Proposal(7).parent == BEFORE
    (1.0, True)
    """

    token: int
    q: Q = field(default=Factory(lambda self: PointMass(self.token), takes_self=True))  # type: ignore[assignment]
    parent: int = BEFORE
    source: str = "draft"
    chance: float | None = None
    logits: Tensor | None = field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        what = _not_held(self.q, self.token)
        if what is not None:
            happened = f"the source {shown(self.source)} drafts token {self.token} with a q that it was not drawn from"
            raise DecodeError("q", happened, what, "give the law that the token was drawn from, or leave q out")


def _not_held(q: Distribution, token: int) -> str | None:
    """What is wrong with a law that this token cannot have been drawn from, as far as that is known for free."""
    if not is_id(token):
        return None
    match q:
        case PointMass(certain) if is_id(certain) and certain != token:
            return f"certainty of token {certain}"
        case Categorical(probs) if token >= len(probs):
            return f"{len(probs)} probabilities"
        case Categorical(probs) if is_near(probs) and float(probs[token]) == 0:
            return f"q({token}) = 0"
    return None


def chain(tokens: Sequence[int], source: str = "draft") -> tuple[Proposal[PointMass], ...]:
    """Certain drafts, each after the one before it. `DecodeError` for what is no sequence of ids.

    >>> [draft.token for draft in chain((5, 6))]
    [5, 6]
    """
    return tuple([Proposal(token, PointMass(token), source=source) for token in ids_of("tokens", tokens)])


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

    state: DecodeState = field(validator=valid(a(DecodeState, "give a state, such as start(prompt, 32).unwrap()")))
    proposals: tuple[Proposal, ...]
    parents: tuple[int, ...] = field(init=False, repr=False)
    _children: Mapping[int, tuple[int, ...]] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        parents = parents_of(self.proposals)
        object.__setattr__(self, "parents", parents)
        children: dict[int, tuple[int, ...]] = {}
        for i, parent in enumerate(parents):
            children[parent] = (*children.get(parent, ()), i)
        object.__setattr__(self, "_children", children)

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
        path = []
        while i != TEXT:
            path.append(i)
            i = self.parents[i]
        return tuple(path[::-1])

    def text(self, i: int) -> Tokens:
        """The text and the drafts down to draft i."""
        return self.state.tokens + tuple([self.proposals[k].token for k in self.path(i)])

    def trunk(self, i: int) -> tuple[int, ...]:
        """Draft i, or the text, and from there down always the first child, which should be the likeliest."""
        trunk = [i]
        while children := self.children(trunk[-1]):
            trunk.append(children[0])
        return tuple(trunk)


def parents_of(drafts: Sequence[Proposal]) -> tuple[int, ...]:
    """What each of the drafts follows, by number. `DecodeError` for one that does not come after its parent.

    >>> parents_of((Proposal(5), Proposal(6), Proposal(7, parent=TEXT)))
    (-1, 0, -1)
    """
    given: object = drafts
    if not isinstance(given, Sequence):
        raise DecodeError("drafts", "drafts are no sequence", shown(given), "give proposals, such as chain(tokens)")
    parents = []
    for i, draft in enumerate(drafts):
        if not isinstance(draft, Proposal):
            raise DecodeError("drafts", "a draft is no Proposal", shown(draft), "give proposals, such as chain(tokens)")
        parent: object = draft.parent
        if type(parent) is not int and isinstance(parent, Integral):
            parent = int(parent)
        if type(parent) is not int or not BEFORE <= parent < i + (parent < 0):
            happened = f"draft {i} does not come after its parent"
            raise DecodeError("drafter", happened, shown(draft), "yield parents first")
        parents.append(i - 1 if parent == BEFORE else parent)
    return tuple(parents)


def _is_number(i: object, drafts: int) -> None:
    """Refuses what is neither the number of one of so many drafts nor `TEXT`."""
    is_whole = type(i) is int or (isinstance(i, Integral) and not isinstance(i, bool))
    if not (is_whole and TEXT <= i < drafts):  # type: ignore[operator]
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
    """What the target says of a draft: `logits` [n + 1, V], after the text and after each draft, refused ones too.

    The target's law after a draft is made when a rule asks for it, so that no processor hears of a draft that cannot
    stand; `make` makes those along a stretch of drafts.
    """

    drafted: Drafted
    logits: Tensor = field(repr=False)
    make: Callable[[tuple[int, ...]], Laws] = field(repr=False)
    _known: dict[int, tuple[Stretch, int]] = field(init=False, factory=dict, repr=False)

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
            raise DecodeError("path", "a path is no numbers of drafts", shown(given), "give some, such as (TEXT, 0)")
        for i in path:
            _is_number(i, len(self.drafted.proposals))
        first, last = path[0] + 1, path[-1] + 1
        return self.logits[first : last + 1] if last - first == len(path) - 1 else self.logits[[i + 1 for i in path]]


@final
@frozen(eq=False)
class Verdict(Generic[S]):
    """What a rule says: the drafts that stand, from the text down, and the law of the token after them.

    `correction` is None where that is the target's own law there. S is what the token may be drawn with: fresh
    `Randomness`, unless a rule says that any `Sampling` keeps the text's law.
    """

    path: tuple[int, ...]
    correction: Distribution | None = None


Rule: TypeAlias = Callable[[Scored], Verdict[S]]
"""What judges a draft: a value without target and processor. It asks for the law after a draft once that can stand."""


@final
@frozen(eq=False)
class Verified(Record, Generic[S]):
    """The target's judgement of a draft: the drafts on `path` stand, from the text down.

    `correction` is the law of the token after them: the bonus token's p when the path cannot go on, else whatever
    keeps the text's law exact. It is None where the text ends with an accepted stop token.
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
    at stop tokens and the limit. `DecodeError` for a bonus that is no token id, and for values of other kinds.
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
    """A text that ended, and why. To go on from it, give `state.request` a new limit and step `state` again."""

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
