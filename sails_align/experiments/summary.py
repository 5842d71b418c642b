"""Results of cells -> what is reported: means over seeds, differences paired by seed, each with a 95% interval."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from typing import Any

from sails_align.evaluation.metrics import METRICS, Metric, mean_interval
from sails_align.experiments.plan import Cell, Plan, Run, helpfulness, merit

Result = Mapping[str, Any]
SAFETY = ("safety_rate_in_distribution", "safety_rate_out_of_distribution", "safety_rate")
SHOWN = tuple(METRICS[name] for name in (*SAFETY, "over_refusal_rate", "correct_answer_rate", "helpfulness"))
"""Metrics of the table on the console."""
CORE = tuple(
    METRICS[name]
    for name in (*SAFETY, "over_refusal_rate", "correct_answer_rate", "merit", "helpfulness", "win_rate", "steps_to_95")
)
"""Of side studies."""
COMPARED = tuple(
    METRICS[name]
    for name in (
        *SAFETY,
        *("over_refusal_rate", "correct_answer_rate", "merit", "helpfulness", "win_rate"),
        *("attack_success_rate", "capability", "steps_to_95", "left_after_benign", "left_after_harmful"),
    )
)
"""Of differences."""
REPORTED = tuple(
    METRICS[name]
    for name in (
        *(*SAFETY, "harmfulness", "high_risk_rate", "over_refusal_rate", "correct_answer_rate", "merit"),
        *("helpfulness", "win_rate", "attack_success_rate", "capability", "steps_to_95", "trainable_share"),
        *("left_after_benign", "left_after_harmful", "train_seconds", "peak_memory_mb"),
    )
)
"""All metrics of a cell, in the order of the report."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with its 95% t interval (none for one seed)."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Seeds that have the number."""

    @property
    def touches_zero(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def mean_of(values: Sequence[float | None]) -> Mean:
    """The mean of the numbers there are."""
    known = [value for value in values if value is not None]
    if not known:
        return Mean(None, None, None, 0)
    mean, low, high = mean_interval(known)
    return Mean(mean, None if math.isnan(low) else low, None if math.isnan(high) else high, len(known))


def with_numbers(metrics: Sequence[Metric], found: Iterable[Mapping[str, Mean]]) -> list[Metric]:
    """The metrics that some mean has a number of; of safety as a whole only where it is not told by categories."""
    means = list(found)
    known = [metric for metric in metrics if any(of[metric.name].n for of in means)]
    by_split = any(metric.name.startswith("safety_rate_") for metric in known)
    return [metric for metric in known if metric.name != "safety_rate" or not by_split]


def value_of(result: Result, name: str) -> float | None:
    """A metric of a cell; None where the cell has none."""
    if name == "merit":
        return merit(result)
    if name == "attack_success_rate":
        return result.get("attack", {}).get(name, {}).get("value")
    if name == "capability":
        tasks = result.get("capability")
        return sum(tasks.values()) / len(tasks) if tasks else None
    if name.startswith("left_after_"):
        left = result.get("relearned", {}).get(name.removeprefix("left_after_"))
        return left and left["safety_rate"]["value"]
    if name in ("trainable_share", "steps_to_95", "peak_memory_mb"):
        return result["cost"].get(name)
    if name == "train_seconds":
        return sum(result["cost"]["seconds"].get(stage, 0.0) for stage in ("subspace", "train"))
    return result["numbers"].get(name, {}).get("value")


@dataclass(frozen=True)
class Row:
    """What is reported of a run."""

    run: Run
    learning_rate: float | None
    means: Mapping[str, Mean]
    """By metric."""
    n_unscored: int
    """Responses without a score, of all seeds."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in `results.json`."""
        return {
            "run": self.run.name,
            "label": self.run.label,
            "trainer": self.run.trainer,
            "options": list(self.run.options),
            "learning_rate": self.learning_rate,
            "means": {name: asdict(mean) for name, mean in self.means.items()},
            "n_unscored": self.n_unscored,
        }


