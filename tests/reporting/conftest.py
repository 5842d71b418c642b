"""Figures that tests look into."""

from collections.abc import Callable

import pytest
from matplotlib.figure import Figure

from sails_align.reporting import figures, trade_offs
from sails_align.reporting.drawing import Picture


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures, in place of their files."""
    kept: list[Figure] = []

    class Kept(Picture):
        def __init__(self, name: str, title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
            super().__init__(name, title, size, draw)
            kept.append(Figure(figsize=size))
            draw(kept[-1])

    for module in (figures, trade_offs):
        monkeypatch.setattr(module, "Picture", Kept)
    return kept
