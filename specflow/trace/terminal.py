"""A trace on a terminal: the text in colours, what they mean, and the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from specflow.trace.kinds import FORCED, Kind, kinds_of, legend_of, sources_of
from specflow.trace.parts import Origin
from specflow.trace.words import pieces, visible

if TYPE_CHECKING:
    from specflow.trace.trace import Trace

ORIGINS: Final = {Origin.CORRECTED: "bold red underline", Origin.BONUS: "cyan", Origin.DRAWN: ""}
SOURCES: Final = ("green", "bright_blue", "magenta", "bright_green", "bright_cyan", "bright_magenta")


def rendered(trace: Trace) -> Iterator[RenderableType]:
    """What to print, from top to bottom."""
    sources = [source for source in sources_of((trace,)) if source != FORCED]

    def style(kind: Kind) -> str:
        origin, source = kind
        if origin is not Origin.DRAFTED:
            return ORIGINS[origin]
        return "yellow" if source == FORCED else SOURCES[sources.index(source) % len(SOURCES)]

    text = Text()
    shown = pieces(trace.tokens, trace.words)[len(trace.prompt) :]
    for piece, kind in zip(shown, kinds_of(trace), strict=True):
        text.append(visible(piece.text), style(kind))
    yield text
    table = Table(box=None, show_header=False, pad_edge=False)
    for one in legend_of(trace):
        table.add_row(Text(str(one.count), justify="right"), Text(visible(one.name), style(one.kind)), one.about)
    yield Text()
    yield table
    yield Text(str(trace), "bold")
