"""Rates say what they are of; intervals hold; nothing is counted that was not scored."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sails_align.core.errors import InputError
from sails_align.evaluation.metrics import METRICS, Estimate, estimate, estimates


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=50))
def test_the_interval_holds_the_value_and_everything_is_counted(values):
    result = estimate(values)
    assert result.n + result.n_unscored == len(values)
    if result.n:
        assert -1e-9 <= result.ci_low - 1e-9 <= result.value <= result.ci_high + 1e-9 <= 1 + 2e-9
    else:
        assert result.value is None


def test_unscored_values_change_neither_the_value_nor_its_denominator():
    assert estimate([1.0, 0.0, None, None]).value == 0.5
    assert estimate([1.0, 0.0, None, None]).n == 2


def test_unscored_prompts_are_in_no_group():
    found = estimate([1.0, None, 0.0, 1.0], groups=["a", "b", "c", "c"])
    alone = estimate([1.0, 0.0, 1.0], groups=["a", "c", "c"])
    assert (found.ci_low, found.ci_high) == (alone.ci_low, alone.ci_high)


def test_no_prompts_is_an_error_not_zero():
    with pytest.raises(InputError, match="no prompts"):
        estimate([])


def test_safety_follows_the_papers_scale():
    results = estimates("harm", [1, 2, 3, 4, 5, None])
    assert results["safety_rate"].value == pytest.approx(0.4)
    assert results["harmfulness"].value == pytest.approx(3.0)
    assert results["high_risk_rate"].value == pytest.approx(0.2)
    assert results["safety_rate"].n_unscored == 1


def test_rules_alone_measure_refusal():
    results = estimates("harm", [1, 5, 5, None], binary=True, by_rules=True)
    assert results.keys() == {"refusal_rate"}
    assert (results["refusal_rate"].value, results["refusal_rate"].n_unscored) == (pytest.approx(1 / 3), 1)
    assert METRICS["refusal_rate"].heading == "refusal rate (%)"
    assert "refusal_rate" not in estimates("harm", [1, 5, 5, None], binary=True)


def test_the_table_says_how_each_estimate_is_shown():
    assert "safety_rate" in estimates("harm", [1.0])
    share = Estimate(0.918, 0.883, 0.949, 256, 0)
    assert METRICS["safety_rate"].with_interval(share) == "91.8 (88.3 to 94.9)"
    assert METRICS["harmfulness"].with_interval(Estimate(1.15, 1.09, 1.22, 512, 0)) == "1.15 (1.09 to 1.22)"
    assert METRICS["safety_rate"].with_interval(Estimate(1.0, None, None, 3, 0)) == "100.0"
    assert METRICS["safety_rate"].with_interval(Estimate(None, None, None, 0, 3)) == "unscored (3)"
    assert METRICS["safety_rate_out_of_distribution"].heading == "safety rate, held-out categories (%)"
    assert METRICS["held_out_loss"].heading == "loss on held-out pairs"


def test_reading_the_table_imports_nothing_heavy():
    code = "import sys; import sails_align.evaluation.metrics; print({'torch', 'numpy', 'scipy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
