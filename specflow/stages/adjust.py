"""Adjust: the token behind the accepted drafts, a bonus or a correction."""

from __future__ import annotations

from typing import final

from attrs import field, frozen

from specflow.checks import a
from specflow.distribution import Distribution
from specflow.lossy import Lossy
from specflow.random import Sampling, drawn
from specflow.stages.verify import is_sampling
from specflow.state import Adjusted, Verified

a_verdict = a(Verified, "put the stages in order: Draft, a verification stage, Adjust, commit, advance")


@final
@frozen
class Adjust:
    """Draws the correction from the law that verification left: the residual after a refusal, p after none.

    Behind an accepted stop token there is nothing to draw. `DecodeError` for a law that is none.
    """

    rng: Sampling = field(validator=is_sampling)

    def __call__(self, verified: Verified, /) -> Adjusted:
        a_verdict("verified", verified)
        return _drawn(self.rng, verified, verified.correction)


@final
@frozen
class LossySkipAdjustment:
    """Draws from p itself after a refusal too, as the spec's `skip_sample_adjustment` asks.

    Lossy: with p in place of the residual the text no longer has the target's law; a token that was refused once gets
    a second chance. Greedy decoding is not affected, since p is a point mass there.
    """

    rng: Sampling = field(validator=is_sampling)

    def __call__(self, verified: Verified, /) -> Lossy[Adjusted]:
        a_verdict("verified", verified)
        law = None if verified.correction is None else verified.laws[verified.accepted]
        return Lossy(_drawn(self.rng, verified, law))


def _drawn(rng: Sampling, verified: Verified, law: Distribution | None) -> Adjusted:
    drafted, accepted = verified.drafted, verified.accepted
    kept = drafted.tokens[:accepted]
    if law is None:
        return Adjusted(verified, kept)
    return Adjusted(verified, (*kept, drawn(rng, law, len(drafted.state.tokens) + accepted)))
