"""What was measured, beside what the paper reports."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.evaluation.metrics import Estimate
from sails_align.experiments.commands import capability
from sails_align.experiments.reproduction.plan import Reproduction


@dataclass(frozen=True)
class Column:
    """A number of the table."""

    label: str
    kind: str
    """The evaluation that measures it."""
    path: tuple[str, ...]
    """Where it is in that evaluation's metrics.json."""
    scale: float = 100.0
    digits: int = 1


PAPER: dict[str, dict[str, dict[str, str]]] = {
    "google/gemma-2-9b": {
        "sft-sails": {"safety rate, hh-rlhf (%)": "99.6"},
        "sft-full": {"safety rate, hh-rlhf (%)": "92.2"},
    }
}
"""What arXiv 2512.23260 reports, as far as it is known here: model -> run -> column."""


def table(of: Reproduction) -> str:
    """Markdown: a row for each run; what is not measured yet is empty. The paper's numbers are in brackets."""
    columns = [
        column
        for column in _columns(of)
        if column.kind != "helpfulness" or any(_cell(of, run.name, column) for run in of.runs)
    ]
    tasks = sorted({task for run in of.runs for task in _harness(of, run.name)})
    head = ["run", *(column.label for column in columns), *tasks]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in of.runs:
        reported = PAPER.get(of.model, {}).get(run.name, {})
        cells = [_cell(of, run.name, column) for column in columns]
        cells = [
            f"{cell} [{reported[column.label]}]".strip() if column.label in reported else cell
            for cell, column in zip(cells, columns, strict=True)
        ]
        scores = _harness(of, run.name)
        lines.append("| " + " | ".join([run.label, *cells, *(scores.get(task, "") for task in tasks)]) + " |")
    return "\n".join(lines) + "\n"


def _columns(of: Reproduction) -> Iterator[Column]:
    known, new = of.protocol.in_distribution, of.protocol.out_of_distribution
    for name in dict.fromkeys(name for name in (known, new) if name is not None):
        yield Column(f"safety rate, {name} (%)", "safety", ("by_split", name, "safety_rate"))
        yield Column(f"harmfulness, {name} (1-5)", "safety", ("by_split", name, "harmfulness"), 1.0, 2)
    yield Column("over-refusal (%)", "safety", ("overall", "over_refusal_rate"))
    yield Column("GCG, score 5 (%)", "gcg", ("attacks", "gcg", "attack_success_rate_5"))
    yield Column("GCG, score 4 or 5 (%)", "gcg", ("attacks", "gcg", "attack_success_rate"))
    yield Column("helpfulness (1-10)", "helpfulness", ("overall", "helpfulness"), 1.0, 2)
    yield Column("right answers (%)", "helpfulness", ("overall", "correct_answer_rate"))
    yield Column("win rate (%)", "helpfulness", ("overall", "win_rate"))


def _read(of: Reproduction, run: str, kind: str) -> Mapping[str, Any]:
    path: Path = of.output_dir / "evaluated" / run / kind / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete its folder to measure it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no metrics; delete its folder to measure it again")
    return found


def _cell(of: Reproduction, run: str, column: Column) -> str:
    value: Any = _read(of, run, column.kind)
    for key in column.path:
        value = value.get(key, {})
    if not value:
        return ""
    found = Estimate(**value)
    if found.value is None:
        return "unscored"
    numbers = [found.value, found.ci_low, found.ci_high]
    mean, low, high = (f"{column.scale * number:.{column.digits}f}" for number in numbers if number is not None)
    return f"{mean} ({low} to {high})"


def _harness(of: Reproduction, run: str) -> dict[str, str]:
    """Of each task asked for, the first score."""
    measured = _read(of, run, "harness")
    return {f"{task} (%)": f"{100 * value:.1f}" for task, value in capability(measured).items()} if measured else {}
