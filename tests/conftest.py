"""Everything runs offline, on one thread a worker, with caches of its own."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from paths import SHARED

if TYPE_CHECKING:
    from tiny import Project
    from warm import Warm

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with samples of real data and models; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no samples at {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Project"]:
    """A tiny model with SAEs and data, and a cache of data sets of its own."""
    from tiny import make_project

    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield make_project(folder)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Warm"]:
    """Runs commands in forks of one process, which saves the time of imports."""
    from warm import Warm

    warm = Warm(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.end()
