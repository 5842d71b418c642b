"""Everything runs offline, on one thread a worker, with caches of its own."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with samples of real data and models; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no samples at {SHARED}")
    return SHARED
