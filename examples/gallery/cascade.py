"""A cascade: where the small model is sure, its token stands, whatever the target says (Narasimhan et al. 2405.19261).

That is faster than speculation and another text, so its type says so: a lossy rule makes a `LossyStep`. It has no
certificate, because its law is meant to be another one.
"""

from __future__ import annotations

from itertools import takewhile
from typing import final

from attrs import frozen

from specflow import Fixed, LLMDrafter, Scored, Verdict, run
from specflow.lossy import Lossy, LossyStep, accept_loss
from specflow.policies import drafter_law
from specflow.stages import Adjust, Draft, LossyJudge, Score, ending
from specflow.testing import CASES, World


@final
@frozen
class Deferring:
    """Drafts stand up to the first of which the drafter gave less than `sure`; the target goes on there."""

    sure: float = 0.5

    def __call__(self, scored: Scored, /) -> Lossy[Verdict]:
        drafts = scored.drafted.proposals
        path = tuple(takewhile(lambda i: drafter_law(drafts[i]).of(drafts[i].token) >= self.sure, range(len(drafts))))
        return Lossy(Verdict(path))


def decoder(world: World, sure: float) -> LossyStep:
    """A chain of drafts, judged by how sure the drafter was."""
    drafter = LLMDrafter(world.drafter, world.processor, world.rng)
    draft, score = Draft(drafter, Fixed(2)), Score(world.target, world.processor)
    judge, adjust, end = LossyJudge(Deferring(sure)), Adjust(world.rng), ending()
    return lambda state: state.then(draft).then(score).then(judge).map(lambda it: it.then(adjust).then(end))


def check() -> None:
    """Nobody is ever surer than 1, so then nothing is deferred to the drafter; below, it saves passes."""

    def accepted(sure: float) -> float:
        law = CASES[0].law(lambda world: run(accept_loss(decoder(world, sure)), world.start).state.tally.accepted)
        return law.mean(float)

    assert accepted(1.1) == 0 < accepted(0.0)
