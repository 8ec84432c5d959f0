"""Decodes on the device of `tests.far`, and prints how often each draft and each verification copied to the host."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import Final, TypeVar

import torch
from returns.pipeline import flow
from torch import Tensor

from specflow import (
    CachedPredictor,
    Categorical,
    DecodeError,
    DecodeState,
    Dice,
    Drafter,
    EachPrefix,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    MultinomialProcessor,
    Processor,
    Proposal,
    SharedNoise,
    SuffixDrafter,
    Tokens,
    autoregressive_step,
    chain,
    run,
    speculative_generate,
    speculative_step,
    start,
)
from specflow.constraints import Constrained, Grammar, MinLength
from specflow.distribution import Distribution, PointMass
from specflow.drafters import GreedyBlockDrafter, SampledBlockDrafter
from specflow.processors import LogitsProcessor
from specflow.randomness import Sampling, draws
from specflow.stages import Adjust, Block, Draft, Match, Reject, Verify, advance, commit
from specflow.state import Adjusted, Drafted
from specflow.steps import constrained_step
from tests.far import COPIES, Far, Remote
from tests.toys import disturbed, passes_of, tiny_llama

S = TypeVar("S", bound=Sampling)

PROMPT: Final = [3, 4, 5, 3, 4]
NEW: Final = 40
GAMMA: Final = 4
MODEL: Final = tiny_llama(3)
TARGET: Final = Remote(MODEL)
DRAFTING: Final = Remote(disturbed(MODEL, 1, 0.05))
"""One of each for all decoders: how a model is fed is tried once, and on this device that is slow."""
GREEDY: Final = GreedyProcessor()
SAMPLING: Final = MultinomialProcessor(1.0)
SHARP: Final = MultinomialProcessor(0.1)
"""What it samples repeats itself, so that a lookup is right at times."""


def counted(draft: Draft, verify: Verify[S], adjust: Adjust[S]) -> dict[str, object]:
    """The copies of each step but the first, in which the models find out how they are fed."""
    drafts: list[int] = []
    verifications: list[int] = []

    def drafting(state: DecodeState) -> Drafted:
        COPIES.clear()
        drafted = draft(state)
        drafts.append(len(COPIES))
        return drafted

    def verifying(drafted: Drafted) -> Adjusted:
        COPIES.clear()
        adjusted = adjust(verify(drafted))
        verifications.append(len(COPIES))
        return adjusted

    def step(state: DecodeState) -> DecodeState | Finished:
        return flow(state, drafting, verifying, commit, advance)

    end = run(step, start(PROMPT, NEW).unwrap()).state
    return {
        "drafts": drafts[1:],
        "verifications": verifications[1:],
        "text": list(end.output),
        "drafted": end.tally.drafted,
        "accepted": end.tally.accepted,
    }


def decoded(name: str) -> dict[str, object]:
    """What one decoder copies."""
    target, model = CachedPredictor(TARGET), CachedPredictor(DRAFTING)
    dice, noise = Dice(torch.Generator().manual_seed(7)), SharedNoise(7)
    greedy, sampled = GreedyBlockDrafter(model, GAMMA), SampledBlockDrafter(model, SAMPLING, dice, GAMMA)

    def rejecting(drafter: Drafter, processor: Processor) -> dict[str, object]:
        return counted(Draft(drafter, Fixed(GAMMA)), Verify(target, processor, Reject(dice)), Adjust(dice))

    def matching(drafter: Drafter, processor: Processor) -> dict[str, object]:
        return counted(Draft(drafter, Fixed(GAMMA)), Verify(target, processor, Match(noise)), Adjust[Sampling](noise))

    decoders: dict[str, Callable[[], dict[str, object]]] = {
        "greedy, by blocks": lambda: rejecting(greedy, GREEDY),
        "greedy, token by token": lambda: rejecting(LLMDrafter(model, GREEDY, dice), GREEDY),
        "greedy, suffix": lambda: rejecting(SuffixDrafter(), GREEDY),
        "greedy, a tree without branches": lambda: rejecting(LookupTree(branches=1), GREEDY),
        "greedy, a tree": lambda: rejecting(LookupTree(), GREEDY),
        "sampled, by blocks": lambda: rejecting(sampled, SAMPLING),
        "sampled, from greedy blocks": lambda: rejecting(greedy, SAMPLING),
        "sampled, token by token": lambda: rejecting(LLMDrafter(model, SAMPLING, dice), SAMPLING),
        "sampled, suffix": lambda: rejecting(SuffixDrafter(), SHARP),
        "sampled, block verification": lambda: counted(
            Draft(sampled, Fixed(GAMMA)), Verify(target, SAMPLING, Block(dice)), Adjust(dice)
        ),
        "seed-coupled": lambda: counted(
            Draft(SampledBlockDrafter(model, SAMPLING, noise, GAMMA), Fixed(GAMMA)),
            Verify(target, SAMPLING, Match(noise)),
            Adjust[Sampling](noise),
        ),
        "seed-coupled, a tree": lambda: matching(LookupTree(), SHARP),
    }
    return decoders[name]()


NAMES: Final = (
    "greedy, by blocks",
    "greedy, token by token",
    "greedy, suffix",
    "greedy, a tree without branches",
    "greedy, a tree",
    "sampled, by blocks",
    "sampled, from greedy blocks",
    "sampled, token by token",
    "sampled, suffix",
    "sampled, block verification",
    "seed-coupled",
    "seed-coupled, a tree",
)


def of_one_seed(policy: int) -> list[int]:
    """A sampled text with certain drafts, up to `policy` of them: none where it is 0."""
    target, dice = CachedPredictor(TARGET), Dice(torch.Generator().manual_seed(7))
    step = autoregressive_step(target, SHARP, dice)
    if policy:
        step = speculative_step(SuffixDrafter(), target, SHARP, dice, Fixed(policy))
    return list(run(step, start(PROMPT, NEW).unwrap()).state.output)


def after_some(most: int, ahead: bool) -> list[int]:
    """Up to `most` tokens of laws of which some are certain, drawn ahead or each for itself, and one more draw."""
    dice, rows = Dice(torch.Generator().manual_seed(7)), torch.full((3, 1000), 1 / 1000)
    a, b, c = [Categorical(Far(row)) for row in rows]
    laws: tuple[Distribution, ...] = (PointMass(3), a, b, PointMass(4), c)
    if ahead:
        with closing(draws(dice, laws, 0, range(len(laws)))) as drawing:
            tokens = [*islice(drawing, most)]
    else:
        tokens = [dice.draw(law, position) for position, law in enumerate(laws[:most])]
    return [*tokens, dice.draw(laws[-1], 9)]


def no_law() -> str:
    """What is said when a processor on the device leaves nothing that could be drawn."""
    target = CachedPredictor(TARGET)
    step = speculative_step(SuffixDrafter(), target, EachPrefix(masked), Dice())
    try:
        run(step, start(PROMPT, NEW).unwrap())
    except DecodeError as error:
        return str(error)
    return "nothing"


def dead_ends() -> list[int]:
    """How long the answers of a grammar are whose end a wish forbids: greedy and sampled, and the draft of a model."""
    answer = Grammar.regex("(a|b)cccc", (b"a", b"b", b"c", b""), stop=(3,)).after((2,))
    dice, lengths = Dice(torch.Generator().manual_seed(7)), []

    def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        return Far(torch.zeros(len(drafts) + 1, 4))

    for processor in (GREEDY, SAMPLING):
        law = MinLength(processor, 9, stop=(3,), begins=1)
        step = constrained_step(answer, lambda tokens: iter(chain((3,))), target, law, dice, Reject(dice))
        lengths.append(len(run(step, start((2,), 9, (3,)).unwrap()).state.output))
        lengths.append(len(list(LLMDrafter(target, Constrained(law, answer), dice)((2,)))))
    return lengths


def masked(prefix: Tokens, logits: Tensor) -> Distribution:
    """A grammar without a way on from the eighth token."""
    return Categorical(logits.softmax(-1) if len(prefix) < 8 else torch.zeros_like(logits))


def refused(processor: Processor, broken: int) -> str:
    """What is said when the target (0) or the drafter (1) computes NaN from the second step on."""
    models = tiny_llama(3), tiny_llama(3)
    dice = Dice(torch.Generator().manual_seed(7))
    target, model = [CachedPredictor(Remote(model)) for model in models]
    drafter: Drafter = GreedyBlockDrafter(model, GAMMA)
    if isinstance(processor, MultinomialProcessor):
        drafter = SampledBlockDrafter(model, processor, dice, GAMMA)
    draft, verify, adjust = Draft(drafter, Fixed(GAMMA)), Verify(target, processor, Reject(dice)), Adjust(dice)
    outcome = flow(start(PROMPT, NEW).unwrap(), draft, verify, adjust, commit, advance)
    assert isinstance(outcome, DecodeState)
    with torch.no_grad():
        dict(models[broken].named_parameters())["lm_head.weight"].fill_(torch.nan)
    try:
        flow(outcome, draft, verify, adjust)
    except DecodeError as error:
        return str(error).replace(f"position {len(outcome.tokens) - 1}", "the last position")
    return "nothing"


def generated(processor: LogitsProcessor) -> dict[str, object]:
    """The copies of `speculative_generate`, and the target's passes, once it has found out how the models are fed."""

    def text() -> list[int]:
        output, _ = speculative_generate(
            PROMPT, DRAFTING, TARGET, None, GAMMA, logits_processor=processor, eos_tokens_id=[], use_cache=True
        )
        return output

    text()
    fed = passes_of(TARGET)
    COPIES.clear()
    again = text()
    return {"copies": len(COPIES), "passes": len(fed), "text": again}


if __name__ == "__main__":
    found: dict[str, object] = {name: decoded(name) for name in NAMES}
    found["refused"] = [refused(processor, who) for processor in (GREEDY, SAMPLING) for who in (0, 1)]
    found["one seed"] = [of_one_seed(policy) for policy in (0, 1, 3, 9)]
    found["taken back"] = [[after_some(most, ahead) for most in range(6)] for ahead in (False, True)]
    found["no law"] = no_law()
    found["dead ends"] = dead_ends()
    found["generated"] = [generated(processor) for processor in (GREEDY, SAMPLING)]
    print(json.dumps(found))
