"""Tests of batches can fail: each refuses a mistake."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from specflow.batch import predictor, ragged
from specflow.batch.trial import reads_together
from specflow.predictors.reader import Reader
from tests.batch_mutants import MUTANTS, WINDOWED, BatchMutant, table
from tests.toys import tiny_llama

DOCS = Path(__file__).parent.parent / "docs" / "batches.md"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake)
def test_mistakes_are_refused(mutant: BatchMutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing is tried at first use, which would hide some of them: texts would be read one by one."""
    monkeypatch.setattr(predictor, "reads_together", lambda reader, over, *, trees: ragged.joins(reader))
    mutant.make(monkeypatch)
    with ThreadPoolExecutor(1) as apart:  # torch's modes, which some leave wrong, are those of a thread
        assert apart.submit(fails, mutant.test).result()


def fails(test: Callable[[], object]) -> bool:
    """Whether a test fails, by itself or by the error that it let through; what it left is unwound in this thread."""
    try:
        test()
    except (AssertionError, ArithmeticError, pytest.fail.Exception):
        failed = True
    else:
        failed = False
    gc.collect()
    return failed


READ_WRONGLY = [
    mutant
    for mutant in MUTANTS
    if mutant.function.__module__ == ragged.__name__ and "first rows of a shelf" not in mutant.mistake
]
"""All but one, as the texts of the trial have the first rows."""


@pytest.mark.parametrize("mutant", READ_WRONGLY, ids=lambda mutant: mutant.mistake)
def test_what_is_read_wrongly_is_noticed_at_first_use(mutant: BatchMutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.make(monkeypatch)
    plain, windowed = tiny_llama(0), WINDOWED.build()
    tried = [reads_together(Reader.of(model), over, trees=True) for model in (plain, windowed) for over in (0, 8)]
    assert not all(tried)


def test_without_a_mistake_nothing_is_noticed() -> None:
    for model in (tiny_llama(0), WINDOWED.build()):
        assert all(reads_together(Reader.of(model), over, trees=True) for over in (0, 8))


def test_the_documented_table_is_what_the_command_prints() -> None:
    assert table() in DOCS.read_text()
