"""How often drafts are accepted, learnt by source, length of the draft, and position."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Final, final

from attrs import define, evolve, field, frozen

from specflow.distribution import PointMass
from specflow.guards.checks import a
from specflow.prefix import common_prefix
from specflow.state import BEFORE, Proposal, Tokens

PRIOR: Final = 0.6  # the acceptance of a first draft of which nothing is known: high, so that a drafter is tried
WEIGHT: Final = 2.0  # how many drafts a prior counts for
OTHERS: Final = 2.0  # how many drafts everything counts for that was seen in other texts
FADE: Final = 0.97  # how much of what was seen in a text is kept from step to step


@final
@define(eq=False)
class Pulled:
    """A draft in the making: what was pulled from the stream, up to `most`; whether the drafter has `met` the text.

    The first `drawn` proposals have to be taken: the last of them was drawn from a spread law. It `is_told` once one of
    them tells its chance, or does not follow the one before it.
    """

    stream: Iterator[Proposal]
    most: int
    met: bool
    proposals: list[Proposal] = field(factory=list)
    drawn: int = 0
    is_told: bool = False
    seconds: float = 0.0
    _ended: bool = False

    @property
    def goes_on(self) -> bool:
        return not (self._ended or self.is_told) and len(self.proposals) < self.most

    @property
    def offered(self) -> int:
        """How long the drafter's whole draft is; 0 while it is not known."""
        return 0 if self.goes_on else len(self.proposals)

    def pull(self) -> None:
        self.met = True
        proposal = pulled(self.stream)
        if proposal is None:
            self._ended = True
            return
        branches = proposal.parent not in (BEFORE, len(self.proposals) - 1)
        self.is_told |= branches or proposal.chance is not None
        self.proposals.append(proposal)
        if not isinstance(proposal.q, PointMass):
            self.drawn = len(self.proposals)

    def watched(self, start: int) -> Watched | None:
        if not self.proposals:
            return None
        tokens, sources = zip(*[(proposal.token, proposal.source) for proposal in self.proposals], strict=True)
        return Watched(start, tokens, sources, self.offered)


def pulled(stream: Iterator[Proposal]) -> Proposal | None:
    """The next proposal, or None where the drafter has nothing more to say."""
    for proposal in stream:
        a(Proposal, "have the drafter yield proposals")("drafter", proposal)
        return proposal
    return None


@final
@define(eq=False)
class Certain:
    """How many drafts of a drafter's stream are certain, as it last was: those can be looked at and left alone."""

    known: float = inf

    def note(self, position: int, proposal: Proposal) -> None:
        if not isinstance(proposal.q, PointMass):
            self.known = min(self.known, position)
        elif position >= self.known:
            self.known = inf


@final
@frozen(eq=False)
class Watched:
    """Drafts that the text is compared with as it comes, taken or not."""

    start: int
    tokens: Tokens
    sources: tuple[str, ...]
    offered: int
    learnt: int = 0


@final
@define(eq=False)
class _Count:
    """How many drafts were judged and accepted, recent ones counting more."""

    accepted: float = 0.0
    judged: float = 0.0
    step: int = 0
    text: int = 0


@final
@define(eq=False)
class Acceptance:
    """Acceptance by source, length of the draft, and position: counts that fade, each leaning on a coarser one.

    A source's drafts of one length lean on its drafts of any length, those on the position before, and the first
    position on `PRIOR`; what is leant on counts for `WEIGHT` drafts.
    """

    step: int = 0
    _text: int = 0
    _source: str = ""
    _counts: dict[tuple[str, int, int], _Count] = field(factory=dict)

    def begin(self) -> None:
        """A new text."""
        self._text += 1

    def chances(self, draft: Pulled, most: int) -> list[float]:
        """The acceptance at each position up to `most`. Drafts yet to come are thought to be of the last source."""
        sources = [proposal.source for proposal in draft.proposals]
        lengths = (0, draft.offered) if draft.offered else (0,)
        chance, chances = PRIOR, []
        for i in range(most):
            source = sources[i] if i < len(sources) else self._source
            for length in lengths:
                count = self._counts.get((source, length, i))
                if count is not None:
                    kept = self._kept(count)
                    chance = (kept * count.accepted + WEIGHT * chance) / (kept * count.judged + WEIGHT)
            chances.append(chance)
        return chances

    def learn(self, watched: Watched, tokens: Tokens) -> Watched | None:
        """What is left to be watched, once what the text tells about these drafts by now is learnt."""
        came = tokens[watched.start : watched.start + len(watched.tokens)]
        accepted = common_prefix(came, watched.tokens)
        rejected = accepted < len(came)
        for i in range(watched.learnt, accepted + rejected):
            for length in {0, watched.offered}:
                count = self._counts.setdefault((watched.sources[i], length, i), _Count())
                kept = self._kept(count)
                count.accepted = kept * count.accepted + (i < accepted)
                count.judged = kept * count.judged + 1
                count.step, count.text = self.step, self._text
        self._source = watched.sources[0]
        return None if rejected or accepted == len(watched.tokens) else evolve(watched, learnt=accepted)

    def _kept(self, count: _Count) -> float:
        """How much of a count still counts."""
        faded = FADE ** (self.step - count.step)
        return faded if count.text == self._text else min(faded, OTHERS / max(count.judged, OTHERS))
