"""Prune cache: let providers forget what was refused."""

from __future__ import annotations

from typing import final

from attrs import frozen

from specflow.predictor import Prunable
from specflow.state import Committed


@final
@frozen
class PruneCache:
    """Tells each provider which text stands, so that rejected positions are freed now rather than at the next read.

    Law: leaving it out never changes a token.
    """

    providers: tuple[Prunable, ...]

    def __call__(self, committed: Committed, /) -> Committed:
        for provider in self.providers:
            provider.prune(committed.state.tokens)
        return committed
