"""What a trace is made of: its steps, and the drafts of a step."""

from __future__ import annotations

from enum import Enum
from math import inf, isfinite
from typing import final

from attrs import field, frozen

from specflow.errors import DecodeError
from specflow.guards.checks import a, each, number, or_none, shown, valid, whole
from specflow.guards.ids import ids_of
from specflow.stages.fates import Fate
from specflow.state import TEXT, Tokens
from specflow.trees import depths

_is_token = whole(0, "give a token id")
_is_probability = number("a probability is outside [0, 1]", "give a number or None", lambda p: 0 <= p <= 1)
_is_time = number("a duration is not a number of seconds", "give seconds or None", lambda x: isfinite(x) and x >= 0)
_is_margin = number("a margin is not a number of 0 or more", "give a number or None", lambda x: isfinite(x) and x >= 0)


def plain_ids(tokens: object) -> Tokens:
    """Ids as plain ints. `DecodeError` for whatever else."""
    ids = ids_of("tokens", tokens)
    each(_is_token)("tokens", ids)
    return ids


def tuple_of(name: str, values: object, kind: type) -> None:
    """Refuses what is not a tuple of values of this kind."""
    a(tuple, "give them in a tuple")(name, values)
    each(a(kind, f"give values of {kind.__name__}"))(name, values)


class Origin(Enum):
    """How a token of the text came to be."""

    DRAFTED = "accepted"
    """A draft of it was accepted."""

    CORRECTED = "corrected"
    """The target's token in place of a rejected draft."""

    BONUS = "bonus"
    """The target's token after drafts that were all accepted."""

    DRAWN = "drawn"
    """The target's token where nothing was drafted."""


@final
@frozen
class DraftTrace:
    """One draft: its token, the number of the draft that it follows (`TEXT` for the text), and what became of it.

    `q` is the probability that its drafter gave to the token, `p` the target's; None where nobody knows or asked.

    >>> draft = DraftTrace(token=7, parent=-1, q=0.5, p=0.25, fate=Fate.REJECTED, source="llm")
    >>> draft.ratio
    0.5
    """

    token: int = field(validator=valid(_is_token))
    parent: int = field(validator=valid(whole(TEXT, "give the number of a draft, or TEXT")))
    q: float | None = field(validator=valid(or_none(_is_probability)))
    p: float | None = field(validator=valid(or_none(_is_probability)))
    fate: Fate = field(validator=valid(a(Fate, "give a Fate")))
    source: str = field(validator=valid(a(str, "give the name of the drafter")))

    @property
    def ratio(self) -> float | None:
        """p / q, up to 1 what `Reject` accepts a drawn draft with; ∞ where q is 0."""
        if self.p is None or self.q is None:
            return None
        return self.p / self.q if self.q > 0 else inf


def _are_drafts(name: str, drafts: object) -> None:
    tuple_of(name, drafts, DraftTrace)


def _are_margins(name: str, margins: object) -> None:
    a(tuple, "give them in a tuple")(name, margins)
    each(or_none(_is_margin))(name, margins)


@final
@frozen
class StepTrace:
    """One step: the `tokens` that it added to the text, and the `drafts` that it began with, parents first.

    `margins` has one number for each token: how far the target's best logit was ahead of the second, None where there
    was no other. `seconds` is the time of the step, `drafting` and `reading` those of them that the drafter and the
    target's pass took, each None where nobody measured it.

    `DecodeError` where these do not belong together: a parent after its child, accepted drafts that are not a path or
    not what the step added.
    """

    tokens: Tokens = field(converter=plain_ids)
    drafts: tuple[DraftTrace, ...] = field(default=(), validator=valid(_are_drafts))
    margins: tuple[float | None, ...] = field(default=(), validator=valid(_are_margins))
    seconds: float | None = field(default=None, validator=valid(or_none(_is_time)))
    drafting: float | None = field(default=None, validator=valid(or_none(_is_time)))
    reading: float | None = field(default=None, validator=valid(or_none(_is_time)))

    def __attrs_post_init__(self) -> None:
        for i, draft in enumerate(self.drafts):
            if draft.parent >= i:
                raise DecodeError("drafts", f"draft {i} does not come after its parent", draft.parent, "parents first")
        path, taken = self.path, tuple([self.drafts[i].token for i in self.path])
        if [self.drafts[i].parent for i in path] != [TEXT, *path][:-1] or taken != self.tokens[: len(taken)]:
            happened = "the accepted drafts are not the beginning of what the step added"
            raise DecodeError("drafts", happened, shown(taken), f"let them be a path: {shown(self.tokens)}")
        if len(self.tokens) > len(path) + 1:
            happened = "a step adds the accepted drafts and one token after them at most"
            raise DecodeError("tokens", happened, shown(self.tokens), f"give {len(path)} or {len(path) + 1}")
        if len(self.margins) not in (0, len(self.tokens)):
            raise DecodeError("margins", "there is not a margin for each token", shown(self.margins), "give all or ()")

    @property
    def path(self) -> tuple[int, ...]:
        """The drafts that were accepted, from the text down."""
        return tuple([i for i, draft in enumerate(self.drafts) if draft.fate is Fate.ACCEPTED])

    @property
    def origins(self) -> tuple[Origin, ...]:
        """How each token of the step came to be."""
        path = self.path
        own = [Origin.DRAFTED] * len(path)
        if len(self.tokens) == len(path):
            return tuple(own)
        end = (TEXT, *path)[-1]
        last = Origin.CORRECTED if any(draft.parent == end for draft in self.drafts) else Origin.BONUS
        return (*own, last if self.drafts else Origin.DRAWN)

    @property
    def depths(self) -> tuple[int, ...]:
        """How many drafts each draft comes after."""
        return tuple(depths([draft.parent for draft in self.drafts]))

    def rejected(self) -> Tokens:
        """The tokens of the first rejected branch where the step left the drafts: what would have come instead."""
        end = (TEXT, *self.path)[-1]
        branch: list[int] = []
        for i, draft in enumerate(self.drafts):
            if draft.parent == end and draft.fate is not Fate.ACCEPTED:
                branch.append(draft.token)
                end = i
        return tuple(branch)
