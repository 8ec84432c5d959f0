"""What specflow does on a device, in one command of a few minutes that needs no download.

    python -m benchmarks.device --out DIR                       # on CUDA, at most seven minutes after imports
    python -m benchmarks.device --out DIR --device cpu --tiny   # a minute or two: whether the command works

Models have random weights in published shapes, with fewer layers where they would not fit. Written are `device.json`,
with everything, and `device.md`, a page to read, anew after each table, so that a run that is cut short leaves what it
found. The parts run in the order of their worth, each within a share of the budget and in a process of its own; what
fails in one is told in its place, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import asdict

from benchmarks.device.found import Result, page
from benchmarks.device.models import Setup
from benchmarks.device.processes import carried_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out all parts; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where device.json and device.md go")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="the time for all of it")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short texts")
    options = parser.parse_args(arguments)
    setup = Setup(torch.device(options.device), options.tiny)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    for result in carried_out(setup, options.budget):
        results[result.part] = result
        found = {"tiny": setup.tiny, "device": str(setup.device), "parts": [asdict(each) for each in results.values()]}
        _write(options.out / "device.json", json.dumps(found, indent=1))
        _write(options.out / "device.md", page([*results.values()], setup))
        if result.ended:
            print(f"{result.part}: {result.seconds:.1f} s {result.error or ''}", flush=True)
    return int(any(result.error for result in results.values()))


def _write(path: Path, text: str) -> None:
    """Write a whole file, or leave the one that is there."""
    begun = path.with_suffix(".part")
    begun.write_text(text, encoding="utf-8")
    begun.replace(path)
