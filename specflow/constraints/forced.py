"""What a grammar says in advance: tokens that are sure to come are drafts, and drafts that cannot come are cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from attrs import evolve, field, frozen

from specflow.constraints.constraint import Constraint, may_end
from specflow.constraints.matcher import Matcher
from specflow.distribution import PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import a, shown, valid
from specflow.guards.ids import ids_of, text_of
from specflow.state import TEXT, Drafted, Proposal, Tokens
from specflow.trees import without

_is_constraint = valid(a(Constraint, "give grammar.after(prompt)"))


@final
@frozen(eq=False)
class Forced:
    """Drafts the tokens that the grammar leaves no choice about, as many as there are in a row.

    Certain drafts, which are verified like all others: where the model would cut the same text into other tokens, they
    are rejected. It combines with other drafters, which go on where there is a choice: `then(Forced(answer), drafter)`.

    >>> from specflow.constraints.grammar import Grammar
    >>> answer = Grammar.regex("a+bcb", (b"a", b"b", b"c", b""), stop=(3,)).after((2,))
    >>> [draft.token for draft in Forced(answer)((2, 0, 1))]
    [2, 1]
    """

    constraint: Constraint = field(validator=_is_constraint)
    source: str = field(default="forced", validator=valid(a(str, "name the drafter")))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        matcher = self.constraint.find(text_of(tokens))
        while matcher is not None:
            forced = ids_of("forced", matcher.forced())
            for token in forced:
                yield Proposal(token, PointMass(token), source=self.source)
                matcher = None if matcher is None else self.constraint.following(matcher, token)
            if not forced:
                return


@final
@frozen(eq=False)
class CutForbidden:
    """A stage that cuts what the grammar forbids, so that the target does not read it. Lossless.

    A certain draft that is forbidden goes, and all that follows it. A drawn one stays, because whether it is there must
    not depend on what was drawn, but nothing that follows it does. Put it between `Draft` and `Score`.

    Behind the end of a text nothing is read: behind a stop token, and where the grammar has none, behind a text after
    which nothing can follow.

    `DecodeError` where text and grammar do not end at the same tokens: the text could end before it is complete.

    >>> from specflow.constraints.grammar import Grammar
    >>> from specflow import chain, start
    >>> answer = Grammar.regex("(ab)*", (b"a", b"b", b"c", b""), stop=(3,)).after((2,))
    >>> drafted = Drafted(start((2,), 9, stop=(3,)).unwrap(), chain((0, 1, 2, 0)))
    >>> CutForbidden(answer)(drafted).tokens
    (0, 1)
    """

    constraint: Constraint = field(validator=_is_constraint)

    def __call__(self, drafted: Drafted, /) -> Drafted:
        a(Drafted, "put the stages in order: Draft, CutForbidden, Score")("drafted", drafted)
        stop = drafted.state.request.stop
        if stop != self.constraint.stop:
            happened = f"the grammar ends at {shown(sorted(self.constraint.stop))}, and the text at other tokens"
            raise DecodeError("stop", happened, shown(sorted(stop)), "give both the same: `start` and the grammar")
        places: dict[int, Matcher | None] = {TEXT: self.constraint.at(drafted.state.tokens)}
        gone: set[int] = set()
        for i, (draft, parent) in enumerate(zip(drafted.proposals, drafted.parents, strict=True)):
            before = places[parent]
            if before is None:
                places[i] = None
                gone.add(i)
                continue
            place = self.constraint.following(before, draft.token)
            is_allowed = may_end(before) if draft.token in stop else place is not None
            if not is_allowed and isinstance(draft.q, PointMass):
                gone.add(i)
            is_over = place is not None and not stop and self.constraint.is_last(place)
            places[i] = None if is_over else place
        return evolve(drafted, proposals=without(drafted.proposals, gone)) if gone else drafted
