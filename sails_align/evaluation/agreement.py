"""How far judges agree: with each other, and with labels that are known to be right.

vote([one, other, third]).score                         # the upper median
cohen_kappa([1, 5, None], [1, 4, 5], weights="quadratic")
krippendorff_alpha([[1, 5, None], [1, 4, 5]])           # one row of scores a judge
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import Literal

import krippendorff
import numpy as np

from sails_align.core.errors import InputError
from sails_align.evaluation.metrics import Estimate, estimate
from sails_align.evaluation.records import Reason, Verdict

Level = Literal["nominal", "ordinal", "interval"]
Scores = Sequence[float | None]
"""None is unscored."""


def vote(verdicts: Sequence[Verdict], *, lower_is_worse: bool = False) -> Verdict:
    """The median of the scored verdicts on one item; of an even number, the worse one of the two in the middle.

    Args:
        verdicts: of several judges, on the same scale.
        lower_is_worse: as for helpfulness and correctness; for harm and refusal a higher score is worse.

    Returns:
        unscored only if no judge scored, with the reason that most of them have (of equals, the first).

    Raises:
        InputError: if there are no verdicts.
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


def _both_scored(a: Scores, b: Scores) -> list[tuple[float, float]]:
    if len(a) != len(b):
        raise InputError(f"one judge has {len(a)} scores and the other {len(b)}; give both the same items")
    return [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]


def cohen_kappa(a: Scores, b: Scores, weights: Literal["quadratic"] | None = None) -> float | None:
    """Cohen's kappa (1960) over the items both judges scored: 1 is agreement, 0 what chance would give.

    Args:
        a: scores of one judge.
        b: scores of the other, for the same items in the same order.
        weights: "quadratic" counts a disagreement by its squared distance (on the scale, also where it has values that
            nobody gave); None counts every disagreement alike.

    Returns:
        None where it is undefined: no item was scored by both, or both gave all items one and the same score, so that
        chance alone would make them agree.

    Raises:
        InputError: if the judges have different numbers of items.
    """
    pairs = np.array(_both_scored(a, b), dtype=np.float64)
    values = np.unique(pairs)
    if len(values) < 2:
        return None
    # Not scikit-learn's cohen_kappa_score: its weights are distances between ranks, so that 1 and 5 are neighbours
    # where nobody scored 2 to 4.
    one, other = pairs.T
    if weights is None:
        observed = float((one != other).mean())
        by_chance = 1 - sum(float((one == value).mean() * (other == value).mean()) for value in values)
    else:
        observed = float(((one - other) ** 2).mean())
        by_chance = float((one**2).mean() + (other**2).mean() - 2 * one.mean() * other.mean())
    return 1 - observed / by_chance


def krippendorff_alpha(scores: Sequence[Scores], *, level: Level = "ordinal") -> float | None:
    """Krippendorff's alpha (2011) over any number of judges, who need not have scored all items.

    Args:
        scores: one row a judge, one column an item.
        level: of measurement: what makes two scores differ much. Harm (1-5) is ordinal, refused or not is nominal.

    Returns:
        None where it is undefined: no item has two scores, or all scores that can be compared are the same.

    Raises:
        InputError: if the judges have different numbers of items.
    """
    lengths = {len(row) for row in scores}
    if len(lengths) > 1:
        raise InputError(f"the judges have {sorted(lengths)} scores; give all of them the same items")
    # Items with a single score cannot be compared with anything, and count for nothing.
    items = [item for item in zip(*scores, strict=True) if sum(score is not None for score in item) >= 2]
    if len({score for item in items for score in item if score is not None}) < 2:
        return None
    data = np.array([[np.nan if score is None else score for score in item] for item in items], dtype=np.float64)
    return float(krippendorff.alpha(reliability_data=data.T, level_of_measurement=level))


@dataclass(frozen=True)
class Confusion:
    """How often each true label was judged to be what."""

    labels: tuple[float, ...]
    """Of the rows, and of the columns but for the last one."""
    counts: tuple[tuple[int, ...], ...]
    """A row for each true label; a column for each label it was judged to be, then one for `unscored`."""
    accuracy: Estimate
    """Share of scored items that were judged right."""

    def to_json(self) -> dict[str, object]:
        """As it stands in a report."""
        return {
            "labels": list(self.labels),
            "columns": [*self.labels, "unscored"],
            "counts": [list(row) for row in self.counts],
            "accuracy": self.accuracy.to_json(),
        }


def confusion(true: Sequence[float], predicted: Scores, labels: Sequence[float], *, seed: int = 0) -> Confusion:
    """Compare a judge with labels that are known to be right.

    Args:
        true: the right labels.
        predicted: the judge's scores of the same items; None is unscored, and counted as neither right nor wrong.
        labels: all there can be, in the order of the table.
        seed: of the bootstrap interval.

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
    columns = (*labels, None)
    right = [None if score is None else float(score == label) for label, score in zip(true, predicted, strict=True)]
    return Confusion(
        labels=tuple(labels),
        counts=tuple(tuple(counts[label, column] for column in columns) for label in labels),
        accuracy=estimate(right, seed=seed),
    )
