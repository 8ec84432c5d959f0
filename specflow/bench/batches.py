"""`specflow bench --slots`: many texts at once, against one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from statistics import median
from typing import TypeAlias, final

import torch
from attrs import asdict, evolve, frozen
from returns.result import safe
from rich.console import Console
from rich.table import Table
from torch.nn import Module

from specflow.batch import BatchPredictor, Failed, together
from specflow.bench.context import Context
from specflow.bench.decoders import PEERS, Decoder
from specflow.bench.measure import UNMEASURED, Plan, warming
from specflow.bench.peers import padded
from specflow.bench.prompts import Prompt
from specflow.bench.report import Absent, tell_absent
from specflow.bench.stopwatch import Stopwatch, clock_for
from specflow.errors import DecodeError, unwrap
from specflow.interop.llama_cpp import LlamaCpp
from specflow.predictors import CachedPredictor
from specflow.processors import GreedyProcessor
from specflow.randomness import Dice
from specflow.state import Tally, Tokens

All: TypeAlias = Callable[[int], list[Tokens]]
"""Decodes all prompts, by the number of the repeat: the new tokens of each."""


@final
@frozen
class Turn:
    """All prompts by one decoder: the seconds that it took, and the texts."""

    decoder: str
    repeat: int
    seconds: float
    texts: tuple[Tokens, ...]

    @property
    def rate(self) -> float:
        """Tokens per second, those of prompts not counted and their passes timed."""
        return sum(map(len, self.texts)) / self.seconds


@safe(exceptions=(DecodeError,))
def in_batches(plan: Plan, decoder: Decoder, slots: int) -> All:
    """A decoder over all prompts of a plan, `slots` at a time, after some short texts that are not measured.

    What its meter hears in them is kept, as a decoder of single texts keeps it. `DecodeError` for a peer that reads one
    text, and for what went wrong in the short ones.
    """
    model, name = plan.models.targets[decoder.model], decoder.label.rpartition("/")[2]
    if name != "generate" and name.partition("@")[0] in PEERS:
        raise DecodeError("decoders", "the decoder reads one text at a time", name, "leave it out, or --slots")
    make = plan.models.engine(decoder.model).together(decoder.features, plan.clock, slots)

    def over(some: Plan) -> All:
        return (
            partial(_padded, some, model, slots) if name == "generate" else partial(_batch, some, decoder, slots, make)
        )

    with warming(decoder):
        over(evolve(plan.short, prompts=plan.prompts[:slots]))(UNMEASURED)
    return over(plan)


def one_by_one(plan: Plan, decoder: Decoder) -> All:
    """The same decoder, one text after the other."""

    def decode(repeat: int) -> list[Tokens]:
        engine = plan.models.engine(decoder.model)
        return [
            _text(
                plan,
                decoder,
                _context(plan, decoder, engine.reading(decoder.features, None)),
                prompt,
                repeat,
            )
            for prompt in plan.prompts
        ]

    return decode


def _batch(
    plan: Plan, decoder: Decoder, slots: int, make: Callable[[], BatchPredictor | LlamaCpp], repeat: int
) -> list[Tokens]:
    reading = cache(partial(BatchPredictor, slots=slots))
    shared = evolve(_context(plan, decoder, make()), reading=reading)
    ends = dict(together([partial(_text, plan, decoder, shared, prompt, repeat) for prompt in plan.prompts], slots))
    return [_unfailed(ends[i]) for i in range(len(plan.prompts))]


def _padded(plan: Plan, model: Module, slots: int, repeat: int) -> list[Tokens]:
    torch.manual_seed(plan.seed_of(plan.prompts[0], repeat))
    return padded(model, [unwrap(plan.state(prompt)) for prompt in plan.prompts], plan.processor, slots)


def turns(decoders: Mapping[str, All], plan: Plan) -> Iterator[Turn]:
    """Every decoder over all prompts, `plan.repeats` times; who goes first moves on."""
    clock, names = plan.clock or clock_for(plan.loaded.model), [*decoders]
    for repeat in range(plan.repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            texts = tuple(decoders[name](repeat))
            yield Turn(name, repeat, clock() - began, texts)


def show(plan: Plan, found: Sequence[Turn], absent: Sequence[Absent], slots: int, console: Console) -> None:
    """The turns as a table; what is divided by is the first decoder one by one, and in batches."""
    names = [*dict.fromkeys(turn.decoder for turn in sorted(found, key=lambda turn: turn.repeat))]
    alone, together = names[:2]
    table = Table(title=f"{slots} texts at a time (medians of ratios within a turn)")
    for heading in ("decoder", "tok/s", f"/ {alone}", f"/ {together}", "same text"):
        table.add_column(heading, justify="left" if heading == "decoder" else "right", overflow="fold")
    by = {(turn.decoder, turn.repeat): turn for turn in found}
    for name in names:
        mine = [turn for turn in found if turn.decoder == name]
        ratios = [
            median(turn.rate / by[base, turn.repeat].rate for turn in mine if (base, turn.repeat) in by)
            for base in (alone, together)
        ]
        pairs = [pair for turn in mine for pair in zip(turn.texts, by[alone, turn.repeat].texts, strict=True)]
        same = f"{sum(ours == theirs for ours, theirs in pairs)}/{len(pairs)}"
        rate = median(turn.rate for turn in mine)
        greedy = isinstance(plan.processor, GreedyProcessor)
        table.add_row(name, f"{rate:.1f}", *[f"{ratio:.2f}" for ratio in ratios], same if greedy else "")
    console.print(table)
    tell_absent(absent, console)


def to_json(found: Sequence[Turn], slots: int, facts: Mapping[str, str]) -> str:
    """All turns, with their texts; keys are the attributes' names."""
    return json.dumps({"facts": facts, "slots": slots, "turns": [asdict(turn) for turn in found]}, indent=1)


def _context(plan: Plan, decoder: Decoder, target: CachedPredictor | BatchPredictor | LlamaCpp) -> Context:
    model = plan.models.targets[decoder.model]
    watch = Stopwatch(plan.clock or clock_for(plan.loaded.model))
    tokenizer, assistant = plan.loaded.tokenizer, plan.models.assistant
    return Context(model, target, plan.processor, Dice(), tokenizer, (), assistant, watch, shared=plan.models.shared)


def _text(plan: Plan, decoder: Decoder, shared: Context, prompt: Prompt, repeat: int) -> Tokens:
    """The text of one prompt, whose randomness is its own."""
    state, rng = unwrap(plan.state(prompt)), Dice(torch.Generator().manual_seed(plan.seed_of(prompt, repeat)))
    output: list[int] = []

    def emit(tokens: Tokens, tally: Tally | None, /) -> None:
        output.extend(tokens)

    decoder.prepare(evolve(shared, prompt=state.tokens, rng=rng, repeat=repeat))(state, emit)
    return tuple(output)


def _unfailed(end: Tokens | Failed) -> Tokens:
    if isinstance(end, Failed):
        raise end.error
    return end
