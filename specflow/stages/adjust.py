"""Adjust: the token after the accepted drafts, a bonus or a correction."""

from __future__ import annotations

from typing import Generic, Never, final

from attrs import field, frozen
from typing_extensions import TypeVar

from specflow.distribution import Distribution
from specflow.lossy import Lossy
from specflow.randomness import Sampling, drawn
from specflow.stages.order import a_verdict
from specflow.stages.rules.samples import is_sampling
from specflow.state import TEXT, Adjusted, Verified

S = TypeVar("S", bound=Sampling)


@final
@frozen
class Adjust(Generic[S]):
    """Draws the token after the accepted drafts: a correction from the residual, or the bonus token from p.

    What draws must be fresh after a rule that rejects drafts by chance: after `Reject` type checkers refuse
    `SharedNoise`, which after `Match` is what makes a seed one text. After an accepted stop token there is nothing to
    draw. `DecodeError` for a law that is not one.

    >>> from specflow import Dice, GreedyProcessor, Match, Proposal, start
    >>> from specflow.stages import Verify
    >>> from specflow.state import Drafted
    >>> from specflow.testing import TableModel
    >>> verify = Verify(TableModel(5, seed=1), GreedyProcessor(), Match(Dice()))
    >>> Adjust(Dice())(verify(Drafted(start((0,), 9).unwrap(), (Proposal(4), Proposal(3))))).tokens
    (4, 2)
    """

    rng: S = field(validator=is_sampling)

    def __call__(self, verified: Verified[S], /) -> Adjusted:
        a_verdict("verified", verified)
        return _drawn(self.rng, verified, verified.correction)


@final
@frozen
class LossySkipAdjustment:
    """Draws from p itself after a rejection too, as the spec's `skip_sample_adjustment` asks.

    Lossy: with p in place of the residual the text no longer has the target's law; a token that was rejected once gets
    a second chance. Greedy decoding is not affected, since p is a point mass there.

    >>> from specflow import Dice, GreedyProcessor, chain, start
    >>> from specflow.stages import Reject, Verify
    >>> from specflow.state import Drafted
    >>> from specflow.testing import TableModel
    >>> drafted = Drafted(start((0,), 9).unwrap(), chain((4, 3)))
    >>> verified = Verify(TableModel(5, seed=1), GreedyProcessor(), Reject(Dice()))(drafted)
    >>> LossySkipAdjustment(Dice())(verified).value.tokens
    (4, 2)
    """

    rng: Sampling = field(validator=is_sampling)

    def __call__(self, verified: Verified[Never], /) -> Lossy[Adjusted]:
        a_verdict("verified", verified)
        law = None if verified.correction is None else verified.scored.law((TEXT, *verified.path)[-1])
        return Lossy(_drawn(self.rng, verified, law))


def _drawn(rng: Sampling, verified: Verified[Never], law: Distribution | None) -> Adjusted:
    position = len(verified.drafted.state.tokens) + verified.accepted
    return Adjusted(verified, None if law is None else drawn(rng, law, position))
