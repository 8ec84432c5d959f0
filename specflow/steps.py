"""The prebuilt steps: compositions of public stages and nothing else. Read one, copy it, rearrange it.

In all of them `observe` looks at each step before it stands, and `until` ends the text where it comes true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from specflow.errors import DecodeError
from specflow.guards.checks import calls, shown
from specflow.lossy import LossyStep
from specflow.policies import Fixed
from specflow.processors import Processor
from specflow.protocols import Prunable
from specflow.randomness import Randomness, Sampling
from specflow.stages import (
    Adjust,
    Condition,
    Draft,
    LossySkipAdjustment,
    Match,
    Observer,
    PruneCache,
    Reject,
    Verify,
    draft_nothing,
    ending,
    never,
    unobserved,
)
from specflow.state import Committed, Drafter, GammaPolicy, Predictor, Rule, Step


def autoregressive_step(
    target: Predictor,
    processor: Processor,
    rng: Sampling,
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """One token of the target. The unit among steps: any lossless step has its law.

    `DecodeError`, here as in all of these, for parts that cannot be what they are given for.
    """
    verify, adjust, end = Verify(target, processor, Match(rng)), Adjust(rng), ending(until, observe)
    return lambda state: state.then(draft_nothing).then(verify).then(adjust).then(end)


def verified_step(
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    rng: Randomness,
    rule: Rule[Randomness],
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """Draft, score, judge by `rule`, adjust, commit, prune. Lossless where the rule is.

    `rng` draws the token after the drafts. Drafts may be chains or trees.
    """
    draft, verify, adjust = Draft(drafter, gamma), Verify(target, processor, rule), Adjust(rng)
    end = ending(until, observe, PruneCache(_several(prune)))
    return lambda state: state.then(draft).then(verify).then(adjust).then(end)


def speculative_step(
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    rng: Randomness,
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """Draft, verify by token rejection, adjust, commit, prune. Lossless: the text has exactly the target's law.

    Drafts may be chains or trees. Where they are certain (a lookup, a greedy model), a seed of `Dice` gives one text,
    that of `autoregressive_step`, whatever drafts and however far, so under policies that look at the clock too.
    """
    return verified_step(drafter, target, processor, rng, Reject(rng), gamma, prune, observe, until)


def ngram_step(
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    rng: Randomness,
    update: Callable[[Committed], Committed],
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """`speculative_step` that teaches a provider, by `UpdateNgram` or `Recycle`. Lossless, with any drafter."""
    calls("a stage that learns", "give one, such as UpdateNgram(storage)")("update", update)
    draft, verify, adjust = Draft(drafter, gamma), Verify(target, processor, Reject(rng)), Adjust(rng)
    end = ending(until, observe, PruneCache(_several(prune)), update)
    return lambda state: state.then(draft).then(verify).then(adjust).then(end)


def seed_coupled_step(
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    noise: Sampling,
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """`speculative_step` by sample-and-match on `SharedNoise`: a seed gives one text, whatever drafts it and how far.

    Lossless over the seeds, and the text of a seed is that of `autoregressive_step(target, processor, noise)`. Drafts
    are accepted most often when a drafter that samples shares the noise: `LLMDrafter(predictor, processor, noise)`.
    Source: Daliri et al. 2408.07978.
    """
    draft, verify, adjust = Draft(drafter, gamma), Verify(target, processor, Match(noise)), Adjust(noise)
    end = ending(until, observe, PruneCache(_several(prune)))
    return lambda state: state.then(draft).then(verify).then(adjust).then(end)


def lossy_unadjusted_step(
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    rng: Randomness,
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> LossyStep:
    """`speculative_step` without the sample adjustment, as the spec's `skip_sample_adjustment` asks. Lossy."""
    draft, verify, adjust = Draft(drafter, gamma), Verify(target, processor, Reject(rng)), LossySkipAdjustment(rng)
    end = ending(until, observe, PruneCache(_several(prune)))
    return lambda state: state.then(draft).then(verify).then(adjust).map(end)


def _several(prune: object) -> tuple[Prunable, ...]:
    if isinstance(prune, Iterable) and not isinstance(prune, Tensor):
        return tuple(prune)
    raise DecodeError("prune", "prune is not several providers", shown(prune), "give them in a tuple: (predictor,)")
