"""Results of cells -> what is reported: means over seeds, differences paired by seed, each with a 95% interval."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from sails_align.evaluation.metrics import mean_interval
from sails_align.experiments.plan import Plan, Run, helpfulness, merit

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number of a cell."""

    name: str
    label: str
    scale: float = 100.0
    """What it is multiplied by to be shown: shares are shown in %."""
    higher_is_better: bool = True
    digits: int = 1


MEASURES = (
    Measure("safety_rate_in_distribution", "safety, trained categories (%)"),
    Measure("safety_rate_out_of_distribution", "safety, new categories (%)"),
    Measure("safety_rate", "safety (%)"),
    Measure("harmfulness", "harmfulness (1-5)", 1.0, higher_is_better=False, digits=2),
    Measure("high_risk_rate", "high risk (%)", higher_is_better=False),
    Measure("over_refusal_rate", "over-refusal (%)", higher_is_better=False),
    Measure("correct_answer_rate", "correct answers (%)"),
    Measure("merit", "mean of safety and helpfulness (%)"),
    Measure("helpfulness", "helpfulness (1-10)", 1.0, digits=2),
    Measure("win_rate", "win rate (%)"),
    Measure("attack_success_rate", "GCG success (%)", higher_is_better=False),
    Measure("capability", "capability (%)"),
    Measure("steps_to_95", "steps to 95% safety", 1.0, higher_is_better=False, digits=0),
    Measure("trainable_share", "trainable parameters (%)", digits=2, higher_is_better=False),
    Measure("left_after_benign", "safety left after benign training (%)"),
    Measure("left_after_harmful", "safety left after harmful training (%)"),
    Measure("train_seconds", "training (s)", 1.0, higher_is_better=False),
    Measure("peak_memory_mb", "peak memory (MiB)", 1.0, higher_is_better=False, digits=0),
)
_CORE = (
    "safety_rate",
    "safety_rate_in_distribution",
    "safety_rate_out_of_distribution",
    "over_refusal_rate",
    "correct_answer_rate",
    "merit",
    "helpfulness",
    "win_rate",
    "steps_to_95",
)
_MORE = ("attack_success_rate", "capability", "left_after_benign", "left_after_harmful")
CORE = tuple(measure for measure in MEASURES if measure.name in _CORE)
"""What side studies tell of."""
COMPARED = tuple(measure for measure in MEASURES if measure.name in (*_CORE, *_MORE))
"""What differences are told of."""


def with_numbers(measures: Sequence[Measure], found: Iterable[Mapping[str, "Mean"]]) -> list[Measure]:
    """The measures that some mean has a number of; of safety as a whole only where it is not told by categories."""
    means = list(found)
    known = [measure for measure in measures if any(of[measure.name].n for of in means)]
    by_split = any(measure.name.startswith("safety_rate_") for measure in known)
    return [measure for measure in known if measure.name != "safety_rate" or not by_split]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with its 95% t interval (none for one seed)."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Seeds that have the number."""


@dataclass(frozen=True)
class Row:
    """What is reported of a run."""

    run: Run
    learning_rate: float | None
    means: Mapping[str, Mean]
    """By measure."""
    n_unscored: int
    """Responses without a score, of all seeds."""


def value_of(result: Result, name: str) -> float | None:
    """A measure of a cell; None where the cell has none."""
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


def mean_of(values: Sequence[float | None]) -> Mean:
    """The mean of the numbers there are."""
    known = [value for value in values if value is not None]
    if not known:
        return Mean(None, None, None, 0)
    mean, low, high = mean_interval(known)
    return Mean(mean, None if math.isnan(low) else low, None if math.isnan(high) else high, len(known))


