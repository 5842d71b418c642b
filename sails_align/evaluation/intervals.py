"""Compute 95% intervals that stay in the range of a number, and that no lack of variation makes zero wide.

All are score intervals: the values of the true mean mu that the observed mean m does not reject,

    (m - mu)^2 <= q^2 * error^2 * v(mu) / v(m),    v(mu) = (mu - low) (high - mu)

where `low` and `high` are the range, and `error` is the standard error of m. For a share of independent prompts this
is Wilson's interval (1927). Over prompts q is normal, and the variance includes one more observation of the largest
variance v(m). That changes no share. It makes the interval of a difference of shares, paired by prompt, that of Agresti
and Min (2005), and that of equal values wider than zero. Over seeds q is of Student's t.
"""

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import NDArray

Span = tuple[float, float]
"""The lowest and highest possible value; infinite where there is none."""
ANY: Span = (-math.inf, math.inf)
SHARE: Span = (0.0, 1.0)
LEAST_SEEDS = 3
"""Fewer have no interval."""


def span_of_difference(span: Span) -> Span:
    """Return the range of a difference of two numbers with the same range."""
    return (span[0] - span[1], span[1] - span[0]) if all(map(math.isfinite, span)) else ANY


def over_prompts(
    values: Sequence[float], span: Span, groups: Sequence[Hashable] | None = None
) -> tuple[float | None, float | None]:
    """Return the interval of a mean over prompts.

    Prompts of one group (attacks on the same prompt) are not independent: the error is that of the mean over groups,
    each with its sum and its size (Korn and Graubard 1998 for shares). If all values are 0% or 100%, the groups count
    as if each were one prompt.

    Args:
        values: one at least, within the span.
        span: of the values. A difference, whose span is symmetric, is taken to be within the largest one observed.
            Without a span see `over_seeds`.
        groups: the group of each value; None: all are independent.
    """
    import numpy as np
    from scipy.stats import norm

    low, high = span
    if math.isinf(high):
        return over_seeds(values, span)[1:]
    if low == -high:
        high = max(map(abs, values)) or high
        low = -high
    shares = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    mean = float(np.clip(shares.mean(), 0, 1))
    sums, sizes = _by_group(shares, groups)
    whole = float(np.square(sizes).sum()) / len(shares) ** 2
    """Variance of the mean in units of mean * (1 - mean), if each group has one value only (0 or 1)."""
    most = mean * (1 - mean)
    if most == 0:
        relative = whole
    else:
        variance = float(np.square(sums - mean * sizes).sum()) / len(shares) ** 2
        relative = (len(sizes) * variance / most + whole) / (len(sizes) + 1)
        if np.isin(shares, (0, 1)).all():  # attacks on a prompt that exclude each other are no more than other prompts
            relative = max(relative, 1 / len(shares))
    bounds = _score(mean, float(norm.ppf(0.975)) ** 2 * relative)
    return low + (high - low) * bounds[0], low + (high - low) * bounds[1]


def _by_group(shares: "NDArray", groups: Sequence[Hashable] | None) -> tuple["NDArray", "NDArray"]:
    """Return the sum and the size of each group."""
    import numpy as np

    if groups is None:
        return shares, np.ones(len(shares))
    places: dict[Hashable, int] = {}
    index = [places.setdefault(group, len(places)) for group in groups]
    return np.bincount(index, shares), np.bincount(index).astype(np.float64)


def _score(mean: float, relative: float) -> Span:
    """Return the interval of a mean between 0 and 1; `relative` is (q * error)^2 / (mean * (1 - mean))."""
    centre = mean + relative / 2
    half = math.sqrt(relative * mean * (1 - mean) + relative**2 / 4)
    low, high = (centre - half) / (1 + relative), (centre + half) / (1 + relative)
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))


def over_seeds(values: Sequence[float], span: Span = ANY) -> tuple[float, float | None, float | None]:
    """Return the mean over seeds and its interval; no interval for fewer than three seeds, or if all are the same.

    Without a range, or if a value is outside of it (a score on another scale), it is Student's t interval.
    """
    import numpy as np
    from scipy.stats import t

    array, (low, high) = np.asarray(values, dtype=np.float64), span
    mean = float(array.mean())
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) >= LEAST_SEEDS else 0.0
    if error <= 1e-12 * max(1.0, abs(mean)):  # equal values differ by rounding
        return mean, None, None
    if array.min() < low - 1e-6 or array.max() > high + 1e-6:
        span = ANY
    return mean, *of_error(mean, error * float(t.ppf(0.975, len(array) - 1)), span)


def of_error(mean: float, error: float, span: Span) -> Span:
    """Return the score interval of a mean inside a range, from q times its standard error."""
    low, high = span
    if math.isinf(low):
        return mean - error, mean + error
    above = mean - low
    if math.isinf(high):
        half = error**2 / above / 2
        arm = math.sqrt(error**2 + half**2)
        return low + max(0.0, above + half - arm), low + above + half + arm
    width = high - low
    share = above / width
    bounds = _score(share, (error / width) ** 2 / (share * (1 - share)))
    return low + width * bounds[0], low + width * bounds[1]
