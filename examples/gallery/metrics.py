"""Metrics for Prometheus: its text format, from the tallies of finished texts."""

from __future__ import annotations

from collections.abc import Iterable

from specflow import Fixed, Step, SuffixDrafter, speculative_step
from specflow.state import Count, Tally
from specflow.testing import CASES, World, certify


def prometheus(tallies: Iterable[Tally]) -> str:
    """Counters of passes, and of drafts by source."""
    total = sum(tallies, Tally())
    lines = ["# TYPE specflow_target_passes_total counter", f"specflow_target_passes_total {total.steps}"]
    for name in ("drafted", "accepted"):
        lines.append(f"# TYPE specflow_{name}_tokens_total counter")
        for source, count in total.sources:
            number = {"drafted": count.drafted, "accepted": count.accepted}[name]
            lines.append(f'specflow_{name}_tokens_total{{source="{source}"}} {number}')
    return "\n".join([*lines, ""])


def decoder(world: World) -> Step:
    """Any step counts what it does."""
    return speculative_step(SuffixDrafter(), world.target, world.processor, world.rng, Fixed(2))


def check() -> None:
    """Exact; and the counters are those of the texts."""
    certify(decoder, cases=CASES[:2])
    looked_up = Count(drafted=5, accepted=3)
    text = prometheus([Tally(3, (("suffix", looked_up),)), Tally(4, (("suffix", looked_up), ("llm", Count(2, 1))))])
    assert "specflow_target_passes_total 7\n" in text
    assert 'specflow_accepted_tokens_total{source="suffix"} 6\n' in text
