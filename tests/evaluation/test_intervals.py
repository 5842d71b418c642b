"""Intervals stay in the range, are never of width zero by accident, and hold the truth 95 times in 100."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, t

from sails_align.evaluation.intervals import ANY, over_prompts, over_seeds, span_of_difference
from sails_align.evaluation.metrics import METRICS, NOT_NEGATIVE

SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 12), (12, 12), (3, 10), (511, 512), (0, 4032)])
def test_a_share_of_prompts_has_wilsons_interval(k: int, n: int) -> None:
    found = over_prompts([1.0] * k + [0.0] * (n - k), SHARE)
    assert found == pytest.approx(tuple(binomtest(k, n).proportion_ci(method="wilson")))
    assert found[1] - found[0] > 0


def test_a_paired_difference_of_shares_has_the_interval_of_agresti_and_min() -> None:
    for more, less, n in ((0, 0, 200), (4, 0, 200), (6, 0, 200), (30, 10, 200), (0, 25, 100)):
        found = over_prompts([1.0] * more + [-1.0] * less + [0.0] * (n - more - less), DIFFERENCE)
        centre, total = (more - less) / (n + 2), n + 2
        error = math.sqrt((more + less + 1) - (more - less) ** 2 / total) / total
        assert found == pytest.approx((centre - 1.96 * error, centre + 1.96 * error), abs=4 / n**1.5)
    four, six = (over_prompts([1.0] * k + [0.0] * (200 - k), DIFFERENCE) for k in (4, 6))
    assert four[0] < 0 < six[0]  # as McNemar's exact test has it: p = 0.125 and 0.031


@pytest.mark.parametrize(("value", "span"), [(5.0, (1.0, 5.0)), (1.0, (1.0, 5.0)), (3.0, (1.0, 5.0)), (0.5, SHARE)])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_prompts_that_are_all_the_same_leave_some_doubt(value: float, span: tuple[float, float], n: int) -> None:
    low, high = over_prompts([value] * n, span)
    assert span[0] <= low <= value <= high <= span[1]
    assert high - low > 0.5 / n


@pytest.mark.parametrize("span", [SHARE, DIFFERENCE, (1.0, 5.0), (-9.0, 9.0)])
@given(data=st.data())
def test_intervals_hold_the_mean_and_stay_in_the_range(span: tuple[float, float], data: st.DataObject) -> None:
    value = st.one_of(st.sampled_from([*span, 0.5 * sum(span)]), st.floats(*span))
    values = data.draw(st.lists(value, min_size=1, max_size=30))
    groups = data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    mean = sum(values) / len(values)
    for low, high in (over_prompts(values, span), over_prompts(values, span, groups)):
        assert span[0] - 1e-9 <= low <= mean + 1e-9
        assert mean - 1e-9 <= high <= span[1] + 1e-9
        assert high > low
    mean, low, high = over_seeds(values, span)
    if low is not None:
        assert span[0] <= low <= mean + 1e-9 <= high + 2e-9 <= span[1] + 3e-9
    assert (low is None) == (high is None)


def test_attacks_on_a_prompt_count_as_far_as_they_differ() -> None:
    alike = [float(i < 10) for i in range(20) for _ in range(4)]
    groups = [i for i in range(20) for _ in range(4)]
    assert over_prompts(alike, SHARE, groups) == pytest.approx(over_prompts(alike[::4], SHARE))
    assert over_prompts([1.0] * 80, SHARE, groups) == pytest.approx(over_prompts([1.0] * 20, SHARE))
    unlike = [float(i % 2) for i in range(80)]  # each prompt is successfully attacked twice
    assert over_prompts(unlike, SHARE, groups) == pytest.approx(over_prompts(unlike, SHARE))
    assert over_prompts(unlike, SHARE, list(range(80))) == pytest.approx(over_prompts(unlike, SHARE))


def test_seeds() -> None:
    assert over_seeds([0.3]) == (0.3, None, None)
    assert over_seeds([0.3, 0.5], SHARE) == (0.4, None, None)  # two say too little
    assert over_seeds([1.0, 1.0, 1.0], SHARE) == (1.0, None, None)  # a spread of zero is no certainty
    assert over_seeds([0.1, 0.1, 0.1], SHARE)[1:] == (None, None)  # whose mean is 0.10000000000000002
    mean, low, high = over_seeds([1.0, 1.0, 0.277], SHARE)  # Student's t: 75.9 +- 103.6%
    assert 0 < low < mean < high < 1
    half = t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert over_seeds([0.4, 0.5, 0.6]) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert over_seeds([0.0, 0.0, 9.0], NOT_NEGATIVE)[1] > 0
    assert over_seeds([40.0, 50.0, 60.0], SHARE) == over_seeds([40.0, 50.0, 60.0])  # a score in percent


def test_far_from_its_ends_a_range_changes_nothing() -> None:
    values = [0.5, 0.51, 0.49, 0.505, 0.495]
    assert over_seeds(values, SHARE) == pytest.approx(over_seeds(values), abs=2e-4)


def coverage(draw: Callable[[], np.ndarray], truth: float, interval: Callable, n: int = 400) -> float:
    bounds = [interval(draw()) for _ in range(n)]
    return sum(low <= truth <= high for low, high in bounds) / n


def test_coverage() -> None:
    rng = np.random.default_rng(0)
    shares = [0.85, 0.05, 0.03, 0.03, 0.04]
    scale, truth = np.arange(1.0, 6.0), float(np.arange(1, 6) @ shares)
    assert 0.92 < coverage(lambda: rng.choice(scale, 64, p=shares), truth, lambda x: over_prompts(x, (1, 5))) < 0.98
    assert 0.92 < coverage(lambda: rng.random(100) < 0.3, 0.3, lambda x: over_prompts(x.astype(float), SHARE)) < 0.98
    groups = [i for i in range(40) for _ in range(4)]

    def attacked() -> np.ndarray:
        return (rng.random((40, 4)) < rng.beta(0.4, 1.6, (40, 1))).astype(float).ravel()

    assert 0.92 < coverage(attacked, 0.2, lambda x: over_prompts(x, SHARE, groups)) < 0.98
    assert coverage(attacked, 0.2, lambda x: over_prompts(x, SHARE)) < 0.9  # as if they were independent
    seeds = coverage(lambda: rng.beta(2.4, 0.6, 5), 0.8, lambda x: over_seeds(x.tolist(), SHARE)[1:])
    assert 0.9 < seeds < 0.98


def test_ranges_of_metrics() -> None:
    assert METRICS["safety_rate"].span == SHARE
    assert METRICS["train_seconds"].span == METRICS["steps_to_95"].span == NOT_NEGATIVE
    assert METRICS["held_out_reward_margin"].span == ANY
    assert span_of_difference(SHARE) == DIFFERENCE
    assert span_of_difference((1.0, 5.0)) == (-4.0, 4.0)
    assert span_of_difference(NOT_NEGATIVE) == ANY
