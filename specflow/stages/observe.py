"""Observe: look at a step without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeAlias, final

from attrs import field, frozen
from rich.console import Console
from rich.text import Text

from specflow.distribution import BlackBox, Distribution
from specflow.guards.checks import a, does, or_none, valid
from specflow.stages.fates import Fate, fates
from specflow.stages.order import a_commitment
from specflow.state import TEXT, Committed, Tokens

Observer: TypeAlias = Callable[[Committed], object]
"""Looks at a step that is about to stand. If it raises, the step has not happened: no text, nothing learned."""


class Tokenizer(Protocol):
    """What we ask of a tokenizer: the text of some ids."""

    def decode(self, token_ids: list[int], /) -> str | list[str]:
        """The text of the ids."""
        ...


STYLES: Final = {Fate.ACCEPTED: "green", Fate.REJECTED: "red", Fate.NOT_REACHED: "dim"}


def unobserved(committed: Committed) -> None:
    """The observer that does not look."""


@final
@frozen
class Show:
    """Prints a step: position, γ, how many were accepted, and each draft with its text, q, p/q and fate.

    Accepted drafts are green, rejected ones red, those that were not reached dim (`trace.Fate` says which), and the
    token that the target adds (bonus, corrected, or drawn without a draft) is cyan; colours only on a terminal.
    It is an `Observer`: give it to a prebuilt step, or to `ending` in a step of your own.
    Law: observing is the identity, so a decode with and without it emits the same tokens.

    >>> import torch
    >>> from specflow import Dice, GreedyProcessor, autoregressive_step, start
    >>> always_one = lambda tokens, drafts: torch.tensor([[0.0, 9.0]])
    >>> step = autoregressive_step(always_one, GreedyProcessor(), Dice(), observe=Show())
    >>> outcome = step(start([0], max_new_tokens=1).unwrap())
    position 1  gamma 0  accepted 0/0  ends: length limit
      drawn       1
    """

    tokenizer: Tokenizer | None = field(
        default=None, validator=valid(or_none(does("a tokenizer", "give the target's, or None", "decode")))
    )
    console: Console = field(
        factory=Console, eq=False, repr=False, validator=valid(a(Console, "give a console of rich"))
    )

    def __call__(self, committed: Committed, /) -> None:
        a_commitment("committed", committed)
        for line in self._lines(committed):
            self.console.print(line, soft_wrap=True)

    def _lines(self, committed: Committed) -> Iterator[Text]:
        verified, kept = committed.adjusted.verified, len(committed.tokens)
        gamma = len(verified.drafted.proposals)
        position, accepted = len(committed.before.tokens), min(verified.accepted, kept)
        ending = f"  ends: {committed.reason.value}" if committed.reason else ""
        yield Text(f"position {position}  gamma {gamma}  accepted {accepted}/{gamma}{ending}", "bold")
        yield from self._drafts(committed)
        if kept > verified.accepted:
            rejected = bool(verified.drafted.children(verified.path[-1] if verified.path else TEXT))
            kind = "corrected" if rejected else "bonus" if gamma else "drawn"
            yield Text(f"  {kind:<12}{self._named(committed.tokens[-1])}", "cyan")

    def _drafts(self, committed: Committed) -> Iterator[Text]:
        scored = committed.adjusted.verified.scored
        rows = zip(scored.drafted.proposals, scored.drafted.parents, fates(committed), strict=True)
        for proposal, parent, fate in rows:
            law = scored.made(parent)
            q, p = _probability(proposal.q, proposal.token), _probability(law, proposal.token)
            ratio = "?" if q is None or p is None else f"{p / q:.3g}" if q > 0 else "∞"
            odds = f"q {'?' if q is None else f'{q:.3g}'}  p/q {ratio}"
            named = self._named(proposal.token)
            yield Text(f"  {fate.value:<12}{named}  {odds}  {proposal.source}", STYLES[fate])

    def _named(self, token: int) -> str:
        text = decoded(self.tokenizer, (token,))
        return str(token) if text is None else f"{token} {text!r}"


def decoded(tokenizer: Tokenizer | None, tokens: Tokens) -> str | list[str] | None:
    """The text of ids that are shown; None without a tokenizer, and for ids that it does not know, as drafts may be."""
    try:
        return None if tokenizer is None else tokenizer.decode(list(tokens))
    except Exception:  # somebody else's: it may raise anything, and a text that is shown is no reason to end one
        return None


def _probability(law: Distribution | None, token: int) -> float | None:
    return None if law is None or isinstance(law, BlackBox) else law.of(token)
