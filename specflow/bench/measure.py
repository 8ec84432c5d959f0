"""Run decoders over prompts, interleaved, and keep what every round of every text took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, final

import torch
from attrs import define, evolve, field, frozen
from returns.result import safe

from specflow.batch import seed_of
from specflow.bench.context import Context
from specflow.bench.decoders import Decoder, Models
from specflow.bench.prompts import Prompt
from specflow.bench.stopwatch import Pass, Stopwatch, clock_for
from specflow.errors import DecodeError, said, unwrap
from specflow.loop import start
from specflow.models import Loaded
from specflow.policies.meter import Clock
from specflow.predictors import limits_of
from specflow.processors import LogitsProcessor
from specflow.randomness import Dice
from specflow.stages.commit import tally_of
from specflow.state import DecodeState, Tally, Tokens


@final
@frozen
class Round:
    """One step of a text: the tokens it added, what it counted, and where its time went."""

    tokens: int
    tally: Tally
    passes: tuple[Pass, ...]
    drafting: float
    seconds: float

    @property
    def target(self) -> float:
        """Seconds in the target's passes."""
        return sum(one.seconds for one in self.passes)

    @property
    def own(self) -> float:
        """Seconds that went neither into the target nor into drafting."""
        return self.seconds - self.target - self.drafting


@final
@frozen
class Run:
    """One text by one decoder. The first round holds the prefill; `seconds` is from the call to its return."""

    decoder: str
    question_id: int
    category: str
    repeat: int
    prompt_tokens: int
    output: Tokens
    rounds: tuple[Round, ...]
    seconds: float

    def rate(self) -> float:
        """Tokens per second, prefill included."""
        return len(self.output) / self.seconds

    def decode_rate(self) -> float | None:
        """Tokens per second after the first round, in which the prompt is read. None for a text of one round."""
        later = self.rounds[1:]
        return sum(one.tokens for one in later) / sum(one.seconds for one in later) if later else None


@final
@frozen(eq=False)
class Plan:
    """What to measure: prompts × decoders, greedy unless `processor` samples."""

    loaded: Loaded
    models: Models
    decoders: tuple[Decoder, ...]
    prompts: tuple[Prompt, ...]
    processor: LogitsProcessor
    max_new_tokens: int = 128
    max_prompt_tokens: int = 1024
    repeats: int = 1
    seed: int = 0
    clock: Clock | None = None
    """Seconds; by default a clock that waits for the model's device."""

    @property
    def texts(self) -> int:
        """How many texts will be decoded, those of the warm-up not counted."""
        return len(self.prompts) * self.repeats * len(self.decoders)

    @property
    def short(self) -> Plan:
        """The same of texts as short as a warm-up's."""
        return evolve(self, max_new_tokens=min(WARM_UP, self.max_new_tokens))

    @safe(exceptions=(DecodeError,))
    def state(self, prompt: Prompt) -> DecodeState:
        """Where the decoding of a prompt starts. Of a prompt that is too long, the end is kept."""
        ids = self.loaded.chat(prompt.text)[-self.max_prompt_tokens :]
        return unwrap(start(ids, self.max_new_tokens, self.loaded.stop, limits_of(self.loaded.model)))

    def seed_of(self, prompt: Prompt, repeat: int) -> int:
        """The seed of a text, the same for all decoders."""
        return seed_of(self.seed, f"{prompt.question_id}/{repeat}")


WARM_UP: Final = 16
"""Tokens that each decoder writes, unmeasured, before the first measurement."""

UNMEASURED: Final = -1
"""The repeat of a warm-up: what a decoder learns in it, it does not know when it is measured."""


@safe(exceptions=(DecodeError,))
def warmed_up(plan: Plan, decoder: Decoder) -> Decoder:
    """The decoder after a short text that is not measured, or what went wrong in it."""
    prompt, short = plan.prompts[0], plan.short
    state = unwrap(short.state(prompt))
    with warming(decoder):
        run_one(short, decoder, prompt, state, UNMEASURED)
    return decoder


