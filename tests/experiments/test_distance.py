"""How far weights have moved, and what a lower learning rate keeps at the same distance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_results import outcome
from tiny import save_model
from transformers import AutoModelForCausalLM

from sails_align.experiments.merits import kept_of
from sails_align.experiments.summary import Mean
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


def minus_of(level: float, distance: float | None, **of_none: Any) -> dict[str, Mean | None]:
    """Return the difference of a defence; distances of None are unknown."""
    more = {name: {"moved": of, "tampering": {}} for name, of in {**DISTANCES, "lox": distance}.items()}
    more["none"] |= of_none
    made = outcome("aligned", "none", "lower-rate", "lox", levels={**LEVELS, "lox": level}, more=more)
    return minus_lower_rate(made)


def test_a_lower_rate_is_compared_at_the_distance_of_the_defence() -> None:
    """Halfway between the lower and the full rate, the rates lie halfway, and what is kept follows from them."""
    difference = minus_of(0.5, 0.15)["lox"]
    assert difference is not None
    assert difference.value is not None
    expected = []
    for seed in range(3):
        more = 0.05 * (seed % 3)
        expected.append(kept_of(0.5 + more, 0.9, 0.1) - kept_of((0.5 + 0.1) / 2 + more, 0.9, 0.1))
    assert difference.value == pytest.approx(sum(expected) / len(expected))
    assert difference.value > 0


def test_nothing_is_said_of_a_defence_that_moves_further_than_the_full_rate() -> None:
    assert minus_of(0.9, 0.5) == {"lox": None}


def test_a_defence_that_only_moves_less_is_no_better() -> None:
    difference = minus_of(0.5, 0.1)["lox"]
    assert difference is not None
    assert difference.value == pytest.approx(0)


def test_nothing_is_said_without_distances() -> None:
    assert minus_of(0.5, None) == {"lox": None}
    assert minus_of(0.5, 0.1, moved=None) == {}


def test_where_no_helpfulness_was_measured_it_does_not_count() -> None:
    """A defence that keeps less than the lower rate at the same distance is worse by as much as it keeps less."""
    more = {name: {"moved": of, "tampering": {}} for name, of in {**DISTANCES, "lox": 0.1}.items()}
    made = outcome("aligned", "none", "lower-rate", "lox", levels={**LEVELS, "lox": 0.2}, more=more)
    for result in made.tested.values():
        del result["numbers"]["correct_answer_rate"]
    difference = minus_lower_rate(made)["lox"]
    assert difference is not None
    assert difference.value == pytest.approx(-0.3)
