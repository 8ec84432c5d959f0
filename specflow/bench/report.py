"""The results as one value, as tables on the terminal, and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, final

import torch
from attrs import asdict, frozen
from rich.console import Console
from rich.table import Table

from specflow.bench.measure import Plan, Run
from specflow.bench.summary import (
    Comparison,
    Identity,
    Interval,
    Summary,
    compare,
    costs_by_size,
    identity,
    pass_costs,
    summarise,
)
from specflow.commands import processor_name, version_of
from specflow.processors import GreedyProcessor
from specflow.state import Tally, Tokens

SHOWN_POSITIONS: Final = 8


@final
@frozen
class Absent:
    """A decoder that was asked for and could not run, and why."""

    decoder: str
    reason: str


@final
@frozen
class Report:
    """What was measured. `comparisons` holds every pair; `identities` are against `baseline`, greedy only."""

    facts: Mapping[str, str]
    baseline: str
    summaries: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...]
    identities: Mapping[str, Identity]
    costs: Mapping[str, Mapping[int, float]]
    absent: tuple[Absent, ...]
    runs: tuple[Run, ...]

    def against(self, baseline: str) -> dict[str, Comparison]:
        """Each decoder's comparison with one baseline."""
        return {one.decoder: one for one in self.comparisons if one.baseline == baseline}


def build(plan: Plan, runs: Sequence[Run], baseline: str, absent: Iterable[Absent], facts: Mapping[str, str]) -> Report:
    """The report on `runs` of `plan`; decoders without a run are left out of it."""
    ran = {run.decoder for run in runs}
    models = {one.label: one.model for one in plan.decoders if one.label in ran}
    costs = pass_costs(runs, models)
    pairs = [(decoder, other) for decoder in models for other in models if decoder != other]
    comparisons = [compare(runs, decoder, other) for decoder, other in pairs]
    return Report(
        facts,
        baseline,
        tuple([summarise(runs, label, model, costs) for label, model in models.items()]),
        tuple([comparison for comparison in comparisons if comparison is not None]),
        _identities(plan, runs, models, baseline),
        {model or "model": costs_by_size(costs, model) for model in dict.fromkeys(models.values())},
        tuple(absent),
        tuple(runs),
    )


def _identities(plan: Plan, runs: Sequence[Run], models: Mapping[str, str], baseline: str) -> dict[str, Identity]:
    if baseline not in models or not isinstance(plan.processor, GreedyProcessor):
        return {}
    engine = plan.models.engine(models[baseline])
    prompts = {prompt.question_id: prompt for prompt in plan.prompts}

    def margin(question_id: int, output: Tokens) -> float:
        text = plan.state(prompts[question_id]).unwrap().tokens + output
        best, second = engine.row(text).float().topk(2).values.tolist()
        return float(best - second)

    return {label: identity(runs, label, baseline, margin) for label in models if label != baseline}


def to_json(report: Report) -> str:
    """The whole report, every round of every run included; keys are the attributes' names."""
    return json.dumps(asdict(report), indent=1, ensure_ascii=False)


def show(report: Report, console: Console) -> None:
    """The report as tables."""
    for table in (_speed(report), _effort(report)):
        console.print(table)
    for decoder, same in report.identities.items():
        if same.differences:
            margins = sorted(one.margin for one in same.differences)
            console.print(
                f"{decoder}: {len(same.differences)} of {same.compared} texts differ from {report.baseline}'s; "
                f"margin between the two best logits there: {margins[0]:.3g} to {margins[-1]:.3g}"
            )
    tell_absent(report.absent, console)


def tell_absent(absent: Iterable[Absent], console: Console) -> None:
    """Which decoders did not run, and why."""
    for one in absent:
        console.print(f"absent: {one.decoder}: {one.reason}", style="yellow", markup=False, emoji=False)


def _speed(report: Report) -> Table:
    table = Table(title=f"Speed, against {report.baseline} (medians over prompts, 95 % intervals)")
    _columns(table, "decoder", "tok/s", "ratio", "worst", "tok/s", "ratio", "first", "tokens", "same")
    table.add_row("", "decoding", "decoding", "prompt", "in all", "in all", "s", "a pass", "text", style="dim")
    against = report.against(report.baseline)
    for one in report.summaries:
        versus, same = against.get(one.decoder), report.identities.get(one.decoder)
        table.add_row(
            one.decoder,
            "" if one.decode_rate is None else f"{one.decode_rate:.1f}",
            interval_text(versus.decode) if versus else "1",
            f"{versus.decode.worst:.2f} ({versus.decode.worst_prompt})" if versus else "",
            f"{one.total_rate:.1f}",
            interval_text(versus.total) if versus else "1",
            f"{one.first_round_seconds:.2f}",
            f"{one.tokens_per_pass:.2f}",
            f"{same.equal}/{same.compared}" if same else "",
        )
    return table


def _effort(report: Report) -> Table:
    table = Table(title="Where the decoding time goes, and what becomes of the drafts")
    _columns(table, "decoder", "target", "drafting", "own", "own µs/step", "achieved", "accepted", "by position, %")
    table.columns[-1].justify = "left"
    for one in report.summaries:
        split = one.split
        table.add_row(
            one.decoder,
            *([f"{100 * share:.1f} %" for share in (split.target, split.drafting, split.own)] if split else [""] * 3),
            f"{split.own_microseconds:.0f}" if split else "",
            "" if one.achieved is None else f"{one.achieved:.2f}",
            accepted_text(one.tally),
            positions_text(one.tally, SHOWN_POSITIONS),
        )
    return table


def _columns(table: Table, *headings: str) -> None:
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "decoder" else "right", overflow="fold")


def interval_text(interval: Interval) -> str:
    """`1.21 (1.15-1.30)`."""
    return f"{interval.median:.2f} ({interval.low:.2f}-{interval.high:.2f})"


def accepted_text(tally: Tally) -> str:
    """Accepted drafts of those that were judged, `35/70`; nothing where none was."""
    return f"{tally.accepted}/{tally.drafted}" if tally.drafted else ""


def positions_text(tally: Tally, shown: int | None = None) -> str:
    """The acceptance at each of the first positions, in percent: `62 80 91`."""
    return " ".join([f"{100 * share:.0f}" for share in tally.acceptance_by_position[:shown]])


def facts_of(plan: Plan, name: str) -> dict[str, str]:
    """What a reader must know about a measurement of the model called `name`: machine, versions, settings."""
    model = plan.loaded.model
    processor = plan.processor
    law = "greedy" if isinstance(processor, GreedyProcessor) else f"temperature {processor.temperature:g}"
    versions = [f"{name} {version_of(name) or '(not installed)'}" for name in ("specflow", "torch", "transformers")]
    return {
        "model": f"{name}, {str(model.dtype).removeprefix('torch.')}",
        "prompts": f"{len(plan.prompts)} in {len({prompt.category for prompt in plan.prompts})} categories, "
        f"cut to {plan.max_prompt_tokens} tokens",
        "tokens": f"{plan.max_new_tokens} new at most, {law}",
        "repeats": str(plan.repeats),
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads, {model.device}",
        "versions": ", ".join((f"Python {platform.python_version()}", *versions)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
