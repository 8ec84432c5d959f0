"""The prebuilt steps: compositions of public stages and nothing else. Read one, copy it, rearrange it.

In all of them `observe` looks at each step before it stands, and `until` ends the text where it comes true. `gamma` is
a value unless another is given, 5 drafts at each step: a seed has one text, and where drafts fail it is slower than no
draft. `CostAware(target.meter)` drafts what pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from typing_extensions import TypeVar

from specflow.constraints import Constrained, Constraint, CutForbidden, Forced
from specflow.drafters import then
from specflow.errors import DecodeError
from specflow.guards.checks import a, calls, shown
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
    any_of,
    draft_nothing,
    ending,
    never,
    unobserved,
)
from specflow.state import Committed, Drafter, GammaPolicy, Predictor, Rule, Step

S = TypeVar("S", bound=Sampling)


def autoregressive_step(
    target: Predictor,
    processor: Processor,
    rng: Sampling,
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """One token of the target. The unit among steps: any lossless step has its law.

    `DecodeError`, here as in all of these, for parts that cannot be what they are given for.

    >>> from specflow import Dice, GreedyProcessor, run, start
    >>> from specflow.testing import TableModel
    >>> run(autoregressive_step(TableModel(5, seed=1), GreedyProcessor(), Dice()), start((0,), 6).unwrap()).state.output
    (4, 2, 4, 2, 2, 4)
    """
    verify, adjust, end = Verify(target, processor, Match(rng)), Adjust(rng), ending(until, observe)
    return lambda state: state.then(draft_nothing).then(verify).then(adjust).then(end)


def verified_step(
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    rng: S,
    rule: Rule[S],
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """Draft, score, judge by `rule`, adjust, commit, prune. Lossless where the rule is.

    `rng` draws the token after the drafts: fresh randomness, or under a rule that knows noise, such as `Match`, that.
    Drafts may be chains or trees.

    >>> from specflow import Block, Dice, GreedyProcessor, SuffixDrafter, run, start
    >>> from specflow.testing import TableModel
    >>> dice = Dice()
    >>> step = verified_step(SuffixDrafter(), TableModel(5, seed=1), GreedyProcessor(), dice, Block(dice))
    >>> run(step, start((0,), 6).unwrap()).state.output
    (4, 2, 4, 2, 2, 4)
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

    >>> from specflow import Dice, Fixed, GreedyProcessor, SuffixDrafter, run, start
    >>> from specflow.testing import TableModel
    >>> step = speculative_step(SuffixDrafter(), TableModel(5, seed=1), GreedyProcessor(), Dice(), Fixed(3))
    >>> end = run(step, start((0,), 6).unwrap())
    >>> end.state.output, end.state.tally.steps
    ((4, 2, 4, 2, 2, 4), 5)
    """
    return verified_step(drafter, target, processor, rng, Reject(rng), gamma, prune, observe, until)


def constrained_step(
    answer: Constraint,
    drafter: Drafter,
    target: Predictor,
    processor: Processor,
    rng: S,
    rule: Rule[S],
    gamma: GammaPolicy = Fixed(),
    prune: Iterable[Prunable] = (),
    observe: Observer = unobserved,
    until: Condition = never,
) -> Step:
    """`verified_step` for a text that obeys a grammar: `answer` is `grammar.after(prompt)`. Lossless where the rule is.

    The text has the law of `Constrained(processor, answer)`. What the grammar leaves no choice about is drafted first,
    and `drafter` goes on from there; drafts that the grammar forbids are not read by the target. The text ends where it
    is complete and nothing but its end is left, at a stop token, or at the limit.

    >>> from specflow import Dice, GreedyProcessor, SuffixDrafter, run, start
    >>> from specflow.constraints import Grammar
    >>> from specflow.testing import TableModel
    >>> answer, dice = Grammar.regex("(a|b)cccc", (b"a", b"b", b"c", b""), stop=(3,)).after((2,)), Dice()
    >>> step = constrained_step(answer, SuffixDrafter(), TableModel(4), GreedyProcessor(), dice, Reject(dice))
    >>> end = run(step, start((2,), 9, stop=(3,)).unwrap())
    >>> end.state.output[1:], end.state.tally.steps, answer.is_complete(end.state)
    ((2, 2, 2, 2), 2, True)
    """
    a(Constraint, "give grammar.after(prompt)")("answer", answer)
    calls("a drafter", "give a function of the tokens so far")("drafter", drafter)
    draft, cut = Draft(then(Forced(answer), drafter), gamma), CutForbidden(answer)
    verify, adjust = Verify(target, Constrained(processor, answer), rule), Adjust(rng)
    end = ending(any_of(until, answer.is_over), observe, PruneCache(_several(prune)))
    return lambda state: state.then(draft).then(cut).then(verify).then(adjust).then(end)


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
    """`speculative_step` that teaches a provider, by `UpdateNgram` or `Recycle`. Lossless, with any drafter.

    >>> from specflow import Dice, GreedyProcessor, NGramDrafter, NGramStorage, run, start
    >>> from specflow.stages import UpdateNgram
    >>> from specflow.testing import TableModel
    >>> storage = NGramStorage(2, 5)
    >>> learn = UpdateNgram(storage, filler_top_k=1)
    >>> step = ngram_step(NGramDrafter(storage), TableModel(5, seed=1), GreedyProcessor(), Dice(), learn)
    >>> run(step, start((0,), 2).unwrap()).state.output, [*storage.known((0,))]
    ((4, 2), [4, 2])
    """
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

    >>> from specflow import MultinomialProcessor, SharedNoise, SuffixDrafter, run, start
    >>> from specflow.drafters import propose_nothing
    >>> from specflow.testing import TableModel
    >>> def text(drafter):
    ...     step = seed_coupled_step(drafter, TableModel(5, seed=1), MultinomialProcessor(1.0), SharedNoise(3))
    ...     return run(step, start((0,), 8).unwrap()).state.output
    >>> text(SuffixDrafter()) == text(propose_nothing) == (1, 1, 0, 4, 3, 3, 2, 2)
    True
    """
    return verified_step(drafter, target, processor, noise, Match(noise), gamma, prune, observe, until)


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
