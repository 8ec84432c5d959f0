"""A corpus on a real local cluster of two workers: each row once, its text that of one process, who dies or not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy
import pytest

from specflow import (
    DecodeError,
    Drafter,
    Finished,
    Fixed,
    MultinomialProcessor,
    SharedNoise,
    SuffixDrafter,
    Tokens,
    run,
    seed_coupled_step,
    start,
)
from specflow.batch import BatchPredictor, seed_of
from specflow.drafters import propose_nothing
from specflow.interop.ray import Decode, DecodeRow
from tests.toys import tiny_llama

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
"""Of ray's own."""

ROWS: Final[list[dict[str, Any]]] = [{"id": f"row {i}", "prompt": [3 + i % 5, 4, 5, 6 + i % 7]} for i in range(32)]


def nothing() -> Drafter:
    """No drafts. A drafter is made in the actor: those with a lock do not travel."""
    return propose_nothing


def build(drafter: Callable[[], Drafter], marker: Path | None = None) -> DecodeRow:
    """What an actor does with a row. The first that meets row 17 dies after it, if there is a marker to leave."""
    target = BatchPredictor(tiny_llama(0), 4)

    def decode(name: object, prompt: Tokens) -> Finished:
        noise = SharedNoise(seed_of(3, str(name)))
        step = seed_coupled_step(drafter(), target, MultinomialProcessor(1.5), noise, Fixed(4))
        end = run(step, start(prompt, 12).unwrap())
        if marker is not None and name == "row 17" and not marker.exists():
            marker.write_text("died")
            os._exit(1)
        return end

    return decode


def expected() -> dict[object, Tokens]:
    """The texts of one process, without drafts, one by one."""
    decode = build(nothing)
    return {row["id"]: decode(row["id"], tuple(row["prompt"])).state.output for row in ROWS}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    if find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'specflow[ray]'")
    ray = import_module("ray")
    folder = str(Path(__file__).parent.parent)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}},
    )
    yield ray
    ray.shutdown()


def decoded(cluster: Any, make: Callable[[], DecodeRow]) -> dict[object, Tokens]:  # noqa: ANN401 - ray, which is an extra
    rows = cluster.data.from_items(ROWS, override_num_blocks=8)
    taken = rows.map_batches(Decode, fn_constructor_args=(make, 4), batch_size=4, concurrency=2).take_all()
    assert sorted(row["id"] for row in taken) == sorted(str(row["id"]) for row in ROWS)
    assert {row["reason"] for row in taken} == {"length limit"}
    return {row["id"]: tuple(map(int, row["output"])) for row in taken}


def test_two_workers_one_of_which_is_killed_in_the_middle(cluster: Any, tmp_path: Path) -> None:  # noqa: ANN401
    marker = tmp_path / "died"
    assert decoded(cluster, partial(build, SuffixDrafter, marker)) == expected()
    assert marker.exists()


# Without a cluster: it is a function of columns.


def columns(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    return {name: numpy.array([row[name] for row in rows]) for name in rows[0]}


def test_rows_keep_their_columns_and_get_their_texts() -> None:
    rows = columns([{**row, "more": i} for i, row in enumerate(ROWS)])
    told = Decode(partial(build, SuffixDrafter), slots=3)(rows)
    texts = expected()
    assert [tuple(map(int, output)) for output in told["output"]] == [texts[row["id"]] for row in ROWS]
    assert told["more"].tolist() == list(range(len(ROWS)))
    for steps, accepted in zip(told["steps"].tolist(), told["accepted"].tolist(), strict=True):
        assert steps + accepted >= 12


def test_a_row_that_fails_leaves_the_others_theirs() -> None:
    prompts: list[object] = [[3, 4], [3, 10_000], None, [1.5, 2.7], [], [5, 6]]
    column = numpy.empty(len(prompts), dtype=object)
    column[:] = [None if prompt is None else numpy.array(prompt) for prompt in prompts]
    told = Decode(partial(build, SuffixDrafter))({"id": numpy.arange(len(prompts)), "prompt": column})
    assert [reason == "error" for reason in told["reason"]] == [False, True, True, True, True, False]
    assert "10000" in told["error"][1]
    assert all(": received " in error for error in told["error"][1:5])
    assert [len(output) for output in told["output"]] == [12, 0, 0, 0, 0, 12]


def test_no_rows_are_no_texts() -> None:
    told = Decode(partial(build, SuffixDrafter))({"id": numpy.array([]), "prompt": numpy.array([])})
    assert {name: len(column) for name, column in told.items()} == dict.fromkeys(told, 0)


def test_rows_without_the_columns_are_refused() -> None:
    with pytest.raises(DecodeError, match="no column 'prompt'"):
        Decode(partial(build, SuffixDrafter))({"id": numpy.array([1])})
    with pytest.raises(DecodeError, match="slots"):
        Decode(partial(build, SuffixDrafter), slots=0)
