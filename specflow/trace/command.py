"""`specflow trace`: the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from specflow.errors import DecodeError
from specflow.files import can_be_written, save_text
from specflow.guards.checks import shown
from specflow.trace.file import to_json
from specflow.trace.trace import Trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("--html", type=Path, metavar="FILE", help="write a page that shows each step (docs/trace.md)")
    add("--json", type=Path, metavar="FILE", help="keep the trace, for --load")
    loaded = "show a trace that --json kept, instead of decoding; given twice, both side by side"
    add("--load", type=Path, action="append", default=[], metavar="FILE", help=loaded)


def main(args: argparse.Namespace, record: Callable[[], tuple[Trace, int]]) -> int:
    """Show a trace, and write it where it is wanted: one that `record` makes, with its exit code, or that was kept.

    `DecodeError` for what cannot be shown or written, before anything is decoded.
    """
    _check(args)
    traces, code = [Trace.load(path) for path in args.load], 0
    if not traces:
        trace, code = record()
        traces = [trace]
    _print(traces)
    first, *others = traces
    if args.json is not None:
        save_text(args.json, to_json(first))
    if args.html is not None:
        save_text(args.html, first.html(*others))
        print(f"the page is {args.html}", file=sys.stderr)
    return code


def _check(args: argparse.Namespace) -> None:
    if len(args.load) > 2:
        received = f"{len(args.load)} of them"
        raise DecodeError("load", "two traces are shown side by side", received, "give --load once or twice")
    if args.load and args.prompt is not None:
        received = f"{shown(args.prompt)} and --load {args.load[0]}"
        raise DecodeError("load", "a prompt and a trace are both given", received, "give one of them")
    if args.load and args.json is not None:
        raise DecodeError("json", "a trace that is loaded is kept already", str(args.json), "leave --json out")
    if args.html is not None and args.html == args.json:
        raise DecodeError("html", "the page and the trace are one file", str(args.html), "name two files")
    for name, path in (("html", args.html), ("json", args.json)):
        if path is not None and not can_be_written(path):
            raise DecodeError(name, "no file can be written there", shown(str(path)), "name a file in a folder")


def _print(traces: list[Trace]) -> None:
    """On the standard output; a reader of a pipe that has gone is the caller's."""
    console = Console()
    with console.capture() as text:  # rich would end the program there
        for trace in traces:
            if len(traces) > 1:
                console.rule(str(trace.about.get("title", "trace")))
            console.print(trace)
    print(text.get(), end="", flush=True)
