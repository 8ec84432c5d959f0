"""Drafts: what is proposed, and how proposals hang together as chains and trees."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, Generic, final

import numpy
from attrs import Factory, field, frozen
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import TypeVar

from specflow.distribution import Categorical, Distribution, PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import is_id, is_whole, shown
from specflow.guards.finite import is_near
from specflow.guards.ids import Tokens, ids_of

Q = TypeVar("Q", bound=Distribution, covariant=True, default=Distribution)

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
            raise no_draft(self, what, "q")


def _not_held(q: Distribution, token: int) -> str | None:
    """What is wrong with a law that this token cannot have been drawn from, as far as that is known for free."""
    if (type(q) is PointMass and q.token is token) or not is_id(token):
        return None
    match q:
        case PointMass(certain):
            return f"certainty of token {certain}" if certain != token and is_id(certain) else None
        case Categorical(probs) if token >= len(probs):
            return f"{len(probs)} probabilities"
        case Categorical(probs) if is_near(probs) and float(probs[token]) == 0:
            return f"q({token}) = 0"
    return None


def no_draft(draft: Proposal, what: str, parameter: str = "drafter") -> DecodeError:
    """The error that names who proposed a draft with a law that it cannot have been drawn from."""
    happened = f"the source {shown(draft.source)} drafts token {draft.token} with a q that it was not drawn from"
    return DecodeError(parameter, happened, what, "give the law that the token was drawn from, or leave q out")


def chain(tokens: Sequence[int], source: str = "draft") -> tuple[Proposal[PointMass], ...]:
    """Certain drafts, each after the one before it. `DecodeError` for what is not a sequence of ids.

    >>> [draft.token for draft in chain((5, 6))]
    [5, 6]
    """
    return tuple([Proposal(token, PointMass(token), source=source) for token in ids_of("tokens", tokens)])


def parent_of(draft: Proposal, i: int) -> int:
    """What draft number `i` follows, by number; `DecodeError` where it does not come after its parent."""
    parent: object = draft.parent
    if parent is BEFORE:  # as in every chain
        return i - 1
    if not is_whole(parent) or not BEFORE <= parent < i:
        happened = f"draft {i} of the source {shown(draft.source)} does not come after its parent"
        raise DecodeError("drafter", happened, shown(draft), "yield parents first")
    return i - 1 if parent == BEFORE else int(parent)


def parents_of(drafts: Sequence[Proposal]) -> tuple[int, ...]:
    """What each of the drafts follows, by number. `DecodeError` for one that does not come after its parent.

    >>> parents_of((Proposal(5), Proposal(6), Proposal(7, parent=TEXT)))
    (-1, 0, -1)
    """
    remedy = "give proposals, such as chain(tokens)"
    given: object = drafts
    if not isinstance(given, (tuple, Sequence)):  # to tell a tuple takes a tenth of the time
        raise DecodeError("drafts", "drafts are not a sequence", shown(given), remedy)
    parents = []
    for i, draft in enumerate(drafts):
        if not isinstance(draft, Proposal):
            raise DecodeError("drafts", "a draft is not a Proposal", shown(draft), remedy)
        parents.append(parent_of(draft, i))
    return tuple(parents)


def children_of(parents: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The drafts that directly follow each draft that any follows, and the text."""
    children: dict[int, tuple[int, ...]] = {}
    for i, parent in enumerate(parents):
        children[parent] = (*children.get(parent, ()), i)
    return children


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each draft follows the one before it.

    >>> is_chain((TEXT, 0, 1)), is_chain((TEXT, TEXT))
    (True, False)
    """
    return list(parents) == list(range(TEXT, len(parents) - 1))


def path_to(parents: Sequence[int], i: int) -> list[int]:
    """The numbers of the drafts from the text down to draft i, itself included."""
    path = []
    while i != TEXT:
        path.append(i)
        i = parents[i]
    return path[::-1]


def path_along(drafted: Tokens, parents: Sequence[int], tokens: Tokens) -> list[int]:
    """The numbers of the drafts that `tokens` follow from the text on, as far as there are any.

    >>> path_along((5, 6, 7), (TEXT, TEXT, 1), (6, 7, 8))
    [1, 2]
    """
    path: list[int] = []
    for token in tokens:
        here = path[-1] if path else TEXT
        alike = (i for i, parent in enumerate(parents) if parent == here and drafted[i] == token)
        following = next(alike, None)
        if following is None:
            break
        path.append(following)
    return path


def leaves(parents: Sequence[int]) -> list[int]:
    """The drafts that no other follows."""
    inner = set(parents)
    return [i for i in range(len(parents)) if i not in inner]


def preorder(drafts: Sequence[Proposal]) -> tuple[Proposal, ...]:
    """The same drafts, each followed by all that is below it, its first child first. A chain stays as it is.

    So the likeliest path lies together, if the likeliest child comes first.

    >>> [draft.token for draft in preorder((Proposal(5), Proposal(6, parent=TEXT), Proposal(7, parent=0)))]
    [5, 7, 6]
    """
    parents = parents_of(drafts)
    if is_chain(parents):
        return tuple(drafts)
    children, order, waiting = children_of(parents), [], [TEXT]
    while waiting:
        order.append(waiting.pop())
        waiting += children.get(order[-1], ())[::-1]
    number = {i: new for new, i in enumerate(order, TEXT)}
    return tuple([_after(drafts[i], number[parents[i]]) for i in order[1:]])


def without(drafts: Sequence[Proposal], gone: Collection[int]) -> tuple[Proposal, ...]:
    """The same drafts but for those whose numbers are `gone`; with a draft it has to hold all that is below it.

    >>> drafts = Proposal(5), Proposal(6, parent=TEXT), Proposal(7)
    >>> [(draft.token, draft.parent) for draft in without(drafts, {0})]
    [(6, -1), (7, 0)]
    """
    if not gone:
        return tuple(drafts)
    kept: list[Proposal] = []
    number = {TEXT: TEXT}
    for i, parent in enumerate(parents_of(drafts)):
        if i not in gone:
            number[i] = len(kept)
            kept.append(_after(drafts[i], number[parent]))
    return tuple(kept)


def _after(draft: Proposal, parent: int) -> Proposal:
    """The same draft after that parent."""
    if draft.parent == parent:
        return draft
    return Proposal(draft.token, draft.q, parent, draft.source, draft.chance, draft.logits)


def depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors each draft has.

    >>> depths([TEXT, 0, 1, 0, TEXT])
    [0, 1, 2, 1, 0]
    """
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent == TEXT else found[parent] + 1)
    return found


def lineage(parents: Sequence[int]) -> NDArray[numpy.bool_]:
    """Which drafts each draft sees, [n, n]: its ancestors and itself."""
    seen = numpy.eye(len(parents), dtype=numpy.bool_)
    for i, parent in enumerate(parents):
        if parent != TEXT:
            seen[i] |= seen[parent]
    return seen
