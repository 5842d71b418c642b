"""Bounds on shares of prompts: golden numbers, and that they hold as often as they say."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from sails_align.guards.bounds import certified_threshold, lower_bound, p_values, upper_bound

GRID = np.linspace(-4, 8, 256)
N_DRAWS, SHARE, DELTA = 1000, 0.05, 0.05


@pytest.mark.parametrize(("n", "bound"), [(59, 0.0495), (298, 0.0100)])
def test_no_failures_at_95_percent(n: int, bound: float) -> None:
    assert upper_bound(0, n, 0.05) == pytest.approx(bound, abs=5e-5)
    assert upper_bound(0, n, 0.05) == pytest.approx(1 - 0.05 ** (1 / n))


def test_a_bound_is_where_the_count_gets_improbable() -> None:
    for count, n in ((1, 20), (7, 20), (19, 20), (3, 400)):
        assert binom.cdf(count, n, upper_bound(count, n, 0.1)) == pytest.approx(0.1)
        assert binom.sf(count - 1, n, lower_bound(count, n, 0.1)) == pytest.approx(0.1)
    assert upper_bound(20, 20, 0.1) == 1
    assert lower_bound(0, 20, 0.1) == 0


@pytest.mark.parametrize(("n", "index"), [(99, 90), (19, 18), (9, 9)])
def test_conformal_index(n: int, index: int) -> None:
    """At level 0.1 the prompts below the harmful score of rank `index` from above are called harmless."""
    assert index == math.ceil((n + 1) * 0.9)
    scores = np.arange(n)[::-1]  # scores[k - 1] has rank k from above
    assert p_values(scores, scores[index - 1]) > 0.1
    assert p_values(scores, scores[index - 1] - 0.5) <= 0.1


def test_p_values_of_harmful_prompts_are_small_as_seldom_as_they_say() -> None:
    rng = np.random.default_rng(0)
    found = np.array([p_values(draw[1:], draw[0]) for draw in rng.normal(size=(4000, 40))])
    for level in (0.05, 0.1, 0.5):
        assert (found <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / 4000)
    assert (found > 0).all()


def true_pass_rates(rng: np.random.Generator, n: int) -> np.ndarray:
    """The share of all harmful prompts that passes each draw's threshold; scores are normal around 2."""
    draws = rng.normal(2, 1, size=(N_DRAWS, n))
    found = [certified_threshold(scores, GRID, SHARE, DELTA) for scores in draws]
    return np.array([0.0 if threshold is None else norm.cdf(threshold - 2) for threshold in found])


@pytest.mark.parametrize("n", [60, 200, 512])
def test_the_certificate_is_wrong_in_a_share_of_delta_at_most(n: int) -> None:
    rates = true_pass_rates(np.random.default_rng(n), n)
    assert (rates > SHARE).mean() <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / N_DRAWS)
    assert np.median(rates) > SHARE / 100  # it is not kept by refusing everything
    assert n < 200 or np.median(rates) > SHARE / 4


def test_too_few_prompts_certify_nothing() -> None:
    assert certified_threshold([5.0] * 58, GRID, SHARE, DELTA) is None
    assert certified_threshold([5.0] * 59, GRID, SHARE, DELTA) == GRID[GRID <= 5].max()


def test_the_sequence_stops_at_the_first_failure() -> None:
    """Laxer thresholds pass no fewer prompts; the laxest one is that before the first that passes too many."""
    scores = np.sort(np.random.default_rng(1).normal(2, 1, 300))
    threshold = certified_threshold(scores, GRID, SHARE, DELTA)
    assert threshold is not None
    after = GRID[threshold < GRID][0]
    assert (
        upper_bound((scores < threshold).sum(), 300, DELTA) <= SHARE < upper_bound((scores < after).sum(), 300, DELTA)
    )
    assert certified_threshold(scores + 100, GRID, SHARE, DELTA) == GRID[-1]