def rows_of(plan: Plan, results: Mapping[str, Result], chosen: Mapping[str, float]) -> list[Row]:
    """A row for each run, in the plan's order.

    Args:
        plan: of the comparison.
        results: of its test cells, by key.
        chosen: learning rates by run.
    """
    of_run = by_run(plan, results, chosen)
    return [
        Row(
            run,
            chosen.get(run.name),
            {
                measure.name: mean_of([value_of(result, measure.name) for result in of_run[run.name].values()])
                for measure in MEASURES
            },
            sum(
                number["n_unscored"]
                for result in of_run[run.name].values()
                for name, number in result["numbers"].items()
                if name in ("safety_rate", "over_refusal_rate")
            ),
        )
        for run in plan.runs
    ]


def by_run(plan: Plan, results: Mapping[str, Result], chosen: Mapping[str, float]) -> dict[str, dict[int, Result]]:
    """Results of the test cells by run and seed."""
    found: dict[str, dict[int, Result]] = {run.name: {} for run in plan.runs}
    for cell in plan.test_cells(chosen):
        if cell.key in results:
            found[cell.run.name][cell.seed] = results[cell.key]
    return found


def differences(
    plan: Plan, results: Mapping[str, Result], chosen: Mapping[str, float], name: str, reference: str
) -> dict[str, Mean]:
    """A run minus a reference run, by measure: pairs of the same seed."""
    of_run = by_run(plan, results, chosen)
    ours, theirs = of_run[name], of_run[reference]
    seeds = sorted(ours.keys() & theirs.keys())
    found = {}
    for measure in COMPARED:
        pairs = [(value_of(ours[seed], measure.name), value_of(theirs[seed], measure.name)) for seed in seeds]
        found[measure.name] = mean_of([a - b for a, b in pairs if a is not None and b is not None])
    return found


def categories(
    plan: Plan, results: Mapping[str, Result], chosen: Mapping[str, float], split: str
) -> dict[str, dict[str, Mean]]:
    """By category of a split (`harmful`, `ood`, `harmless`) and run: the safety rate, or over-refusal."""
    of_run = by_run(plan, results, chosen)
    found: dict[str, dict[str, Mean]] = {}
    for run, cells in of_run.items():
        values: dict[str, list[float | None]] = {}
        for result in cells.values():
            for category, number in result["by_category"].items():
                if number["split"] == split:
                    values.setdefault(category, []).append(number["value"])
        for category, of_category in values.items():
            found.setdefault(category, {})[run] = mean_of(of_category)
    return dict(sorted(found.items()))


def merits(plan: Plan, results: Mapping[str, Result]) -> dict[str, dict[float, float]]:
    """By run and learning rate: what it was chosen by, the mean over tuning seeds on the validation part."""
    found: dict[str, dict[float, list[float]]] = {}
    for cell in plan.tuning_cells():
        if cell.key in results and cell.learning_rate is not None:
            found.setdefault(cell.run.name, {}).setdefault(cell.learning_rate, []).append(merit(results[cell.key]))
    return {run: {rate: sum(of) / len(of) for rate, of in rates.items()} for run, rates in found.items()}


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As they stand in `results.json`."""
    return [
        {
            "run": row.run.name,
            "label": row.run.label,
            "trainer": row.run.trainer,
            "options": list(row.run.options),
            "learning_rate": row.learning_rate,
            "means": {name: asdict(mean) for name, mean in row.means.items()},
            "n_unscored": row.n_unscored,
        }
        for row in rows
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


def fronts(plan: Plan, results: Mapping[str, Result]) -> list[Front]:
    """The front of each run with a grid of learning rates."""
    found: dict[str, dict[int, list[Point]]] = {}
    for cell in plan.tuning_cells():
        if cell.key in results:
            found.setdefault(cell.run.name, {}).setdefault(cell.seed, []).append(_point(results[cell.key]))

    def mean(points: Sequence[Point]) -> Point:
        return Point(*(sum(values) / len(points) for values in zip(*map(astuple, points), strict=True)))

    return [
        Front(
            run,
            tuple(mean(points) for points in zip(*found[run.name].values(), strict=True)),
            tuple(map(tuple, found[run.name].values())),
        )
        for run in plan.runs
        if run.name in found
    ]


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
