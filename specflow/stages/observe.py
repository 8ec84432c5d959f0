"""Observe: look at a step without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias, final

from attrs import field, frozen
from rich.console import Console
from rich.text import Text

from specflow.distribution import BlackBox, Distribution
from specflow.state import Committed, Tokens, Verified

Observer: TypeAlias = Callable[[Committed], object]
"""Looks at a step that is about to stand. If it raises, the step has not happened: no text, nothing learned."""


class Tokenizer(Protocol):
    """What we ask of a tokenizer: the text of some ids."""

    def decode(self, token_ids: list[int], /) -> str | list[str]:
        """The text of the ids."""
        ...


def unobserved(committed: Committed) -> None:
    """The observer that does not look."""


@final
@frozen
class Show:
    """Prints a step: position, γ, how many were accepted, and each draft with its text, q, p/q and verdict.

    Accepted drafts are green, refused ones red, the corrected or bonus token cyan; colours only on a terminal.
    Law: observing is the identity, so a decode with and without it emits the same tokens.
    """

    tokenizer: Tokenizer | None = None
    console: Console = field(factory=lambda: Console(highlight=False, soft_wrap=True), eq=False, repr=False)

    def __call__(self, committed: Committed, /) -> None:
        verified = committed.adjusted.verified
        proposals, kept = verified.drafted.proposals, len(committed.tokens)
        position = len(committed.before.tokens)
        heading = (
            f"position {position}  gamma {len(proposals)}  accepted {min(verified.accepted, kept)}/{len(proposals)}"
        )
        self.console.print(heading + (f"  ends: {committed.reason.value}" if committed.reason else ""), style="bold")
        for line in self._drafts(verified, kept):
            self.console.print(line)
        if kept > verified.accepted:
            kind = "bonus" if verified.accepted == len(proposals) else "corrected"
            self.console.print(Text(f"  {kind:<10}{self._named(committed.tokens[-1:])}", style="cyan"))

    def _drafts(self, verified: Verified, kept: int) -> Iterator[Text]:
        for i, proposal in enumerate(verified.drafted.proposals):
            verdict, style = _verdict(i, verified.accepted, kept)
            q, p = _probability(proposal.q, proposal.token), _probability(verified.laws[i], proposal.token)
            ratio = "?" if q is None or p is None else f"{p / q:.3g}" if q > 0 else "∞"
            odds = f"q {'?' if q is None else f'{q:.3g}'}  p/q {ratio}"
            named = self._named((proposal.token,))
            yield Text(f"  {verdict:<10}{named}  {odds}  {proposal.source}", style=style)

    def _named(self, tokens: Tokens) -> str:
        text = "" if self.tokenizer is None else f" {self.tokenizer.decode(list(tokens))!r}"
        return " ".join(map(str, tokens)) + text


def _verdict(i: int, accepted: int, kept: int) -> tuple[str, str]:
    if i >= kept:
        return "dropped", "dim"
    if i < accepted:
        return "accepted", "green"
    return ("rejected", "red") if i == accepted else ("unjudged", "dim")


def _probability(law: Distribution, token: int) -> float | None:
    return None if isinstance(law, BlackBox) else law.of(token)
