"""Published intervals: inside the range of their metric, and none below three seeds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sails_align.evaluation.intervals import LEAST_SEEDS, span_of_difference
from sails_align.evaluation.metrics import METRICS

DOCS = Path(__file__).parents[2] / "docs"


def _means(value: Any, name: str = "", *, is_difference: bool = False) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Yield the means in a JSON value: the metric, whether it is a difference, and the mean."""
    if isinstance(value, dict) and {"value", "low", "high", "n"} == value.keys():
        yield name, is_difference, value
    elif isinstance(value, dict):
        for key, of in value.items():
            yield from _means(of, key, is_difference=is_difference or key == "differences")
    elif isinstance(value, list):
        for of in value:
            yield from _means(of, name, is_difference=is_difference)


def test_intervals_of_the_comparison_are_possible() -> None:
    results = json.loads((DOCS / "results" / "comparison" / "results.json").read_text(encoding="utf-8"))
    found = [mean for mean in _means(results) if mean[2]["low"] is not None]
    assert len(found) > 1000
    for name, is_difference, mean in found:
        low, high = span_of_difference(METRICS[name].span) if is_difference else METRICS[name].span
        assert low <= mean["low"] < mean["value"] < mean["high"] <= high, (name, mean)
        assert mean["n"] >= LEAST_SEEDS, (name, mean)


@pytest.mark.parametrize("path", [DOCS.parent / "README.md", *DOCS.rglob("*.md")], ids=lambda path: path.name)
def test_pages_give_both_ends_of_an_interval(path: Path) -> None:
    assert "±" not in path.read_text(encoding="utf-8")
