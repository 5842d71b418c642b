"""Fixtures of the edits' tests."""

import pytest
from family import Family, save_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Relatives of a tiny model; do not change them."""
    return save_family(tmp_path_factory.mktemp("family"))
