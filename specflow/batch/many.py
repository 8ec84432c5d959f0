"""Prompts in, finished texts out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from typing import Protocol, TypeAlias, TypeVar

import numpy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from specflow.batch.hub import Failed, together
from specflow.batch.predictor import BatchPredictor
from specflow.constraints import Constrained, Grammar
from specflow.drafters import IntersectionDrafter, LLMDrafter, SuffixDrafter
from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import a, calls, does, drafts, or_none, shown, whole
from specflow.guards.ids import stops_of
from specflow.loop import SPEC_NAMES, run, start
from specflow.policies import CostAware, CostMeter, meter_of
from specflow.policies.meter import Clock
from specflow.processors import GreedyProcessor, Processor
from specflow.protocols import Limits, checked_limits
from specflow.randomness import Dice, Sampling, SharedNoise
from specflow.stages import Match, Reject
from specflow.state import DecodeState, Drafter, Finished, Proposal, Rule, Step, Tokens
from specflow.steps import constrained_step, verified_step
from specflow.vocabulary import SharedTokens, shared_vocabulary

S = TypeVar("S", bound=Sampling)

Prompt: TypeAlias = Sequence[int] | Tensor | NDArray[numpy.integer]


class Metered(Protocol):
    """A predictor that tells what a text can take and what its passes do, as `BatchPredictor` and `LlamaCpp`."""

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        ...

    @property
    def meter(self) -> CostMeter:
        """What hears how long its passes take."""
        ...

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each of the n drafts."""
        ...


def seed_of(seed: int, number: int | str) -> int:
    """The seed of one text of several: it depends on `seed` and the text's number or name, and on nothing else.

    >>> seed_of(1, 0) == seed_of(1, 0), seed_of(1, 0) == seed_of(1, 1)
    (True, False)
    """
    whole(-sys.maxsize, "give a whole number")("seed", seed)
    return int.from_bytes(sha256(f"{seed}/{number}".encode()).digest()[:8], "big") >> 11  # JSON's readers keep 53 bits


def _nothing(number: int, end: Finished) -> None:
    """No progress is told."""


