"""A trace as one page: HTML with its style, its drawings and its script in it, which asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from specflow.stages.fates import Fate
from specflow.trace.charts import acceptance, budget_of, progress
from specflow.trace.kinds import FORCED, Kind, kinds_of, legend_of, sources_of
from specflow.trace.parts import Origin, StepTrace
from specflow.trace.words import Piece, label, pieces, visible

if TYPE_CHECKING:
    from specflow.trace.trace import Trace

HERE: Final = Path(__file__).parent
HUES: Final = 6
"""How many sources have a colour of their own; the others share them again, and have a name."""

FATES: Final = list(Fate)
ORIGINS: Final = list(Origin)


def page(traces: Sequence[Trace]) -> str:
    """The page of one trace, or of two side by side."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sources = [source for source in sources_of(traces) if source != FORCED]
    hues = {source: f"s{i % HUES}" for i, source in enumerate(sources)} | {FORCED: "forced"}
    apart = _apart(traces)
    return environment.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        said=_said(traces, apart),
        shown=[_shown(trace, hues, number, apart) for number, trace in enumerate(traces)],
        rows=_compared(traces) if len(traces) > 1 else [],
    )


def _shown(trace: Trace, hues: Mapping[str, str], number: int, apart: int | None) -> dict[str, object]:
    everything = pieces(trace.tokens, trace.words)
    start = len(trace.prompt)
    return {
        "number": number,
        "title": visible(trace.about.get("title", f"trace {number + 1}")),
        "about": {visible(name): visible(fact) for name, fact in trace.about.items() if name != "title"},
        "ended": None if trace.reason is None else trace.reason.value,
        "numbers": _numbers(trace),
        "legend": [
            (_class(one.kind, hues), visible(one.name), visible(one.about), one.count) for one in legend_of(trace)
        ],
        "prompt": visible("".join([piece.text for piece in everything[:start]])),
        "prompt_tokens": start,
        "text": _text(trace, everything[start:], hues, apart),
        "acceptance": acceptance(trace.tally),
        "progress": progress([len(step.tokens) for step in trace.steps]),
        "budget": budget_of(trace.steps),
        "data": _embedded(_data(trace, hues)),
    }


def _class(kind: Kind, hues: Mapping[str, str]) -> str:
    origin, source = kind
    return hues[source] if origin is Origin.DRAFTED else origin.value


def _text(trace: Trace, shown: Sequence[Piece], hues: Mapping[str, str], apart: int | None) -> Markup:
    """A span for each token; no space between them, which would be shown."""
    begins = {0, *accumulate(len(step.tokens) for step in trace.steps)}
    spans = []
    for i, (piece, kind) in enumerate(zip(shown, kinds_of(trace), strict=True)):
        marks = {"b": i in begins, "p": piece.part, "d": i == apart}
        names = " ".join(["t", _class(kind, hues), *[name for name, holds in marks.items() if holds]])
        text = escape(visible(piece.text)).replace("\n", Markup('<i class="n"></i>\n'))
        spans.append(Markup('<span class="{}" data-i="{}" tabindex="{}">{}</span>').format(names, i, -(i > 0), text))
    return Markup().join(spans)


def _data(trace: Trace, hues: Mapping[str, str]) -> dict[str, object]:
    """What the script draws of a step."""
    sources = sources_of((trace,))
    ids = {*trace.output, *[draft.token for step in trace.steps for draft in step.drafts]}
    return {
        "words": {int(token): visible(label(token, trace.words)) for token in ids},
        "sources": [visible(source) for source in sources],
        "hues": [hues[source] for source in sources],
        "fates": [fate.value for fate in FATES],
        "origins": [origin.value for origin in ORIGINS],
        "steps": [_step(trace, step, sources) for step in trace.steps],
    }


def _step(trace: Trace, step: StepTrace, sources: Sequence[str]) -> list[object]:
    drafts = [
        [
            int(draft.token),
            int(draft.parent),
            _short(draft.q),
            _short(draft.p),
            FATES.index(draft.fate),
            sources.index(draft.source),
        ]
        for draft in step.drafts
    ]
    times = [_short(time) for time in (step.seconds, step.drafting, step.reading)]
    instead = visible("".join([piece.text for piece in pieces(step.rejected(), trace.words)]))
    origins = [ORIGINS.index(origin) for origin in step.origins]
    return [step.tokens, origins, [_short(margin) for margin in step.margins], times, drafts, instead]


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.6g}")


def _embedded(data: object) -> Markup:
    """JSON that nothing within a script element takes for its end, or for markup."""
    plain = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return Markup(plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _numbers(trace: Trace) -> list[tuple[str, str]]:
    tally, seconds = trace.tally, trace.seconds
    found = [("tokens", f"{len(trace.output)}"), ("passes of the target", f"{len(trace.steps)}")]
    found.append(("tokens a pass", f"{trace.mean_accepted_length:.2f}"))
    if tally.drafted:
        found.append(("drafts accepted", f"{tally.acceptance_rate:.0%} of {tally.drafted}"))
    if seconds:
        found += [("seconds", f"{seconds:.2f}"), ("tokens a second", f"{len(trace.output) / seconds:.1f}")]
    return found


def _compared(traces: Sequence[Trace]) -> list[tuple[str, list[str]]]:
    columns = [dict(_numbers(trace)) for trace in traces]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def _apart(traces: Sequence[Trace]) -> int | None:
    """Where two texts begin to differ, counted from the first new token."""
    if len(traces) == 1 or traces[0].output == traces[1].output:
        return None
    first, second = traces[0].output, traces[1].output
    common = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(common, min(len(first), len(second)))


def _said(traces: Sequence[Trace], apart: int | None) -> str:
    if len(traces) == 1:
        return ""
    prompts = "" if traces[0].prompt == traces[1].prompt else "Their prompts differ. "
    return prompts + ("Both texts are the same." if apart is None else f"The texts differ from token {apart + 1} on.")