@contextmanager
def warming(decoder: Decoder) -> Iterator[None]:
    """A warm-up. Whatever a user's decoder raises in it, it is a `DecodeError` that says so."""
    try:
        yield
    except Exception as error:
        happened = f"it failed in the warm-up ({said(error)})"
        raise DecodeError("decoders", happened, decoder.label, "see the cause") from error


def measure(plan: Plan) -> Iterator[Run]:
    """Every prompt by every decoder, `repeats` times, each a series by itself. Refused prompts raise their errors.

    The decoders take turns on each prompt, and who goes first moves on, so that what else the machine does
    affects all of them alike.
    """
    turn = 0
    for prompt in plan.prompts:
        state = unwrap(plan.state(prompt))
        for repeat in range(plan.repeats):
            first = turn % len(plan.decoders)
            for decoder in plan.decoders[first:] + plan.decoders[:first]:
                yield run_one(plan, decoder, prompt, state, repeat)
            turn += 1


def run_one(plan: Plan, decoder: Decoder, prompt: Prompt, state: DecodeState, repeat: int) -> Run:
    """One text, measured. Its randomness depends on the plan's seed, the prompt and the repeat, not on the decoder."""
    model, engine = plan.models.targets[decoder.model], plan.models.engine(decoder.model)
    stopwatch = Stopwatch(plan.clock or clock_for(model))
    torch.manual_seed(plan.seed_of(prompt, repeat))
    target, assistant = engine.reading(decoder.features, plan.clock), plan.models.assistant
    context = Context(
        model,
        target,
        plan.processor,
        Dice(),
        plan.loaded.tokenizer,
        state.tokens,
        assistant,
        stopwatch,
        shared=plan.models.shared,
        assistant_tokenizer=plan.models.assistant_tokenizer,
        repeat=repeat,
    )
    session = decoder.prepare(context)
    with engine.watching(stopwatch):
        began = stopwatch.clock()
        recorder = _Recorder(stopwatch, len(state.tokens), state.tally, began)
        session(state, recorder)
        seconds = stopwatch.clock() - began
    text = tuple(recorder.output), tuple(recorder.rounds)
    return Run(decoder.label, prompt.question_id, prompt.category, repeat, len(state.tokens), *text, seconds)


@final
@define(eq=False)
class _Recorder:
    """An `Emit` that closes a round at each call."""

    stopwatch: Stopwatch
    uncovered: int
    counted: Tally
    since: float
    output: list[int] = field(init=False, factory=list)
    rounds: list[Round] = field(init=False, factory=list)
    _passes: int = field(init=False, default=0)
    _drafting: float = field(init=False, default=0.0)

    def __call__(self, tokens: Tokens, tally: Tally | None, /) -> None:
        now = self.stopwatch.clock()
        passes = tuple(self.stopwatch.passes[self._passes :])
        if tally is None:
            tally = self.counted + _chain(passes, self.uncovered, len(tokens))
        drafting = self.stopwatch.drafting - self._drafting
        self.rounds.append(Round(len(tokens), tally - self.counted, passes, drafting, now - self.since))
        self.output += tokens
        self.uncovered, self.counted = 1, tally
        self._passes, self._drafting = len(self.stopwatch.passes), self.stopwatch.drafting
        self.since = self.stopwatch.clock()


def _chain(passes: Sequence[Pass], uncovered: int, tokens: int) -> Tally:
    """The tally of a step of somebody else's decoder, which drafts chains and counts nothing.

    Of what its passes were fed, all but the `uncovered` text were drafts; one of the new tokens came of none.
    """
    drafted = sum(one.fed for one in passes) - uncovered
    accepted = min(drafted, tokens - 1)
    return tally_of([""] * drafted, range(accepted), tokens, drafted > accepted)
