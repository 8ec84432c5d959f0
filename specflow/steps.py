"""The prebuilt steps: compositions of public stages and nothing else. Read one, copy it, rearrange it.

In all of them `observe` looks at each step before it stands, and `until` ends the text where it comes true.
"""

from __future__ import annotations

from collections.abc import Iterable

from returns.functions import tap
from returns.pipeline import flow
from torch import Tensor

from specflow.checks import calls, does, shown
from specflow.errors import DecodeError
from specflow.gamma import Fixed
from specflow.lossy import LossyStep
from specflow.predictor import Prunable
from specflow.processors import Processor
from specflow.random import Randomness, Sampling
from specflow.stages.adjust import Adjust, LossySkipAdjustment
from specflow.stages.commit import advance, commit
from specflow.stages.draft import Draft, draft_nothing
from specflow.stages.ngram import UpdateNgram
from specflow.stages.observe import Observer, unobserved
from specflow.stages.prune import PruneCache
from specflow.stages.stop import Condition, StopWhen, never
from specflow.stages.tree import DraftTree, VerifyTree
from specflow.stages.verify import MatchSamples, RejectTokens
from specflow.state import (
    Adjusted,
    DecodeState,
    Drafter,
    Finished,
    GammaPolicy,
    Predictor,
    Step,
    TreeDrafter,
    TreePolicy,
    TreePredictor,
)

_is_target = calls("a predictor", "give a function of (tokens, last), such as a CachedPredictor")
_is_observer = calls("an observer", "give a function of what was committed")
_is_processor = does(
    "a processor",
    "give a Processor, such as GreedyProcessor(); interop.ProcessorList makes one of transformers'",
    "laws",
)


def _complete(target: object, processor: object, observe: object) -> None:
    """Refuses what the stages cannot: they may be made without a target or a processor, to ask for the rule alone."""
    _is_target("target", target)
    _is_processor("processor", processor)
    _is_observer("observe", observe)


def _several(prune: object) -> tuple[Prunable, ...]:
    if isinstance(prune, Iterable) and not isinstance(prune, Tensor):
        return tuple(prune)
    raise DecodeError("prune", "prune is not several providers", shown(prune), "give them in a tuple: (predictor,)")


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
    _complete(target, processor, observe)
    verify, adjust, stop = MatchSamples(target, processor, rng), Adjust(rng), StopWhen(until)
    return lambda state: flow(state, draft_nothing, verify, adjust, stop, commit, tap(observe), advance)


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

    Where the drafts are certain (a lookup, a greedy model), a seed of `Dice` gives one text, that of
    `autoregressive_step`, whatever drafts and however far, so under policies that look at the clock too.
    """
    _complete(target, processor, observe)
    draft, verify, adjust = Draft(drafter, gamma), RejectTokens(target, processor, rng), Adjust(rng)
    stop, forget = StopWhen(until), PruneCache(_several(prune))
    return lambda state: flow(state, draft, verify, adjust, stop, commit, tap(observe), forget, advance)


def ngram_step(
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    rng: Randomness,
    update: UpdateNgram,
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """`speculative_step` that teaches an n-gram storage what was committed. Lossless, with any drafter."""
    _complete(target, processor, observe)
    draft, verify, adjust = Draft(drafter, gamma), RejectTokens(target, processor, rng), Adjust(rng)
    stop, forget = StopWhen(until), PruneCache(_several(prune))
    calls("a stage that learns", "give UpdateNgram(storage)")("update", update)
    return lambda state: flow(state, draft, verify, adjust, stop, commit, tap(observe), forget, update, advance)


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
    _complete(target, processor, observe)
    draft, verify, adjust = Draft(drafter, gamma), MatchSamples(target, processor, noise), Adjust(noise)
    stop, forget = StopWhen(until), PruneCache(_several(prune))
    return lambda state: flow(state, draft, verify, adjust, stop, commit, tap(observe), forget, advance)


def tree_step(
    drafter: TreeDrafter,
    target: TreePredictor,
    processor: Processor,
    rng: Sampling,
    gamma: TreePolicy = Fixed(8),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """Draft a tree, let the target take a path through it, adjust, commit, prune. Lossless.

    `target` is a predictor's `read_tree`, or `path_by_path` over any predictor. With `SharedNoise` as `rng` the text of
    a seed is that of `autoregressive_step` with it. Source: Miao et al. 2305.09781 (SpecInfer).
    """
    _complete(target, processor, observe)
    draft, verify, adjust = DraftTree(drafter, gamma), VerifyTree(target, processor, rng), Adjust(rng)
    stop, forget = StopWhen(until), PruneCache(_several(prune))
    return lambda state: flow(state, draft, verify, adjust, stop, commit, tap(observe), forget, advance)


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
    _complete(target, processor, observe)
    draft, verify, adjust = Draft(drafter, gamma), RejectTokens(target, processor, rng), LossySkipAdjustment(rng)
    stop, forget = StopWhen(until), PruneCache(_several(prune))

    def end(adjusted: Adjusted) -> DecodeState | Finished:
        return flow(adjusted, stop, commit, tap(observe), forget, advance)

    return lambda state: flow(state, draft, verify, adjust).map(end)
