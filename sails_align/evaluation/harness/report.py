"""What `sails eval harness` writes and prints."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sails_align.core import log
from sails_align.core.artifacts import package_versions
from sails_align.core.tables import FittedTable
from sails_align.evaluation.harness.scores import HarnessResult, finite
from sails_align.models.spec import ModelSpec

Evaluated = tuple[ModelSpec, HarnessResult]


def report(options: dict[str, Any], model: Evaluated, base: Evaluated | None) -> dict[str, Any]:
    """Return what is in `metrics.json`."""
    base_scores = {(score.task, score.name): score for score in (base[1].scores if base else ())}
    tasks: dict[str, dict[str, Any]] = {}
    for score in model[1].scores:
        values = tasks.setdefault(score.task, {})[score.name] = {"model": score.to_json()}
        if of_base := base_scores.get((score.task, score.name)):
            values |= {"base": of_base.to_json(), **score.minus(of_base)}
    return {
        "tasks": tasks,
        "same_requests": None if base is None else model[1].prompt_hashes == base[1].prompt_hashes,
        "provenance": {
            "model": _provenance(*model),
            "base": None if base is None else _provenance(*base),
            "options": options,
            "versions": {**package_versions(), "lm-eval": importlib.metadata.version("lm-eval")},
        },
    }


def _provenance(spec: ModelSpec, result: HarnessResult) -> dict[str, Any]:
    return {"name": spec.name, "identity": dict(spec.identity), "setup": dict(result.setup)}


def sample_rows(who: str, result: HarnessResult) -> Iterator[dict[str, Any]]:
    """Yield the lines of `samples.jsonl` of the model or the base."""
    for task, samples in result.samples.items():
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
    """Return what JSON can hold: lists, numbers, and anything else as text."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    return finite(value) if isinstance(value, int | float) else str(value)


def show(metrics: dict[str, Any], name: str, folder: Path) -> None:
    """Print the scores, the differences, and which of them are drops."""
    has_base = metrics["provenance"]["base"] is not None
    headings = ("task", "metric", "n", "chance", *(("base", "model", "difference") if has_base else ("model",)))
    table = FittedTable(f"Capability of {name} (95% intervals over items)", headings, n_texts=2)
    lines = []
    for task, scores in metrics["tasks"].items():
        for metric, values in scores.items():
            model, chance = values["model"], values["model"]["chance"]
            cells = [task, metric, str(model["n"]), "" if chance is None else f"{chance:.3f}"]
            if "difference" not in values:
                cells += [""] * has_base + [_cell(model)]
            else:
                cells += [_number(values["base"]["value"]), _number(model["value"]), _cell(values["difference"], "+")]
                if values["is_drop"]:
                    lines.append(f"drop      {task} {metric} {cells[-1]}")
            table.add_row(*cells)
    if metrics["same_requests"] is False:
        lines.append("note      the base model got other requests: its vocabulary or its template differs")
    lines += [f"samples   {folder / 'samples.jsonl'}", f"metrics   {folder / 'metrics.json'}"]
    log.show(table, *lines)


def _cell(value: dict[str, Any], sign: str = "") -> str:
    text = _number(value["value"], sign)
    return text if value["ci_low"] is None else f"{text} ({value['ci_low']:{sign}.3f} to {value['ci_high']:{sign}.3f})"


def _number(value: float | None, sign: str = "") -> str:
    return "undefined" if value is None else f"{value:{sign}.3f}"
