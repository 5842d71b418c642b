"""Golden numbers of the exact accountant, and the bound for Poisson sampling against exact values and integrals."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from sails_align.core.errors import InputError
from sails_align.training.zeroth_order.accounting import (
    gaussian_delta,
    gaussian_epsilon,
    sampled_rdp,
    sigma_for,
    spent_epsilon,
)


@pytest.mark.parametrize(("steps", "sigma", "epsilon"), [(1, 1, 4.377), (100, 20, 1.993), (1000, 50, 2.594)])
def test_golden_numbers_of_full_batches(steps: int, sigma: float, epsilon: float) -> None:
    assert spent_epsilon(sigma, 1e-5, steps, 1.0) == pytest.approx(epsilon, abs=5e-4)


def test_golden_delta_and_the_inverse() -> None:
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.12694, abs=5e-6)
    assert gaussian_epsilon(1.0, gaussian_delta(1.0, 1.0)) == pytest.approx(1.0, abs=1e-8)
    assert gaussian_epsilon(1e-3, 0.1) == 0.0


@pytest.mark.parametrize(("sigma", "rate", "order"), [(1.0, 0.1, 2), (0.8, 0.3, 5), (2.0, 0.01, 32), (4.0, 0.9, 12)])
def test_the_divergence_is_the_integral(sigma: float, rate: float, order: int) -> None:
    """Of the mixture to the power of the order, under the plain noise; the other direction is not larger."""

    def ratio(x: float) -> float:
        return 1 - rate + rate * math.exp((2 * x - 1) / (2 * sigma**2))

    def integral(power: int) -> float:
        return quad(lambda x: norm.pdf(x, scale=sigma) * ratio(x) ** power, -60, 60, limit=800, points=[0, 1, order])[0]

    found = sampled_rdp(sigma, rate, order)
    assert found == pytest.approx(math.log(integral(order)) / (order - 1), rel=1e-6)
    assert math.log(integral(1 - order)) / (order - 1) <= found + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.floats(0.7, 5), st.floats(0.01, 0.9))
def test_the_bound_is_above_the_exact_epsilon_of_one_step(sigma: float, rate: float) -> None:
    """Of one step it is known: delta(epsilon) = rate * delta_full(log(1 + (exp(epsilon) - 1) / rate))."""
    delta = 1e-5
    bound = spent_epsilon(sigma, delta, 1, rate)
    full = gaussian_epsilon(1 / sigma, delta / rate)
    exact = math.log1p(rate * math.expm1(full))
    assert exact <= bound <= 2.5 * exact + 0.55
    assert bound <= spent_epsilon(sigma, delta, 1, 1.0) * 1.35 + 0.05, "sampling costs at most what the bound is loose"


def test_sampling_is_cheaper_and_full_batches_are_the_limit() -> None:
    rates = [spent_epsilon(2.0, 1e-5, 100, rate) for rate in (0.01, 0.1, 0.5, 1 - 1e-9)]
    assert rates == sorted(rates)
    assert rates[0] < 0.5
    loose = spent_epsilon(20.0, 1e-5, 100, 1 - 1e-9)
    assert 1.993 < loose < 2.524, "between the exact value and the plain conversion"


@pytest.mark.parametrize("rate", [1.0, 0.05])
@pytest.mark.parametrize("epsilon", [0.5, 4.0, 20.0])
def test_the_noise_for_an_epsilon_spends_it_and_no_more(rate: float, epsilon: float) -> None:
    sigma = sigma_for(epsilon, 1e-5, 300, rate)
    assert 0.99 * epsilon < spent_epsilon(sigma, 1e-5, 300, rate) <= epsilon
    assert spent_epsilon(sigma / 1.01, 1e-5, 300, rate) > epsilon


def test_what_cannot_be_had() -> None:
    assert spent_epsilon(1.0, 1e-5, 0, 1.0) == 0.0
    with pytest.raises(InputError, match="no noise gives dp_epsilon"):
        sigma_for(1e-9, 1e-12, 10**6, 1.0)
