"""The command for devices carries out all of its parts here, on a CPU with tiny models; no device has run it yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import device


def test_every_part_is_carried_out_and_texts_with_drafts_are_the_plain_ones(tmp_path: Path) -> None:
    assert device.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"]) == 0
    found = json.loads((tmp_path / "device.json").read_text("utf-8"))
    assert [part["part"] for part in found["parts"] if part["error"] or not part["tables"]] == []
    page = (tmp_path / "device.md").read_text("utf-8")
    assert [part["part"] for part in found["parts"] if part["part"] not in page] == []
    conforming = next(part for part in found["parts"] if part["part"].startswith("Conformance"))
    exact = [table for table in conforming["tables"] if "float32" in table["title"]]
    assert len(exact) >= 4
    for table in exact:
        for row in table["rows"]:
            told = dict(zip(table["columns"], row, strict=True))
            assert told["holds"] is True, told
            assert {told[name] for name in ("drafts", "tree", "first layers", "fresh")} == {"same"}, told


def test_what_fails_is_told_in_its_place_and_the_next_part_runs() -> None:
    def failing(setup: device.Setup) -> Iterator[device.Table]:
        yield device.Table("begun", ("a",), ((1,),))
        raise ValueError("no such thing")

    setup = device.Setup(torch.device("cpu"), tiny=True)
    failed, after = device.carried_out(setup, 60.0, (("Wrong", failing, 0.5), ("Where", device.where, 0.5)))
    assert failed.error is not None
    assert "no such thing" in failed.error
    assert [table.title for table in failed.tables] == ["begun"]
    assert after.error is None
    assert after.tables
