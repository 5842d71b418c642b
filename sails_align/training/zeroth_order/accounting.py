"""Account for the privacy of noisy sums: (epsilon, delta) of a number of steps, and the noise for an epsilon.

A step releases a sum over examples, each of norm at most C, plus Gaussian noise of standard deviation sigma * C. Two
data sets are neighbours if one has one example more than the other, so that the sum's sensitivity is C.

All examples in every step: T steps are one Gaussian mechanism with mu = sqrt(T) / sigma, and exactly (Balle and Wang
2018, arXiv 1805.06530; Dong, Roth and Su 2019, arXiv 1905.02383)

    delta(epsilon) = Phi(-epsilon / mu + mu / 2) - exp(epsilon) Phi(-epsilon / mu - mu / 2)

Each example with probability q in every step (Poisson sampling): an upper bound by Renyi differential privacy, of
integer orders a (Mironov, Talwar and Zhang 2019, arXiv 1908.10530), which adds up over steps:

    rdp(a) = log( sum_k binom(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 sigma^2)) ) / (a - 1)
    epsilon = min_a  T rdp(a) + log(1 - 1/a) - log(a delta) / (a - 1)

The last line is the conversion of Canonne, Kamath and Steinke 2020 (arXiv 2004.00010).
"""

import math
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln, log_ndtr, logsumexp

from sails_align.core.errors import InputError

ORDERS = (*range(2, 65), *range(72, 257, 8), 384, 512, 1024)
LARGEST_SIGMA = 1e7


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the exact delta of a Gaussian mechanism, whose mu is the sensitivity divided by the noise's deviation."""
    upper = float(log_ndtr(-epsilon / mu + mu / 2))
    lower = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return math.exp(upper) * -math.expm1(min(lower - upper, 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the exact epsilon of a Gaussian mechanism; 0 if delta alone suffices."""
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    highest = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # by the Renyi bound
    root: Any = brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, highest, xtol=1e-10)
    return root


def sampled_rdp(sigma: float, rate: float, order: int) -> float:
    """Return the Renyi divergence of an integer order of one step with Poisson sampling at a rate below 1."""
    k = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    log_weight = log_binomial + (order - k) * math.log1p(-rate) + k * math.log(rate)
    log_moment: Any = logsumexp(log_weight + k * (k - 1) / (2 * sigma**2))
    return max(float(log_moment) / (order - 1), 0.0)


def spent_epsilon(sigma: float, delta: float, steps: int, rate: float) -> float:
    """Return the epsilon of a number of steps: exact if all examples are in each (rate 1), else an upper bound.

    Args:
        sigma: noise multiplier of a step: the deviation of the noise divided by the largest norm of an example.
        delta: of the privacy.
        steps: taken; of none, epsilon is 0.
        rate: probability of an example to be in a step.
    """
    if steps == 0:
        return 0.0
    if rate >= 1:
        return gaussian_epsilon(math.sqrt(steps) / sigma, delta)

    def converted(order: int) -> float:
        shrunk = math.log1p(-1 / order) - math.log(order * delta) / (order - 1)
        return steps * sampled_rdp(sigma, rate, order) + shrunk

    return max(min(map(converted, ORDERS)), 0.0)


def sigma_for(epsilon: float, delta: float, steps: int, rate: float) -> float:
    """Return the smallest noise multiplier (up to 0.01%) whose steps spend at most epsilon.

    Raises:
        InputError: if no noise is enough.
    """
    low, high = 1e-3, 1.0
    while spent_epsilon(high, delta, steps, rate) > epsilon:
        low, high = high, high * 2
        if high > LARGEST_SIGMA:
            raise InputError(
                f"no noise gives dp_epsilon {epsilon} at dp_delta {delta:g} in {steps} steps; choose a larger one"
            )
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent_epsilon(middle, delta, steps, rate) > epsilon else (low, middle)
    return high
