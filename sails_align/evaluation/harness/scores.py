"""Read lm-eval-harness' results as scores with their items, and compare two models on the same items."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sails_align.evaluation.intervals import ANY, Span, over_prompts, span_of_difference


@dataclass(frozen=True)
class Score:
    """A metric of a task (or a group of tasks)."""

    task: str
    name: str
    """The metric, a comma, the filter, as in lm-eval's results."""
    value: float
    """As lm-eval aggregates it."""
    stderr: float | None
    """lm-eval's."""
    higher_is_better: bool
    n: int
    by_item: Mapping[tuple[str, int], float] | None = None
    """By task and item, where the value is the mean over these; else None."""
    chance: float | None = None
    """Expected value when guessing, if the task's metadata says it."""

    def to_json(self) -> dict[str, Any]:
        """Return it as it is in `metrics.json`, with a 95% interval over items."""
        values = list((self.by_item or {}).values())
        low, high = over_prompts(values, _span(values)) if values else (None, None)
        return {
            "value": finite(self.value),
            "ci_low": low,
            "ci_high": high,
            "stderr": None if self.stderr is None else finite(self.stderr),
            "n": self.n,
            "higher_is_better": self.higher_is_better,
            "chance": self.chance,
        }

    def minus(self, base: "Score") -> dict[str, Any]:
        """Return the difference from the base model's score, and whether it is a drop.

        The interval (95%) pairs by item; there is none where the metric is no mean over the same items. A
        drop is a difference for the worse whose interval excludes zero.
        """
        ours, theirs = self.by_item or {}, base.by_item or {}
        paired = [value - theirs[item] for item, value in ours.items()] if ours.keys() == theirs.keys() else []
        span = span_of_difference(_span([*ours.values(), *theirs.values()]))
        low, high = over_prompts(paired, span) if paired else (None, None)
        is_lower, is_higher = high is not None and high < 0, low is not None and low > 0
        return {
            "difference": {"value": finite(self.value - base.value), "ci_low": low, "ci_high": high, "n": self.n},
            "is_drop": is_lower if self.higher_is_better else is_higher,
        }


def _span(values: Sequence[float]) -> Span:
    """Return the range of a metric of items: 0 to 1, unless one is outside of it."""
    return (0.0, 1.0) if all(0 <= value <= 1 for value in values) else ANY


@dataclass(frozen=True)
class HarnessResult:
    """The scores of a model."""

    scores: tuple[Score, ...]
    samples: Mapping[str, list[dict[str, Any]]]
    """lm-eval's, by task."""
    setup: Mapping[str, Any]
    """JSON-able: chat template, BOS, effect of the adapter, versions of the tasks, few-shot examples."""

    @property
    def prompt_hashes(self) -> dict[tuple[str, int], str]:
        """Hashes of the requests, by task and item, to tell whether two models were asked the same."""
        return {
            (task, sample["doc_id"]): sample["prompt_hash"]
            for task, samples in self.samples.items()
            for sample in samples
        }


def finite(value: float) -> float | None:
    """Return the number, or None if JSON cannot hold it."""
    return float(value) if math.isfinite(value) else None


def read_scores(results: Mapping[str, Any]) -> list[Score]:
    """Return all metrics of all tasks and groups that are numbers."""
    return [
        _score(results, task, name, value)
        for task, values in results["results"].items()
        for name, value in values.items()
        if "," in name and not name.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
    ]


def _score(results: Mapping[str, Any], task: str, name: str, value: float) -> Score:
    metric, _, filter_name = name.partition(",")
    values = results["results"][task]
    stderr = values.get(f"{metric}_stderr,{filter_name}")
    by_item = _by_item(results, task, metric, filter_name)
    mean = sum(by_item.values()) / len(by_item) if by_item else math.inf
    chance = (results["configs"].get(task, {}).get("metadata") or {}).get("chance")
    return Score(
        task,
        name,
        float(value),
        float(stderr) if isinstance(stderr, int | float) else None,
        results["higher_is_better"].get(task, {}).get(metric) is not False,
        len(by_item) or values.get("sample_len", 0),
        by_item if abs(mean - value) < 1e-9 else None,
        float(chance) if isinstance(chance, int | float) else None,  # YAML's 1/4 is a text
    )


def _by_item(results: Mapping[str, Any], task: str, metric: str, filter_name: str) -> dict[tuple[str, int], float]:
    """Return the metric of each item of a task, or of all tasks of a group; empty where an item's is no number."""
    by_item = {}
    for leaf in _leaves(results.get("group_subtasks", {}), task):
        for sample in results["samples"].get(leaf, ()):
            value = sample.get(metric)
            if sample["filter"] != filter_name:
                continue
            if not isinstance(value, int | float):
                return {}
            by_item[leaf, int(sample["doc_id"])] = float(value)
    return by_item


def _leaves(children: Mapping[str, Sequence[str]], name: str) -> list[str]:
    if not children.get(name):
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(children, child)]
