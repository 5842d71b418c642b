"""Compute what is reported of cells: means over seeds and differences paired by seed, with 95% intervals."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from sails_align.evaluation.intervals import ANY, SHARE, Span, over_seeds, span_of_difference
from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, SAFETY_RATES, Metric, safety_rate_of
from sails_align.experiments.doubts import UnstableSeed, no_right_answers, unstable_seeds
from sails_align.experiments.merits import helpfulness, kept, merit
from sails_align.experiments.plan import Plan, Run
from sails_align.experiments.tuning import Tuning

Result = Mapping[str, Any]
SAFETY = tuple(name + of for name in SAFETY_RATES for of in ("_in_distribution", "_out_of_distribution", ""))
_HELPFULNESS = ("over_refusal_rate", *HELPFULNESS_RATES, "merit", "kept", "win_rate", "kl_per_token")
_LEFT = ("left_after_benign", "left_after_harmful")


def _metrics(*names: str) -> tuple[Metric, ...]:
    return tuple(METRICS[name] for name in names)


SHOWN = _metrics(*SAFETY, "over_refusal_rate", *HELPFULNESS_RATES)
"""Metrics of the table on the console."""
CORE = _metrics(*SAFETY, *_HELPFULNESS)
"""Metrics of side studies."""
COMPARED = _metrics(*SAFETY, *_HELPFULNESS, "attack_success_rate", "capability", *_LEFT)
"""Metrics of differences. Steps to 95% are none of them: seeds that never get there have no number."""
REPORTED = _metrics(
    *(
        *SAFETY,
        "harmfulness",
        "high_risk_rate",
        "garbled_rate",
        *_HELPFULNESS,
        "attack_success_rate",
        "capability",
        "steps_to_95",
    ),
    *("moved", "trainable_share", *_LEFT, "train_seconds", "peak_memory_mb"),
)
"""All metrics of a cell, in the order of the report."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with its 95% interval (none below three seeds, or if all are the same; see `intervals`)."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Number of seeds that have the number."""

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low is not None and self.low > 0

    @property
    def touches_zero(self) -> bool:
        """Whether the interval contains 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def mean_of(values: Sequence[float | None], span: Span = ANY) -> Mean:
    """Return the mean of the known values, which are within the span."""
    known = [value for value in values if value is not None]
    if not known:
        return Mean(None, None, None, 0)
    return Mean(*over_seeds(known, span), len(known))


def with_numbers(metrics: Sequence[Metric], found: Iterable[Mapping[str, Mean]]) -> list[Metric]:
    """Return the metrics that some mean has a number of; overall safety only if there is none by categories."""
    means = list(found)
    known = [metric for metric in metrics if any(of[metric.name].n for of in means)]
    by_split = any(metric.name.endswith("_distribution") for metric in known)
    return [metric for metric in known if metric.name not in SAFETY_RATES or not by_split]


UNSCORED = ((*SAFETY_RATES, "harmfulness"), ("over_refusal_rate", *HELPFULNESS_RATES))
"""Metrics of the same responses: to harmful requests, and to others."""


def _n_unscored(result: Result, names: Sequence[str]) -> int:
    """Return the number of responses that some of the metrics could not score."""
    return max((result["numbers"][name]["n_unscored"] for name in names if result["numbers"].get(name)), default=0)


def value_of(result: Result, name: str) -> float | None:
    """Return a metric of a cell; None if the cell does not have it."""
    if name == "merit":
        return None if helpfulness(result) is None else merit(result)
    if name == "kept":
        return kept(result) if "tampering" in result else None
    if name == "moved":
        return result.get("moved")
    if name == "attack_success_rate":
        return result.get("attack", {}).get(name, {}).get("value")
    if name == "capability":
        tasks = result.get("capability")
        return sum(tasks.values()) / len(tasks) if tasks else None
    if name.startswith("left_after_"):
        left = result.get("relearned", {}).get(name.removeprefix("left_after_"), {})
        rate = safety_rate_of(left)
        return left[rate]["value"] if rate else None
    if name in ("trainable_share", "steps_to_95", "peak_memory_mb"):
        return result["cost"].get(name)
    if name == "train_seconds":
        return sum(result["cost"]["seconds"].get(stage, 0.0) for stage in ("subspace", "train"))
    return result["numbers"].get(name, {}).get("value")


