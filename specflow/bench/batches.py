"""`specflow bench --slots`: many texts at once, against one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from hashlib import blake2b
from statistics import median
from typing import TypeAlias, final

import torch
from attrs import asdict, evolve, frozen
from returns.result import safe
from rich.console import Console
from rich.table import Table

from specflow.batch import BatchPredictor, Failed, together
from specflow.bench.context import Context
from specflow.bench.decoders import PEERS, Decoder
from specflow.bench.measure import WARM_UP, Plan
from specflow.bench.peers import padded
from specflow.bench.prompts import Prompt
from specflow.bench.report import Absent, tell_absent
from specflow.bench.stopwatch import Stopwatch, clock_for
from specflow.errors import DecodeError, said, unwrap
from specflow.policies import CostMeter
from specflow.predictors import CachedPredictor
from specflow.processors import GreedyProcessor
from specflow.randomness import Dice
from specflow.state import Count, Tokens

All: TypeAlias = Callable[[], list[Tokens]]
"""Decodes all prompts: the new tokens of each."""


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
def in_batches(plan: Plan, decoder: Decoder, slots: int, meter: CostMeter) -> All:
    """A decoder over all prompts of a plan, `slots` at a time, whose passes `meter` is told of.

    `DecodeError` for a peer that reads one text.
    """
    model, name = plan.models.targets[decoder.model], decoder.label.rpartition("/")[2]
    if name == "generate":
        return lambda: padded(model, [unwrap(plan.state(prompt)) for prompt in plan.prompts], plan.processor, slots)
    if name.partition("@")[0] in PEERS:
        remedy = "leave it out, or --slots"
        raise DecodeError("decoders", "transformers' assisted decoding reads one text at a time", name, remedy)

    def decode() -> list[Tokens]:
        target = BatchPredictor(model, slots, meter=meter)
        shared = evolve(
            _context(plan, decoder, target), meter=meter, reading=cache(partial(BatchPredictor, slots=slots))
        )
        ends = dict(together([partial(_text, plan, decoder, shared, prompt) for prompt in plan.prompts], slots))
        return [_unfailed(ends[i]) for i in range(len(plan.prompts))]

    return decode


@safe(exceptions=(DecodeError,))
def warm_batches(plan: Plan, decoder: Decoder, slots: int) -> All:
    """The same after some short texts that are not measured, or what went wrong in them.

    What the meter hears is kept, as a decoder of single texts keeps it.
    """
    meter = CostMeter(plan.clock or clock_for(plan.models.targets[decoder.model]))
    short = evolve(plan, prompts=plan.prompts[:slots], max_new_tokens=min(WARM_UP, plan.max_new_tokens))
    try:
        unwrap(in_batches(short, decoder, slots, meter))()
    except DecodeError:
        raise
    except Exception as error:  # a user's decoder may raise anything
        happened = f"it failed in the warm-up ({said(error)})"
        raise DecodeError("decoders", happened, decoder.label, "see the cause") from error
    return unwrap(in_batches(plan, decoder, slots, meter))


def one_by_one(plan: Plan, decoder: Decoder) -> All:
    """The same decoder, one text after the other."""

    def decode() -> list[Tokens]:
        model = plan.models.targets[decoder.model]
        return [
            _text(plan, decoder, _context(plan, decoder, CachedPredictor(model)), prompt) for prompt in plan.prompts
        ]

    return decode


def turns(decoders: Mapping[str, All], plan: Plan) -> Iterator[Turn]:
    """Every decoder over all prompts, `plan.repeats` times; who goes first moves on."""
    clock, names = plan.clock or clock_for(plan.loaded.model), [*decoders]
    for repeat in range(plan.repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            texts = tuple(decoders[name]())
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


def _context(plan: Plan, decoder: Decoder, target: CachedPredictor | BatchPredictor) -> Context:
    model, watch = plan.models.targets[decoder.model], Stopwatch(plan.clock or clock_for(plan.loaded.model))
    tokenizer, assistant = plan.loaded.tokenizer, plan.models.assistant
    return Context(model, target, plan.processor, Dice(), tokenizer, (), assistant, watch)


def _text(plan: Plan, decoder: Decoder, shared: Context, prompt: Prompt) -> Tokens:
    """The text of one prompt, whose randomness is its own."""
    state = unwrap(plan.state(prompt))
    key = blake2b(f"{plan.seed}/{prompt.question_id}".encode(), digest_size=4).digest()
    rng = Dice(torch.Generator().manual_seed(int.from_bytes(key, "big")))
    output: list[int] = []

    def emit(tokens: Tokens, drafts: Count | None, /) -> None:
        output.extend(tokens)

    decoder.prepare(evolve(shared, prompt=state.tokens, rng=rng))(state, emit)
    return tuple(output)


def _unfailed(end: Tokens | Failed) -> Tokens:
    if isinstance(end, Failed):
        raise end.error
    return end
