"""lm-eval-harness' results -> scores with their items, and how far two models are apart on the same items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sails_align.evaluation.metrics import Estimate, estimate


@dataclass(frozen=True)
class Score:
    """A metric of a task (or a group of tasks)."""

    task: str
    metric: str
    filter: str
    value: float
    """As lm-eval aggregates it."""
    stderr: float | None
    """lm-eval's."""
    higher_is_better: bool
    n: int
    by_item: Mapping[tuple[str, int], float] | None = None
    """By task and item, where the value is the mean over these; else None."""

    @property
    def name(self) -> str:
        """As lm-eval has it in its results."""
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class Difference:
    """The model's score minus the base model's, on the same items."""

    score: Score
    base: Score
    difference: float
    estimate: Estimate | None
    """The mean of the paired differences, with a 95% bootstrap interval; None where the metric is no mean."""

    @property
    def is_drop(self) -> bool:
        """Whether the model is worse, and the interval says that it is not by chance."""
        if self.estimate is None or self.estimate.ci_low is None or self.estimate.ci_high is None:
            return False
        return self.estimate.ci_high < 0 if self.score.higher_is_better else self.estimate.ci_low > 0


def read_scores(results: Mapping[str, Any]) -> list[Score]:
    """All metrics of all tasks and groups that are numbers."""
    found = []
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, comma, filter_name = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            better = results["higher_is_better"].get(task, {}).get(metric)
            by_item = _by_item(results, task, metric, filter_name)
            n = len(by_item) if by_item else values.get("sample_len", 0)
            mean = sum(by_item.values()) / len(by_item) if by_item else None
            found.append(
                Score(
                    task,
                    metric,
                    filter_name,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    better is not False,
                    n,
                    by_item if mean is not None and abs(mean - value) < 1e-9 else None,
                )
            )
    return found


def _by_item(results: Mapping[str, Any], task: str, metric: str, filter_name: str) -> dict[tuple[str, int], float]:
    """The metric of each item of a task, or of all tasks of a group; empty where an item's is no number."""
    found = {}
    for leaf in _leaves(results.get("group_subtasks", {}), task):
        for sample in results["samples"].get(leaf, ()):
            value = sample.get(metric)
            if sample["filter"] != filter_name:
                continue
            if not isinstance(value, int | float):
                return {}
            found[leaf, int(sample["doc_id"])] = float(value)
    return found


def _leaves(children: Mapping[str, Sequence[str]], name: str) -> list[str]:
    if not children.get(name):
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(children, child)]


def compare(scores: Sequence[Score], base: Sequence[Score]) -> list[Difference]:
    """Differences of all scores that both have, paired by item."""
    of_base = {(score.task, score.name): score for score in base}
    found = []
    for score in scores:
        other = of_base.get((score.task, score.name))
        if other is not None:
            found.append(Difference(score, other, score.value - other.value, _paired(score, other)))
    return found


def _paired(score: Score, base: Score) -> Estimate | None:
    if score.by_item is None or base.by_item is None or score.by_item.keys() != base.by_item.keys():
        return None
    return estimate([value - base.by_item[item] for item, value in score.by_item.items()], span=(-1.0, 1.0))
