"""Adjust: the token behind the accepted drafts, a bonus or a correction."""

from __future__ import annotations

from typing import final

from attrs import frozen

from specflow.lossy import Lossy
from specflow.random import Sampling
from specflow.state import Adjusted, Verified


@final
@frozen
class Adjust:
    """Draws the correction from the law that verification left: the residual after a refusal, p after none."""

    rng: Sampling

    def __call__(self, verified: Verified, /) -> Adjusted:
        drafted, accepted = verified.drafted, verified.accepted
        kept = drafted.tokens[:accepted]
        token = self.rng.draw(verified.correction, len(drafted.state.tokens) + accepted)
        return Adjusted(verified, (*kept, token))


@final
@frozen
class LossySkipAdjustment:
    """Draws from p itself after a refusal too, as the spec's `skip_sample_adjustment` asks.

    Lossy: with p in place of the residual the text no longer has the target's law; a token that was refused once gets
    a second chance. Greedy decoding is not affected, since p is a point mass there.
    """

    rng: Sampling

    def __call__(self, verified: Verified, /) -> Lossy[Adjusted]:
        drafted, accepted = verified.drafted, verified.accepted
        token = self.rng.draw(verified.laws[accepted], len(drafted.state.tokens) + accepted)
        return Lossy(Adjusted(verified, (*drafted.tokens[:accepted], token)))
