"""How far weights have moved, and what a lower learning rate keeps at the same distance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_results import outcome
from tiny import save_model
from transformers import AutoModelForCausalLM

from sails_align.experiments.summary import value_of
from sails_align.experiments.tampering.distance import minus_lower_rate, moved


def test_the_distance_is_relative_to_the_norm_of_all_weights(tmp_path: Path) -> None:
    save_model(tmp_path / "before")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    assert moved(tmp_path / "before", tmp_path / "before") == 0
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    model.save_pretrained(tmp_path / "after")
    assert moved(tmp_path / "after", tmp_path / "before") == pytest.approx(0.1, rel=1e-5)


LEVELS = {"aligned": 0.9, "lower-rate": 0.5, "none": 0.1}
DISTANCES = {"aligned": 0.0, "lower-rate": 0.1, "none": 0.2}


def minus_of(level: float, distance: float | None, **of_none: Any) -> dict[str, Any]:
    """Return the difference of a defence; distances of None are unknown."""
    more = {name: {"moved": of, "tampering": {}} for name, of in {**DISTANCES, "lox": distance}.items()}
    more["none"] |= of_none
    made = outcome("aligned", "none", "lower-rate", "lox", levels={**LEVELS, "lox": level}, more=more)
    found = minus_lower_rate(made)
    kept = {name: [value_of(of, "kept") or 0.0 for of in results.values()] for name, results in made.by_run.items()}
    return {"found": found, "kept": kept}


def test_a_lower_rate_is_compared_at_the_distance_of_the_defence() -> None:
    """Halfway between the lower and the full rate, what is kept lies halfway between what both keep."""
    of = minus_of(0.5, 0.15)
    (difference,) = of["found"].values()
    expected = [
        ours - (lower + full) / 2
        for ours, lower, full in zip(of["kept"]["lox"], of["kept"]["lower-rate"], of["kept"]["none"], strict=True)
    ]
    assert difference.value == pytest.approx(sum(expected) / len(expected))
    assert difference.value > 0
    beyond = minus_of(0.1, 0.5)["found"]["lox"]
    assert beyond.value == pytest.approx(0), "beyond the full rate it is compared with that"


def test_a_defence_that_only_moves_less_is_no_better() -> None:
    assert minus_of(0.5, 0.1)["found"]["lox"].value == pytest.approx(0)


def test_nothing_is_said_without_distances() -> None:
    assert minus_of(0.5, None)["found"] == {}
    assert minus_of(0.5, 0.1, moved=None)["found"] == {}
