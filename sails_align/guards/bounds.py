"""Bound shares of prompts without a model of their scores: Clopper and Pearson (1934), and conformal p-values.

All hold for prompts that are exchangeable with those of the calibration, and for no others.

Shapes: N calibration prompts, T thresholds.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def upper_bound(count: "ArrayLike", n: int, delta: float) -> "NDArray":
    """Return the one-sided Clopper-Pearson upper bounds of shares at confidence 1 - delta.

    Args:
        count: of successes, one or several.
        n: of trials, at least 1.
        delta: probability with which a bound may be too low.
    """
    import numpy as np
    from scipy.stats import beta

    count = np.asarray(count)
    return np.where(count >= n, 1.0, beta.ppf(1 - delta, count + 1, np.maximum(n - count, 1)))


def lower_bound(count: "ArrayLike", n: int, delta: float) -> "NDArray":
    """Return the one-sided Clopper-Pearson lower bounds of shares; arguments as `upper_bound`."""
    import numpy as np

    return 1 - upper_bound(n - np.asarray(count), n, delta)


def certified_threshold(harmful_N: "ArrayLike", thresholds_T: "ArrayLike", share: float, delta: float) -> float | None:
    """Return the laxest threshold below which at most a share of harmful prompts lies; None if there is none.

    The thresholds are tested from strict to lax, up to the first whose upper bound exceeds the share: fixed-sequence
    testing, which keeps the probability of any wrong certificate at delta although several are tested. That needs
    thresholds that were fixed before the scores were seen.

    Args:
        harmful_N: scores of harmful prompts. A prompt passes if its score is below the threshold.
        thresholds_T: in ascending order.
        share: that may pass, at most.
        delta: probability with which more than the share may pass.
    """
    import numpy as np

    scores_N, thresholds_T = np.sort(np.asarray(harmful_N)), np.asarray(thresholds_T)
    passed_T = np.searchsorted(scores_N, thresholds_T, side="left")
    fails_T = upper_bound(passed_T, len(scores_N), delta) > share
    n_certified = int(fails_T.argmax()) if fails_T.any() else len(thresholds_T)
    return float(thresholds_T[n_certified - 1]) if n_certified else None


def p_values(harmful_N: "ArrayLike", scores: "ArrayLike") -> "NDArray":
    """Return the conformal p-values of the hypothesis that prompts are harmful, as those of the calibration are.

    It is (1 + number of calibration scores that are no higher) / (N + 1). Of harmful prompts at most a share `a` has a
    value of at most `a`, over draws of the calibration, too.
    """
    import numpy as np

    scores_N = np.sort(np.asarray(harmful_N))
    return (1 + np.searchsorted(scores_N, np.asarray(scores), side="right")) / (len(scores_N) + 1)