@dataclass(frozen=True)
class Outcome:
    """The results of one plan, and the learning rates that they chose."""

    plan: Plan
    tuned: Mapping[str, Result]
    """Of the tuning cells that are there, by key."""
    tested: Mapping[str, Result]
    """Of the test cells, likewise."""
    chosen: Mapping[str, float]
    """Learning rates by run."""

    @property
    def labels(self) -> dict[str, str]:
        """Of the runs, by name."""
        return {run.name: run.label for run in self.plan.runs}

    @cached_property
    def by_run(self) -> dict[str, dict[int, Result]]:
        """Results of the test cells by run and seed."""
        found: dict[str, dict[int, Result]] = {run.name: {} for run in self.plan.runs}
        for cell in self.plan.test_cells(self.chosen):
            if cell.key in self.tested:
                found[cell.run.name][cell.seed] = self.tested[cell.key]
        return found

    @cached_property
    def rows(self) -> list[Row]:
        """A row for each run, in the plan's order."""
        return [self._row(run, list(self.by_run[run.name].values())) for run in self.plan.runs]

    def _row(self, run: Run, results: Sequence[Result]) -> Row:
        means = {metric.name: mean_of([value_of(result, metric.name) for result in results]) for metric in REPORTED}
        rates = [result["numbers"].get(name) for result in results for name in ("safety_rate", "over_refusal_rate")]
        return Row(run, self.chosen.get(run.name), means, sum(rate["n_unscored"] for rate in rates if rate))

    def difference(self, name: str, reference: str) -> dict[str, Mean]:
        """A run minus a reference run, by metric: pairs of the same seed."""
        ours, theirs = self.by_run[name], self.by_run[reference]
        seeds = sorted(ours.keys() & theirs.keys())
        found = {}
        for metric in COMPARED:
            pairs = [(value_of(ours[seed], metric.name), value_of(theirs[seed], metric.name)) for seed in seeds]
            found[metric.name] = mean_of([a - b for a, b in pairs if a is not None and b is not None])
        return found

    def minus(self, reference: str) -> dict[str, dict[str, Mean]]:
        """Every trained run's differences from one of them."""
        names = [run.name for run in self.plan.runs if not run.is_reference and run.name != reference]
        return {name: self.difference(name, reference) for name in names}

    def categories(self, split: str) -> dict[str, dict[str, Mean]]:
        """By category of a split (`harmful`, `ood`, `harmless`) and run: the safety rate, or over-refusal."""
        found: dict[str, dict[str, Mean]] = {}
        for run, results in self.by_run.items():
            values: dict[str, list[float | None]] = {}
            for result in results.values():
                for category, number in result["by_category"].items():
                    if number["split"] == split:
                        values.setdefault(category, []).append(number["value"])
            for category, of_category in values.items():
                found.setdefault(category, {})[run] = mean_of(of_category)
        return dict(sorted(found.items()))

    def _tuned_cells(self) -> Iterator[tuple[Cell, Result]]:
        for cell in self.plan.tuning_cells():
            if cell.key in self.tuned:
                yield cell, self.tuned[cell.key]

    def merits(self) -> dict[str, dict[float, float]]:
        """By run and learning rate: what it was chosen by, the mean over tuning seeds on the validation part."""
        found: dict[str, dict[float, list[float]]] = {}
        for cell, result in self._tuned_cells():
            if cell.learning_rate is not None:
                found.setdefault(cell.run.name, {}).setdefault(cell.learning_rate, []).append(merit(result))
        return {run: {rate: sum(of) / len(of) for rate, of in rates.items()} for run, rates in found.items()}

    def fronts(self) -> list["Front"]:
        """The front of each run with a grid of learning rates."""
        found: dict[str, dict[int, list[Point]]] = {}
        for cell, result in self._tuned_cells():
            found.setdefault(cell.run.name, {}).setdefault(cell.seed, []).append(_point(result))

        def mean(points: Sequence[Point]) -> Point:
            return Point(*(sum(values) / len(points) for values in zip(*map(astuple, points), strict=True)))

        return [
            Front(
                run,
                tuple(mean(points) for points in zip(*found[run.name].values(), strict=True)),
                tuple(map(tuple, found[run.name].values())),
            )
            for run in self.plan.runs
            if run.name in found
        ]


@dataclass(frozen=True)
class Point:
    """What one learning rate reached on the validation part, means over the tuning seeds."""

    lost: float
    """What is lost of helpfulness (`plan.helpfulness`): harmless requests that are refused or answered wrongly."""
    safety: float
    over_refusal: float


@dataclass(frozen=True)
class Front:
    """How much safety a method has for how much lost helpfulness, over its learning rates.

    Not over over-refusal: a model that training has broken refuses nothing and complies with nothing.
    """

    run: Run
    points: tuple[Point, ...]
    """Means over the tuning seeds."""
    of_seeds: tuple[tuple[Point, ...], ...] = ()
    """Of each tuning seed, in their order."""

    @property
    def hypervolumes(self) -> tuple[float, ...]:
        """Of each tuning seed's own front."""
        return tuple(Front(self.run, points).hypervolume for points in self.of_seeds)

    @property
    def pareto(self) -> tuple[Point, ...]:
        """The points that no other one beats, and the untrained model, which loses nothing; by what is lost."""
        kept = [Point(0.0, 0.0, 0.0)]
        for point in sorted(self.points, key=lambda point: (point.lost, -point.safety)):
            if point.safety > kept[-1].safety:
                kept.append(point)
        return tuple(kept)

    @property
    def hypervolume(self) -> float:
        """Area that the front dominates, of the square of what is lost (down from 1) and safety (up from 0)."""
        kept = [*self.pareto, Point(1.0, 0.0, 0.0)]
        return sum((right.lost - left.lost) * left.safety for left, right in itertools.pairwise(kept))

    def at(self, safety: float) -> Point | None:
        """The front at a safety rate, between its points on a line; None if that is not reached."""
        for left, right in itertools.pairwise(self.pareto):
            if left.safety < safety <= right.safety:
                share = (safety - left.safety) / (right.safety - left.safety)
                return Point(
                    left.lost + share * (right.lost - left.lost),
                    safety,
                    left.over_refusal + share * (right.over_refusal - left.over_refusal),
                )
        return None


def _point(result: Result) -> Point:
    lost = 1 - helpfulness(result)
    return Point(lost, value_of(result, "safety_rate") or 0.0, value_of(result, "over_refusal_rate") or 0.0)


def hypervolume_difference(front: Front, reference: Front) -> Mean:
    """Of two runs' hypervolumes, paired by tuning seed."""
    return mean_of([ours - theirs for ours, theirs in zip(front.hypervolumes, reference.hypervolumes, strict=True)])


def examples_to(safety: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """How many examples a safety rate takes: between the curve's points, on a line over the logarithm.

    Args:
        safety: the rate.
        curve: (examples, safety rate), by examples.

    Returns:
        None if it is not reached; the first point's number if that is enough.
    """
    if curve and curve[0][1] >= safety:
        return float(curve[0][0])
    for (n, low), (more, high) in itertools.pairwise(curve):
        if low < safety <= high:
            share = (safety - low) / (high - low)
            return math.exp(math.log(n) + share * (math.log(more) - math.log(n)))
    return None
