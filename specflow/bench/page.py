"""The report as one HTML file that opens offline: its plots are SVG within the page, and it has no scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specflow.bench.report import Report, accepted_text, interval_text, positions_text
from specflow.bench.summary import Split

TEMPLATE: Final = Path(__file__).with_name("page.html")


def to_html(report: Report) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"interval": interval_text, "accepted": accepted_text, "positions": positions_text}
    plots = {
        "How much faster, prompt by prompt": _plot(report, _ratios),
        "Where the decoding time goes": _plot(report, _split),
        "Acceptance by position in the draft": _plot(report, _acceptance),
        "What a target pass costs": _plot(report, _costs),
    }
    categories = list(dict.fromkeys(run.category for run in report.runs))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report, against=report.against(report.baseline), plots=plots, categories=categories
    )


def _plot(report: Report, draw: Callable[[Report, Axes], object]) -> Markup:
    figure = Figure(figsize=(8, 1.6 + 0.35 * max(6, len(report.summaries))), layout="constrained")
    draw(report, figure.subplots())
    image = StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(image, format="svg")
    svg = image.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _ratios(report: Report, axes: Axes) -> None:
    against = report.against(report.baseline)
    for row, versus in enumerate(against.values()):
        ratios = list(versus.ratios.values())
        axes.scatter(ratios, [row] * len(ratios), s=14, alpha=0.4, color="tab:blue")
        axes.plot([versus.decode.low, versus.decode.high], [row, row], linewidth=5, color="tab:orange", alpha=0.7)
        axes.scatter([versus.decode.median], [row], marker="|", s=250, color="black")
    axes.axvline(1.0, linewidth=1, color="grey")
    axes.set_yticks(range(len(against)), list(against))
    axes.invert_yaxis()
    axes.set_xlabel(f"decoding speed / {report.baseline} (dots: prompts; bar: 95 % interval of the median)")


def _split(report: Report, axes: Axes) -> None:
    shown = [(one.decoder, one.split) for one in report.summaries if one.split is not None]
    labels, left = [label for label, _ in shown], [0.0] * len(shown)
    parts: Mapping[str, Callable[[Split], float]] = {
        "target": lambda split: split.target,
        "drafting": lambda split: split.drafting,
        "own": lambda split: split.own,
    }
    for part, share in parts.items():
        shares = [100 * share(split) for _, split in shown]
        axes.barh(labels, shares, left=left, label=part)
        left = [sum(pair) for pair in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("% of the decoding time")
    axes.legend(loc="lower left")


def _acceptance(report: Report, axes: Axes) -> None:
    for one in report.summaries:
        shares = one.tally.acceptance_by_position
        if shares:
            places = range(1, len(shares) + 1)
            axes.plot(places, [100 * share for share in shares], marker="o", label=one.decoder)
            axes.legend()
    axes.set_ylim(0, 105)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted, % of those reached")


def _costs(report: Report, axes: Axes) -> None:
    for model, costs in report.costs.items():
        axes.plot(list(costs), [1e3 * seconds for seconds in costs.values()], marker="o", label=model)
    axes.legend()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens fed to one pass")
    axes.set_ylabel("ms (median)")
