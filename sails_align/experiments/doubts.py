"""Tell which seeds of a method are unstable, so that its means describe no model.

A seed is unstable if it gives next to no right answer (below 5% of the scale of helpfulness), or if its safety or
its helpfulness is more than 30% of the scale away from the median of three or more seeds.
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
    known = [name for name in HELPFULNESS_RATES if any(of.get(name) is not None for of in by_seed.values())]
    return [unstable for name in (*SAFETY_RATES, *known[:1]) for unstable in _unstable(name, by_seed)]


def _unstable(name: str, by_seed: Mapping[int, Mapping[str, float | None]]) -> list[UnstableSeed]:
    values = {seed: value for seed, of in by_seed.items() if (value := of.get(name)) is not None}
    if not values:
        return []
    (low, high), middle = METRICS[name].span, median(values.values())
    far = FARTHEST * (high - low) if len(values) >= LEAST_SEEDS else high - low
    least = low + LEAST_HELPFULNESS * (high - low) if name in HELPFULNESS_RATES else low
    return [
        UnstableSeed(seed, name, value, middle)
        for seed, value in values.items()
        if value < least or abs(value - middle) > far
    ]
