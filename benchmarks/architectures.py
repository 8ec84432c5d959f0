"""The table of architectures in `docs/models.md`, from what the models themselves do.

python -m benchmarks.architectures            # print it
python -m benchmarks.architectures --write    # put it into the page
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from transformers import DynamicCache
from transformers.utils import logging

from specflow import CachedPredictor
from specflow.testing import model_conformance
from tests.architectures import ARCHITECTURES, WINDOW, Architecture

PAGE: Final = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- python -m benchmarks.architectures --write -->\n", "<!-- end -->\n"


def holds(predictor: CachedPredictor) -> str:
    """The kinds of layers in a predictor's cache, in transformers' names."""
    if not predictor._memos._kept:
        return "nothing"
    past = predictor._memos._kept[0].past
    if not isinstance(past.cache, DynamicCache):
        return type(past.cache).__name__
    return ", ".join(sorted({_kind(layer).removesuffix("Layer") for layer in past.cache.layers}))


def _kind(layer: object) -> str:
    """transformers' name for a layer, also where ours stands in for it."""
    return next(kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("transformers."))


def row(architecture: Architecture) -> str:
    """One line of the table."""
    model = architecture.build()
    predictor = CachedPredictor(model)
    report = model_conformance(model, predictor=predictor, steps=40, longest=5 * WINDOW)
    assert report.holds, f"{architecture.kind}: {report}"
    kept = predictor._memos._kept
    back = "" if not kept else "checkpoints" if kept[0].past.needs_marks else "cropping"
    fed = predictor.feeding.name + (f": {architecture.why}" if architecture.why else "")
    precision = "fp64" if architecture.dtype == torch.float64 else "fp32"
    return f"| {architecture.kind} | {fed} | {holds(predictor)} | {back} | {precision} | {report.largest:.0e} |\n"


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| model type | fed | its cache holds | rolls back by | compared in | differs by |\n"
    yield "|---|---|---|---|---|---|\n"
    yield from map(row, sorted(ARCHITECTURES, key=lambda architecture: architecture.kind))


def main() -> None:
    """Prints the table, or writes it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    write: bool = parser.parse_args().write
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    text = "".join(table())
    if write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{text}{END}{rest.split(END)[1]}")
    else:
        print(text)


if __name__ == "__main__":
    main()