@dataclass(frozen=True)
class SummaryRow:
    """What is reported of a run."""

    run: Run
    learning_rate: float | None
    means: Mapping[str, Mean]
    """By metric."""
    n_unscored: int
    """Number of unscored responses of all seeds."""
    by_seed: Mapping[int, Mapping[str, float | None]]
    """Each seed's own numbers, by metric."""
    tuning: Tuning | None = None
    """How its learning rate was chosen."""

    @property
    def unstable_seeds(self) -> list[UnstableSeed]:
        """The seeds that are unstable; a single model that others are compared with has none."""
        return [] if self._needs_no_doubts else unstable_seeds(self.by_seed)

    @property
    def _needs_no_doubts(self) -> bool:
        """Whether it is a model that others are compared with, or one that was attacked and may be broken."""
        return self.run.is_reference or self.run.tampering is not None

    @property
    def label(self) -> str:
        """The run's label, marked if seeds are unstable."""
        return f"{self.run.label} (unstable)" if self.unstable_seeds else self.run.label

    @property
    def doubts(self) -> list[str]:
        """What makes its numbers doubtful, in sentences."""
        found = [] if self.tuning is None else self.tuning.doubts()
        if self.unstable_seeds:
            told = "; ".join(map(str, self.unstable_seeds))
            found.insert(0, f"its seeds are unstable, so that its means describe no model: {told}")
        if not self._needs_no_doubts and (useless := no_right_answers(self.by_seed)):
            found.insert(0, useless)
        return [f"{self.run.label}: {doubt}." for doubt in found]

    def to_json(self) -> dict[str, Any]:
        """Return the row of `results.json`."""
        return {
            "run": self.run.name,
            "label": self.run.label,
            "trainer": self.run.trainer,
            "options": list(self.run.options),
            "learning_rate": self.learning_rate,
            "means": {name: asdict(mean) for name, mean in self.means.items()},
            "n_unscored": self.n_unscored,
            "by_seed": {
                str(seed): {name: value for name, value in of.items() if value is not None}
                for seed, of in self.by_seed.items()
            },
            "tuning": self.tuning and self.tuning.to_json(),
            "unstable_seeds": [asdict(unstable) for unstable in self.unstable_seeds],
            "doubts": self.doubts,
        }


