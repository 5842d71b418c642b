"""Fixtures of the edits' tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from family import Family, save_experts, save_family, save_requests


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Relatives of a tiny model; do not change them."""
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory, family: Family) -> tuple[Path, Path]:
    """Two models with fused experts, the second trained from the first; do not change them."""
    return save_experts(tmp_path_factory.mktemp("experts"), family.base)


@pytest.fixture(scope="session")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Options that name requests for the tiny models, and a cache of data sets of their own."""
    folder = tmp_path_factory.mktemp("requests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield save_requests(folder / "data")