def generate_many(
    prompts: Iterable[Prompt],
    target: Module | Metered,
    drafter: Module | None = None,
    gamma: int = 10,
    logits_processor: Processor = GreedyProcessor(),
    max_gen_len: int = 40,
    eos_tokens_id: int | list[int] = 1,
    seed: int | None = None,
    slots: int = 8,
    progress: Callable[[int, Finished], object] = _nothing,
    clock: Clock | None = None,
    grammar: Grammar | None = None,
    shared: SharedTokens | None = None,
) -> list[Finished]:
    """The target's own text after each prompt, in the order of the prompts; up to `slots` are decoded at a time.

    Greedy text is that of each prompt alone, token for token (fp32, fp64); sampled text has the target's law, each text
    independently.

    prompts: rows of ids, each of at least one.
    target: a causal language model, or a predictor with as many slots, such as `LlamaCpp(file, slots=8)`.
    drafter: a smaller model; None drafts what repeats in the text itself.
    gamma: the most tokens that are drafted a step, 1 or more; how many pay in a batch is measured (`CostAware`).
    logits_processor: which law tokens are drawn from, and how.
    max_gen_len, eos_tokens_id: as in the spec's functions.
    seed: one text for a seed, a prompt and its number, whatever drafts it and whoever else is in the batch. None draws
        from torch's default generator.
    slots: how many texts are decoded at a time, 1 or more.
    progress: hears of each text that has ended, and of its number, as it ends.
    clock: seconds, to measure how many drafts pay; None measures on from what earlier calls measured. Where several
        processes share a target, all must hear the same, or they draft differently and their passes do not meet:
        `examples/tensor_parallel.py`. A predictor has a meter of its own, with its clock.
    grammar: what each text obeys after its prompt; it ends at `eos_tokens_id`, too. Texts are drafted with what it
        leaves no choice about. At the length limit a text may be incomplete: `grammar.after(prompt).is_complete`.
    shared: what the drafter's vocabulary and the target's have in common, `models.shared_tokens`; None where they are
        one, but for padding.

    `DecodeError` for anything else, before a model runs. What goes wrong in a text later is raised, with the number of
    its prompt in a note, once the others are unwound; `together` lets the others go on.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    >>> [len(end.state.output) for end in generate_many([[3, 4], [5]], model, max_gen_len=6, eos_tokens_id=[])]
    [6, 6]
    """
    or_none(a(Module, "give a model, or None"))("drafter", drafter)
    does("a logits processor", "give one, such as GreedyProcessor()", "laws")("logits_processor", logits_processor)
    drafts("gamma", gamma)
    whole(1, "decode one text at a time at least")("slots", slots)
    or_none(whole(-sys.maxsize, "give a whole number, or None"))("seed", seed)
    calls("a listener", "give a function of a number and a Finished")("progress", progress)
    or_none(a(Grammar, "give a Grammar, or None"))("grammar", grammar)
    or_none(a(SharedTokens, "give SharedTokens(…), or None for one vocabulary"))("shared", shared)
    rows = rows_of(prompts)
    slots = max(1, min(int(slots), len(rows)))  # what a pass over so many texts takes is what is measured
    predictor = _reading(target, slots, clock)
    stop = stops_of("eos_tokens_id", eos_tokens_id)
    states = states_of(rows, max_gen_len, stop, predictor.limits, SPEC_NAMES)
    if grammar is not None and grammar.stop != stop:
        happened, received = "the grammar ends at other tokens than the text", shown(sorted(grammar.stop))
        raise DecodeError("grammar", happened, received, "give both the same: the grammar's `stop` and eos_tokens_id")
    assistant = None if drafter is None else BatchPredictor(drafter, slots)
    if assistant is not None and shared is None:
        unwrap(shared_vocabulary(predictor.limits, assistant.limits))

    def judged(state: DecodeState, rng: S, rule: Rule[S]) -> Step:
        policy, answer = CostAware(predictor.meter, gamma), None if grammar is None else grammar.after(state.tokens)
        draft: Drafter = SuffixDrafter()
        law = logits_processor if answer is None else Constrained(logits_processor, answer)
        if assistant is not None and shared is not None:
            draft = IntersectionDrafter(assistant, shared, law, rng, assistant.limits.context)
        elif assistant is not None:
            draft = LLMDrafter.fitting(assistant, assistant.limits, predictor.limits, law, rng)
        if answer is None:
            return verified_step(draft, predictor, logits_processor, rng, rule, policy)
        return constrained_step(answer, draft, predictor, logits_processor, rng, rule, policy)

    def step(number: int, state: DecodeState) -> Step:
        if seed is None:
            dice = Dice()
            return judged(state, dice, Reject(dice))
        noise = SharedNoise(seed_of(seed, number))
        return judged(state, noise, Match(noise))

    def decode(number: int, state: DecodeState) -> Finished:
        return run(step(number, state), state)

    ends: dict[int, Finished] = {}
    with closing(together([partial(decode, *each) for each in enumerate(states)], slots)) as running:
        for number, end in running:
            if isinstance(end, Failed):
                end.error.add_note(f"in prompt {number} of {len(states)}")
                raise end.error
            ends[number] = end
            progress(number, end)
    return [ends[number] for number in range(len(states))]


def _reading(target: Module | Metered, slots: int, clock: Clock | None) -> Metered:
    """What reads a target. `DecodeError` for what is none."""
    if isinstance(target, Module):
        return BatchPredictor(target, slots, meter=meter_of(target, slots) if clock is None else CostMeter(clock))
    remedy = "give a model, such as AutoModelForCausalLM.from_pretrained makes, or a BatchPredictor, or a LlamaCpp"
    given: object = target
    limits, meter = getattr(given, "limits", None), getattr(given, "meter", None)
    if not (callable(given) and isinstance(limits, Limits) and isinstance(meter, CostMeter)):
        raise DecodeError("target", "the target is neither a model nor a predictor", shown(given), remedy)
    if clock is not None:
        remedy = "leave it out, or give the predictor a CostMeter(clock)"
        raise DecodeError("clock", "a predictor has a clock of its own", shown(clock), remedy)
    checked_limits(limits, "target")
    return target


def rows_of(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts in a list. `DecodeError` for one text, and for what holds none."""
    given: object = prompts
    if isinstance(given, str | bytes | Tensor) or not isinstance(given, Iterable):
        raise DecodeError("prompts", "prompts are no rows of ids", shown(given), "give a list of rows of ids")
    return list(prompts)


def states_of(
    prompts: Iterable[Prompt], max_new_tokens: int, stop: Iterable[int], limits: Limits, names: Mapping[str, str] = {}
) -> list[DecodeState]:
    """A state for each prompt. `DecodeError` with the number of the first that is none, and of a caller's `names`."""
    stop = list(stop) if isinstance(stop, Iterator) else stop  # it is read for each prompt
    states = []
    for number, prompt in enumerate(rows_of(prompts)):
        started = start(prompt, max_new_tokens, stop, limits)
        try:
            states.append(unwrap(started.alt(lambda error: error.renamed({**names, "prompt": "prompts"}))))
        except DecodeError as error:
            error.add_note(f"in prompt {number}")
            raise
    return states
