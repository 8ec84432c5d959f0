"""Fixtures of all tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from specflow.models import INSTALL, Loaded, load, smollm2_is_installed

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # else each of them would want all cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from one random state, so that a failure can be repeated alone."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Loaded:
    """The real model in fp32."""
    if not smollm2_is_installed():
        pytest.skip(f"SmolLM2 is not installed; run `{INSTALL}`")
    return load("smollm2", "float32").unwrap()
