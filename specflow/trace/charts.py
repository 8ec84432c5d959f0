"""The drawings of a trace's page that need no script: acceptance by position, tokens a pass, the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Final, final

from attrs import frozen

from specflow.state import Tally
from specflow.trace.parts import StepTrace

WIDTH: Final = 400.0
HEIGHT: Final = 120.0
MOST_BARS: Final = 20


@final
@frozen
class Bar:
    """A bar from the left edge `x`, `width` wide, and `height` high, all in units of the drawing."""

    x: float
    width: float
    height: float
    name: str
    value: str
    about: str


def acceptance(tally: Tally) -> list[Bar]:
    """For each position in the draft: how often a draft there was accepted, of the times that it was reached."""
    pairs = [*zip_longest(tally.judged_at, tally.accepted_at, fillvalue=0)][:MOST_BARS]
    wide = WIDTH / max(len(pairs), 5)
    bars = []
    for i, (judged, accepted) in enumerate(pairs):
        share = accepted / judged
        about = f"position {i + 1}: {accepted} accepted of {judged} reached"
        bars.append(Bar(i * wide + 0.12 * wide, 0.76 * wide, share * HEIGHT, f"{i + 1}", f"{100 * share:.0f}", about))
    return bars


@final
@frozen
class Progress:
    """Tokens of each pass as the points of an area, their running mean as those of a line, and the largest of them."""

    area: str
    line: str
    most: int
    steps: int
    window: int


def progress(tokens: Sequence[int]) -> Progress | None:
    """How many tokens each pass gave; None where there was none."""
    if not tokens:
        return None
    most, wide, window = max(1, *tokens), WIDTH / len(tokens), max(1, len(tokens) // 10)
    area, line = [f"0,{HEIGHT:g}"], []
    for i, count in enumerate(tokens):
        top = HEIGHT * (1 - count / most)
        area += [f"{i * wide:.2f},{top:.1f}", f"{(i + 1) * wide:.2f},{top:.1f}"]
        mean = fmean(tokens[max(0, i - window + 1) : i + 1])
        line.append(f"{(i + 0.5) * wide:.2f},{HEIGHT * (1 - mean / most):.1f}")
    return Progress(" ".join([*area, f"{WIDTH:g},{HEIGHT:g}"]), " ".join(line), most, len(tokens), window)


@final
@frozen
class Budget:
    """The mean time of a step in ms, by what took it, with its share in percent; `first` is that of the first step."""

    parts: tuple[tuple[str, float, float], ...]
    mean: float
    first: float | None


def budget_of(steps: Sequence[StepTrace]) -> Budget | None:
    """Where the time of a step goes; the first, which reads the prompt, is told apart. None where none was timed."""
    times = [(step.seconds, step.drafting or 0.0, step.reading) for step in steps]
    later = [(seconds, drafting, reading) for seconds, drafting, reading in times[1:] if seconds is not None]
    first = times[0][0] if times else None
    if not later:
        return None if first is None else Budget((), 0.0, 1e3 * first)
    mean = fmean([seconds for seconds, _, _ in later])
    named = {"steps": mean}
    if all(reading is not None for _, _, reading in later):
        drafting, reading = fmean([drafts for _, drafts, _ in later]), fmean([reads or 0.0 for _, _, reads in later])
        rest = max(0.0, mean - drafting - reading)
        named = {"drafting": drafting, "the target's pass": reading, "judging and the rest": rest}
    whole = sum(named.values()) or 1.0
    parts = tuple([(name, 1e3 * time, 100 * time / whole) for name, time in named.items()])
    return Budget(parts, 1e3 * mean, None if first is None else 1e3 * first)
