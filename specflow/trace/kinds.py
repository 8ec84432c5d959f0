"""Kinds of tokens: how each token of a text came to be, by whom, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeAlias, final

from attrs import frozen

from specflow.trace.parts import Origin

if TYPE_CHECKING:
    from specflow.trace.trace import Trace

FORCED: Final = "forced"
"""The source of what a grammar leaves no choice about, `constraints.Forced`."""

Kind: TypeAlias = tuple[Origin, str]
"""How a token came to be, and the source of its draft, "" where it was none."""

ABOUT: Final = {
    Origin.CORRECTED: "the target's token in place of a rejected draft",
    Origin.BONUS: "the target's token after drafts that were all accepted",
    Origin.DRAWN: "the target's token where nothing was drafted",
}


@final
@frozen
class Legend:
    """What a kind is called, what it means, and how many tokens are of it."""

    kind: Kind
    name: str
    about: str
    count: int


def kinds_of(trace: Trace) -> list[Kind]:
    """The kind of each token of the output."""
    found: list[Kind] = []
    for step in trace.steps:
        sources = [step.drafts[i].source for i in step.path]
        found += zip(step.origins, [*sources, ""], strict=False)
    return found


def sources_of(traces: Sequence[Trace]) -> list[str]:
    """Who drafted, in the order in which they first did."""
    return list(dict.fromkeys(draft.source for trace in traces for step in trace.steps for draft in step.drafts))


def legend_of(trace: Trace) -> list[Legend]:
    """The kinds of its tokens: what was drafted first, then what the target said."""
    counts = Counter(kinds_of(trace))
    drafted = [
        Legend((Origin.DRAFTED, source), f"{source}, accepted", _drafted(source), counts[Origin.DRAFTED, source])
        for source in sources_of((trace,))
    ]
    own = [Legend((origin, ""), origin.value, about, counts[origin, ""]) for origin, about in ABOUT.items()]
    return [one for one in (*drafted, *own) if one.count]


def _drafted(source: str) -> str:
    return "what the grammar leaves no choice about" if source == FORCED else f"drafted by {source}, and accepted"
