"""Tell which seeds of a method are unstable, so that its means describe no model.

A seed is unstable if it gives next to no right answer (below 5% of the scale of helpfulness) while others do, or if its
safety or its helpfulness is more than 30% of the scale away from the median of three or more seeds. If no seed gives
right answers, the seeds are alike, and the method is said to be useless in place of unstable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from sails_align.evaluation.intervals import LEAST_SEEDS
from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, SAFETY_RATES

LEAST_HELPFULNESS, FARTHEST = 0.05, 0.3


@dataclass(frozen=True)
class UnstableSeed:
    """A seed whose number is far from that of the others, or from a usable model's."""

    seed: int
    metric: str
    value: float
    median: float
    """Of all seeds."""

    def __str__(self) -> str:
        metric, value = METRICS[self.metric], METRICS[self.metric].text(self.value)
        return f"seed {self.seed} has {metric.heading} {value} (median {metric.text(self.median)})"


def unstable_seeds(by_seed: Mapping[int, Mapping[str, float | None]]) -> list[UnstableSeed]:
    """Return the seeds that are unstable, from the metrics of each seed."""
    names = [*SAFETY_RATES, *_helpfulness(by_seed)]
    return [unstable for name in names for unstable in _unstable(name, by_seed)]


def no_right_answers(by_seed: Mapping[int, Mapping[str, float | None]]) -> str | None:
    """Return a sentence if every seed gives next to no right answer, else None."""
    for name in _helpfulness(by_seed):
        metric, values = METRICS[name], list(_values(name, by_seed).values())
        if max(values) < _least(name):
            return f"it gives next to no right answer on any seed: {metric.heading} at most {metric.text(max(values))}"
    return None


def _helpfulness(by_seed: Mapping[int, Mapping[str, float | None]]) -> list[str]:
    """Return the first rate of helpfulness that is known, if one is."""
    return [name for name in HELPFULNESS_RATES if _values(name, by_seed)][:1]


def _values(name: str, by_seed: Mapping[int, Mapping[str, float | None]]) -> dict[int, float]:
    return {seed: value for seed, of in by_seed.items() if (value := of.get(name)) is not None}


def _least(name: str) -> float:
    """Return the least value of a usable model: none for safety, since an unsafe model is not broken."""
    low, high = METRICS[name].span
    return low + LEAST_HELPFULNESS * (high - low) if name in HELPFULNESS_RATES else low


def _unstable(name: str, by_seed: Mapping[int, Mapping[str, float | None]]) -> list[UnstableSeed]:
    values = _values(name, by_seed)
    if not values or max(values.values()) < _least(name):
        return []
    (low, high), middle = METRICS[name].span, median(values.values())
    far = FARTHEST * (high - low) if len(values) >= LEAST_SEEDS else high - low
    return [
        UnstableSeed(seed, name, value, middle)
        for seed, value in values.items()
        if value < _least(name) or abs(value - middle) > far
    ]
