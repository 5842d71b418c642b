"""Measure how far judges agree with each other and with known labels.

vote([one, other, third]).score                         # the upper median
cohen_kappa([1, 5, None], [1, 4, 5], weights="quadratic")
krippendorff_alpha([[1, 5, None], [1, 4, 5]])           # one row of scores a judge
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median_high, median_low
from typing import Any, Literal

import krippendorff
import numpy as np

from sails_align.core.errors import InputError
from sails_align.evaluation.metrics import estimate
from sails_align.evaluation.records import Reason, Verdict

Scores = Sequence[float | None]
"""None is unscored."""


def vote(verdicts: Sequence[Verdict], *, lower_is_worse: bool = False) -> Verdict:
    """Return the median of the scored verdicts on one item; of two in the middle, the worse one.

    It is unscored only if no judge scored, with the most frequent reason. For harm and refusal a higher score is worse,
    for helpfulness, correctness and preference (`lower_is_worse`) a lower one. Raises `InputError` if there are no
    verdicts.
    """
    if not verdicts:
        raise InputError("no verdicts to vote on; choose at least one judge")
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    words = ", ".join("unscored" if verdict.score is None else f"{verdict.score:g}" for verdict in verdicts)
    if not scores:
        reasons: Counter[Reason | None] = Counter(verdict.reason for verdict in verdicts)
        return Verdict(None, reasons.most_common(1)[0][0], f"votes: {words}")
    median = median_low(scores) if lower_is_worse else median_high(scores)
    return Verdict(median, explanation=f"votes: {words}")


def cohen_kappa(a: Scores, b: Scores, weights: Literal["quadratic"] | None = None) -> float | None:
    """Compute Cohen's kappa (1960) over the items that both judges scored: 1 is agreement, 0 is chance.

    "quadratic" weighs a disagreement by its squared distance on the scale. Kappa is undefined (None) if no item was
    scored by both, or all scores are the same. Raises `InputError` if the judges have different numbers of items.
    """
    if len(a) != len(b):
        raise InputError(f"one judge has {len(a)} scores and the other {len(b)}; give both the same items")
    both_scored = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    pairs = np.array(both_scored, dtype=np.float64)
    values = np.unique(pairs)
    if len(values) < 2:
        return None
    # scikit-learn's cohen_kappa_score weighs distances between ranks: 1 and 5 are neighbours if nobody scored 2 to 4.
    one, other = pairs.T
    if weights is None:
        observed = float((one != other).mean())
        by_chance = 1 - sum(float((one == value).mean() * (other == value).mean()) for value in values)
    else:
        observed = float(((one - other) ** 2).mean())
        by_chance = float((one**2).mean() + (other**2).mean() - 2 * one.mean() * other.mean())
    return 1 - observed / by_chance


def krippendorff_alpha(
    scores: Sequence[Scores], *, level: Literal["nominal", "ordinal", "interval"] = "ordinal"
) -> float | None:
    """Compute Krippendorff's alpha (2011) over any number of judges, who need not have scored all items.

    There is a row of scores for each judge. The level of harm (1-5) is ordinal, that of refusal nominal. Alpha is
    undefined (None) if no item has two scores, or all scores that can be compared are the same. Raises `InputError` if
    the judges have different numbers of items.
    """
    lengths = {len(row) for row in scores}
    if len(lengths) > 1:
        raise InputError(f"the judges have {sorted(lengths)} scores; give all of them the same items")
    items = [item for item in zip(*scores, strict=True) if sum(score is not None for score in item) >= 2]
    if len({score for item in items for score in item if score is not None}) < 2:
        return None
    data = np.array([[np.nan if score is None else score for score in item] for item in items], dtype=np.float64)
    return float(krippendorff.alpha(reliability_data=data.T, level_of_measurement=level))


def confusion(true: Sequence[float], predicted: Scores, labels: Sequence[float]) -> dict[str, Any]:
    """Compare scores with the right labels, all of which are among `labels`; None is unscored.

    Returns:
        `counts`, with a row for each label and a column for each of `columns`, and the `accuracy` of scored items.

    Raises:
        InputError: if there are no items, their numbers differ, or a label is none of `labels`.
    """
    if len(true) != len(predicted):
        raise InputError(f"there are {len(true)} labels and {len(predicted)} verdicts; give one verdict a label")
    unknown = sorted({value for value in (*true, *predicted) if value is not None and value not in labels})
    if unknown:
        allowed = ", ".join(f"{label:g}" for label in labels)
        raise InputError(f"{unknown[0]:g} is no label of this task; labels are {allowed}")
    counts = Counter(zip(true, predicted, strict=True))
    right = [None if score is None else float(score == label) for label, score in zip(true, predicted, strict=True)]
    return {
        "labels": list(labels),
        "columns": [*labels, "unscored"],
        "counts": [[counts[label, column] for column in (*labels, None)] for label in labels],
        "accuracy": estimate(right).to_json(),
    }
