"""A corpus on a real local cluster of two workers: each row once, its text that of one process, who dies or not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import Popen
from time import sleep
from typing import Any, Final
from uuid import uuid4

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

one_cluster = pytest.mark.xdist_group("ray")
"""For tests that share a cluster."""

ROOT: Final = Path(__file__).parent.parent

ROWS: Final[list[dict[str, Any]]] = [
    {"id": f"row {i}", "prompt": [3 + i % 5, 4, 5, 6 + i % 7][: 4 if i < 4 else 2 + i % 3]} for i in range(32)
]


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


@pytest.fixture(autouse=True)
def _patient() -> Iterator[None]:
    """A cluster that waits for what never comes fails the test: nothing hangs for ever."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("the cluster waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(400)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A local cluster, and its address: without a dashboard and statistics, and leaving nothing at home.

    Ray counts processors: two actors, one that knows the checkpoints, and one task that reads or writes.
    """
    if find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'specflow[ray]'")
    import ray  # noqa: PLC0415 - an extra

    context = ray.init(
        num_cpus=4,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        _memory=4 * 2**30,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield context.address_info["address"]
    ray.shutdown()


def decoded(make: Callable[[], DecodeRow]) -> dict[object, Tokens]:
    import ray.data  # noqa: PLC0415

    rows = ray.data.from_items(ROWS, override_num_blocks=8)
    compute = ray.data.ActorPoolStrategy(size=2)
    taken = rows.map_batches(Decode, fn_constructor_args=(make, 4), batch_size=4, compute=compute).take_all()
    return texts_of(taken)


def texts_of(taken: Sequence[dict[str, Any]]) -> dict[object, Tokens]:
    """The texts of rows, each of which has come once."""
    assert sorted(row["id"] for row in taken) == sorted(str(row["id"]) for row in ROWS)
    assert {row["reason"] for row in taken} == {"length limit"}
    return {row["id"]: tuple(map(int, row["output"])) for row in taken}


@one_cluster
@pytest.mark.usefixtures("cluster")
def test_two_workers_one_of_which_is_killed_in_the_middle(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    assert decoded(partial(build, SuffixDrafter, marker)) == expected()
    assert marker.exists()


FIRST: Final = {str(row["id"]) for row in ROWS[:12]}


def build_noting(folder: Path) -> DecodeRow:
    """What an actor does with a row: it is noted. While there is a file that says so, row 5 fails, and all but the
    first 12 wait."""
    decode = build(SuffixDrafter)

    def noted(name: object, prompt: Tokens) -> Finished:
        (folder / f"{name}, {uuid4()}").touch()
        while name not in FIRST and (folder / "stay").exists():
            sleep(0.1)
        if name == "row 5" and (folder / "stay").exists():
            raise OSError("for the moment")
        return decode(name, prompt)

    return noted


def written(folder: Path) -> None:
    """The corpus of `folder`, decoded into it but for what fails, going on where an earlier call was cut off."""
    import ray.data  # noqa: PLC0415
    from ray.data.checkpoint import CheckpointConfig  # noqa: PLC0415
    from ray.data.expressions import col  # noqa: PLC0415

    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig("id", str(folder / "done"), delete_checkpoint_on_success=False)
    try:
        rows = ray.data.read_parquet(str(folder / "prompts")).repartition(target_num_rows_per_block=4)
        make, compute = partial(build_noting, folder / "decoded"), ray.data.ActorPoolStrategy(size=2)
        decoded = rows.map_batches(Decode, fn_constructor_args=(make, 4), batch_size=4, compute=compute)
        decoded.filter(expr=col("reason").not_in(["error"])).write_parquet(str(folder / "texts"))
    finally:
        context.checkpoint_config = None


def noted_in(folder: Path) -> list[str]:
    return [path.name.partition(",")[0] for path in folder.glob("row*")]


DRIVER: Final = """
import sys
from pathlib import Path
import ray
from tests.test_ray import written
ray.init(sys.argv[1], log_to_driver=False)
written(Path(sys.argv[2]))
"""


@one_cluster
def test_after_a_kill_only_what_is_missing_is_decoded(cluster: str, tmp_path: Path) -> None:
    from pyarrow import Table, parquet  # noqa: PLC0415 - it comes with ray

    prompts, texts, notes = (tmp_path / name for name in ("prompts", "texts", "decoded"))
    prompts.mkdir()
    parquet.write_table(Table.from_pylist(ROWS), prompts / "rows.parquet")
    notes.mkdir()
    (notes / "stay").touch()
    with Popen([sys.executable, "-c", DRIVER, cluster, str(tmp_path)], cwd=ROOT) as driver:
        try:
            while len([path for path in (tmp_path / "done").glob("*") if "pending" not in path.name]) < 3:
                assert driver.poll() is None
                sleep(0.1)
        finally:
            driver.kill()
    assert {row["id"] for row in parquet.read_table(texts).to_pylist()} == FIRST - {"row 5"}
    for note in notes.iterdir():
        note.unlink()
    written(tmp_path)
    assert sorted(noted_in(notes)) == sorted({str(row["id"]) for row in ROWS} - FIRST | {"row 5"})
    assert texts_of(parquet.read_table(texts).to_pylist()) == expected()


# Without a cluster: it is a function of columns.


def columns(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """The columns of rows as Ray gives them: its prompts as arrays, in one of two dimensions where it can."""
    prompts = numpy.empty(len(rows), dtype=object)
    for i, row in enumerate(rows):
        prompts[i] = numpy.array(row["prompt"])
    others = {name: numpy.array([row[name] for row in rows]) for name in rows[0] if name != "prompt"}
    return {**others, "prompt": numpy.stack([*prompts]) if len({*map(len, prompts)}) == 1 else prompts}


def test_rows_keep_their_columns_and_get_their_texts() -> None:
    rows = columns([{**row, "more": i} for i, row in enumerate(ROWS)])
    told = Decode(partial(build, SuffixDrafter), slots=3)(rows)
    texts = expected()
    assert [tuple(map(int, output)) for output in told["output"]] == [texts[row["id"]] for row in ROWS]
    assert told["more"].tolist() == list(range(len(ROWS)))
    assert told["prompt"].tolist() == [row["prompt"] for row in ROWS]
    assert {type(text) for name in ("prompt", "output") for text in told[name]} == {list}
    four = Decode(partial(build, SuffixDrafter))(columns(ROWS[:4]))
    assert four["prompt"].tolist() == [row["prompt"] for row in ROWS[:4]]
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
