"""Every file of tests is in one lane, and what the lanes name is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lanes import PARTS, QUICK, SLOW, is_quick

FOLDER = Path(__file__).parent


def test_every_file_is_in_one_lane() -> None:
    lanes = [*QUICK, *PARTS, *SLOW]
    assert len(lanes) == len({*lanes})
    assert {path.stem.removeprefix("test_") for path in FOLDER.glob("test_*.py")} == {*lanes}


@pytest.mark.parametrize("file", PARTS)
def test_what_a_lane_names_is_there(file: str) -> None:
    text = (FOLDER / f"test_{file}.py").read_text()
    for test in PARTS[file]:
        name, _, _ = test.partition("[")
        assert f"\ndef {name}(" in text, test


def test_a_test_is_quick_by_its_file_its_name_or_its_name_with_parameters() -> None:
    assert is_quick("loop", "test_anything[3]")
    assert is_quick("laws", "test_observing_is_identity[compose1]")
    assert is_quick("certificate", "test_decoders_are_exact[suffix]")
    assert not is_quick("certificate", "test_decoders_are_exact[n-gram storage]")
    assert not is_quick("cli", "test_anything")
