"""Prune cache: let providers forget what was refused."""

from __future__ import annotations

from typing import final

from attrs import field, frozen

from specflow.guards.checks import does, each, valid
from specflow.protocols import Prunable
from specflow.stages.order import a_commitment
from specflow.state import Committed


@final
@frozen
class PruneCache:
    """Tells each provider which text stands, so that rejected positions are freed now rather than at the next read.

    Law: leaving it out never changes a token.
    """

    providers: tuple[Prunable, ...] = field(
        validator=valid(each(does("a provider that forgets", "give the predictors themselves", "prune")))
    )

    def __call__(self, committed: Committed, /) -> Committed:
        a_commitment("committed", committed)
        for provider in self.providers:
            provider.prune(committed.state.tokens)
        return committed