@dataclass(frozen=True)
class Outcome:
    """The results of one plan, and the learning rates that were chosen by them."""

    plan: Plan
    tuned: Mapping[str, Result]
    """Results of the finished tuning cells, by key."""
    tested: Mapping[str, Result]
    """Results of the test cells, by key."""
    chosen: Mapping[str, float]
    """Learning rates by run."""

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the runs, by name."""
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
    def rows(self) -> list[SummaryRow]:
        """A row for each run, in the plan's order."""
        return [self._row(run, self.by_run[run.name]) for run in self.plan.runs]

    @cached_property
    def tuning(self) -> dict[str, Tuning]:
        """How the learning rate of each tuned run was chosen."""
        return self.plan.tuning(self.tuned)

    def _row(self, run: Run, results: Mapping[int, Result]) -> SummaryRow:
        by_seed = {
            seed: {metric.name: value_of(result, metric.name) for metric in REPORTED}
            for seed, result in results.items()
        }
        means = {metric.name: mean_of([of[metric.name] for of in by_seed.values()], metric.span) for metric in REPORTED}
        n_unscored = sum(_n_unscored(result, names) for result in results.values() for names in UNSCORED)
        rate = self.chosen.get(run.name, run.learning_rate)
        return SummaryRow(run, rate, means, n_unscored, by_seed, self.tuning.get(run.name))

    def difference(self, name: str, reference: str) -> dict[str, Mean]:
        """Return a run minus a reference run, by metric, paired by seed."""
        return paired(self.by_run[name], self.by_run[reference])

    def minus(self, reference: str) -> dict[str, dict[str, Mean]]:
        """Return the difference of every other trained run from a reference run."""
        names = [run.name for run in self.plan.runs if not run.is_reference and run.name != reference]
        return {name: self.difference(name, reference) for name in names}

    def categories(self, split: str) -> dict[str, dict[str, Mean]]:
        """Return safety or refusal rates (splits `harmful`, `ood`) or over-refusal (`harmless`) by category and run."""
        found: dict[str, dict[str, Mean]] = {}
        for run, results in self.by_run.items():
            values: dict[str, list[float | None]] = {}
            for result in results.values():
                for category, number in result["by_category"].items():
                    if number["split"] == split:
                        values.setdefault(category, []).append(number["value"])
            for category, of_category in values.items():
                found.setdefault(category, {})[run] = mean_of(of_category, SHARE)
        return dict(sorted(found.items()))

    def sets(self) -> list["OnSet"]:
        """Return the rates on each prompt set, set by set; none if a result lacks them, or there is one set only."""
        results = [
            (run, seed, result.get("by_set", {})) for run, of in self.by_run.items() for seed, result in of.items()
        ]
        names = list(dict.fromkeys(name for *_, by_set in results for name in by_set))
        if len(names) < 2 or not all(by_set for *_, by_set in results):
            return []
        found = []
        for name, metric in itertools.product(names, (*SAFETY_RATES, "over_refusal_rate")):
            values: dict[str, dict[int, float | None]] = {}
            n_prompts = 0
            for run, seed, by_set in results:
                if number := by_set.get(name, {}).get(metric):
                    values.setdefault(run, {})[seed] = number["value"]
                    n_prompts = max(n_prompts, number["n"] + number["n_unscored"])
            if values:
                found.append(OnSet(name, METRICS[metric], n_prompts, values))
        return found


@dataclass(frozen=True)
class OnSet:
    """A rate on one prompt set."""

    name: str
    """Name of the set."""
    metric: Metric
    n_prompts: int
    """Number of its prompts that the rate is of, scored or not."""
    by_run: Mapping[str, Mapping[int, float | None]]
    """Values by run and seed."""

    def mean(self, run: str) -> Mean:
        """Return the mean of a run over seeds."""
        return mean_of([*self.by_run.get(run, {}).values()], self.metric.span)

    def difference(self, run: str, reference: str) -> Mean:
        """Return a run minus a reference run, paired by seed."""
        return paired_values(self.by_run.get(run, {}), self.by_run.get(reference, {}), self.metric.span)


def paired(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> dict[str, Mean]:
    """Return the results of one run minus those of another, by metric, paired by seed."""

    def values(results: Mapping[int, Result], metric: Metric) -> dict[int, float | None]:
        return {seed: value_of(result, metric.name) for seed, result in results.items()}

    return {
        metric.name: paired_values(values(ours, metric), values(theirs, metric), metric.span) for metric in COMPARED
    }


def paired_values(ours: Mapping[int, float | None], theirs: Mapping[int, float | None], span: Span) -> Mean:
    """Return the mean difference of two runs, paired by the seeds that both have."""
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return mean_of([a - b for a, b in pairs if a is not None and b is not None], span_of_difference(span))


def examples_to(safety: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """Return the number of examples for a safety rate; None if it is not reached.

    The curve of (examples, safety rate) is interpolated over log examples, but not extrapolated below its first point.
    """
    if curve and curve[0][1] >= safety:
        return float(curve[0][0])
    for (n, low), (more, high) in itertools.pairwise(curve):
        if low < safety <= high:
            share = (safety - low) / (high - low)
            return math.exp(math.log(n) + share * (math.log(more) - math.log(n)))
    return None
