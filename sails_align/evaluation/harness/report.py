"""What `sails eval harness` writes and prints."""

import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.core.artifacts import package_versions
from sails_align.evaluation.harness.run import HarnessResult
from sails_align.evaluation.harness.scores import Difference, Score, compare
from sails_align.evaluation.metrics import estimate
from sails_align.models.spec import ModelSpec

Evaluated = tuple[ModelSpec, HarnessResult]


def report(
    options: dict[str, Any], model: Evaluated, base: Evaluated | None, chance: Mapping[str, float]
) -> dict[str, Any]:
    """Return what is in `metrics.json`; `chance` is the share of right answers by guessing, by task, where known."""
    (spec, result), tasks = model, {}
    for score in result.scores:
        tasks.setdefault(score.task, {})[score.name] = {"model": _score(score, chance)}
    if base is not None:
        for found in compare(result.scores, base[1].scores):
            tasks[found.score.task][found.score.name] |= {"base": _score(found.base, chance), **_difference(found)}
    return {
        "tasks": tasks,
        "same_requests": None if base is None else result.prompt_hashes == base[1].prompt_hashes,
        "provenance": {
            "model": _provenance(spec, result),
            "base": None if base is None else _provenance(*base),
            "options": options,
            "versions": {**package_versions(), "lm-eval": importlib.metadata.version("lm-eval")},
        },
    }


def _score(score: Score, chance: Mapping[str, float]) -> dict[str, Any]:
    items = None if score.by_item is None else estimate(list(score.by_item.values()))
    return {
        "value": _finite(score.value),
        "ci_low": None if items is None else items.ci_low,
        "ci_high": None if items is None else items.ci_high,
        "stderr": None if score.stderr is None else _finite(score.stderr),
        "n": score.n,
        "higher_is_better": score.higher_is_better,
        "chance": chance.get(score.task),
    }


def _difference(found: Difference) -> dict[str, Any]:
    paired = found.estimate
    difference = {
        "value": _finite(found.difference),
        "ci_low": None if paired is None else paired.ci_low,
        "ci_high": None if paired is None else paired.ci_high,
        "n": found.score.n if paired is None else paired.n,
    }
    return {"difference": difference, "is_drop": found.is_drop}


def _provenance(spec: ModelSpec, result: HarnessResult) -> dict[str, Any]:
    return {"name": spec.name, "identity": dict(spec.identity), "setup": dict(result.setup)}


def sample_rows(who: str, result: HarnessResult | None) -> Iterator[dict[str, Any]]:
    """The lines of `samples.jsonl` of the model or the base."""
    for task, samples in {} if result is None else result.samples.items():
        for sample in samples:
            yield {
                "who": who,
                "task": task,
                "item": sample["doc_id"],
                "filter": sample["filter"],
                "requests": [list(map(str, arguments)) for arguments in sample["arguments"]],
                "responses": _plain(sample["resps"]),
                "filtered": _plain(sample["filtered_resps"]),
                "target": str(sample["target"]),
                "metrics": {name: _plain(sample[name]) for name in sample["metrics"]},
            }


def _plain(value: Any) -> Any:
    """What JSON can hold: lists, numbers, and anything else as text."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return _finite(value) if isinstance(value, int | float) else str(value)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def show(metrics: dict[str, Any], name: str, folder: Path) -> None:
    """Print the scores, the differences, and which of them are drops."""
    has_base = metrics["provenance"]["base"] is not None
    table = Table(title=f"Capability of {name} (95% intervals over items)")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in ("n", "chance", *(("base", "model", "difference") if has_base else ("model",))):
        table.add_column(heading, justify="right")
    drops = []
    for task, scores in metrics["tasks"].items():
        for metric, values in scores.items():
            model, chance = values["model"], values["model"]["chance"]
            cells = [task, metric, str(model["n"]), "" if chance is None else f"{chance:.3f}"]
            if "difference" not in values:
                cells += [""] * has_base + [_cell(model)]
            else:
                cells += [_number(values["base"]["value"]), _number(model["value"]), _cell(values["difference"], "+")]
                if values["is_drop"]:
                    drops.append(f"{task} {metric} {cells[-1]}")
            table.add_row(*cells)
    console = Console()
    console.print(table)
    lines = [f"drop      {drop}" for drop in drops]
    if metrics["same_requests"] is False:
        lines.append("note      the base model was not asked the same texts: it has other words or another template")
    for file in ("samples.jsonl", "metrics.json"):
        lines.append(f"{file.partition('.')[0]:<10}{folder / file}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _cell(value: dict[str, Any], sign: str = "") -> str:
    text = _number(value["value"], sign)
    return text if value["ci_low"] is None else f"{text} ({value['ci_low']:{sign}.3f} to {value['ci_high']:{sign}.3f})"


def _number(value: float | None, sign: str = "") -> str:
    return "undefined" if value is None else f"{value:{sign}.3f}"
