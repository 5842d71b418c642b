"""Show what was measured beside what the paper reports."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sails_align.evaluation.metrics import METRICS, SAFETY_RATES, Estimate
from sails_align.evaluation.output import METRICS_FILE
from sails_align.experiments.commands import capability, read_result
from sails_align.experiments.reproduction.plan import Reproduction

PAPER: dict[str, dict[str, dict[str, str]]] = {
    "google/gemma-2-9b": {
        "sft-sails": {"safety rate, hh-rlhf (%)": "99.6"},
        "sft-full": {"safety rate, hh-rlhf (%)": "92.2"},
    }
}
"""Known results of arXiv 2512.23260: model -> run -> column."""


Column = tuple[str, str, tuple[str, ...]]
"""Heading, evaluation, and place in its metrics.json, which ends with the name of a metric."""


def table(plan: Reproduction) -> str:
    """Return a Markdown table with a row for each run; unknown numbers are empty, the paper's are in brackets.

    Raises `InputError` if a result cannot be read.
    """
    columns = [
        column
        for column in _columns(plan)
        if not (column[1] in ("helpfulness", "divergence") or column[2][-1] == "refusal_rate")
        or any(_cell(plan, run.name, column) for run in plan.runs)
    ]
    tasks = sorted({task for run in plan.runs for task in _harness(plan, run.name)})
    rows = [["run", *(heading for heading, _, _ in columns), *tasks]]
    rows.append(["---"] * len(rows[0]))
    for run in plan.runs:
        paper, scores = PAPER.get(plan.model, {}).get(run.name, {}), _harness(plan, run.name)
        row = [run.label]
        for column in columns:
            reported = f"[{paper[column[0]]}]" if column[0] in paper else ""
            row.append(f"{_cell(plan, run.name, column)} {reported}".strip())
        rows.append([*row, *(scores.get(task, "") for task in tasks)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _columns(plan: Reproduction) -> Iterator[Column]:
    for prompts in dict.fromkeys((plan.protocol.in_distribution, plan.protocol.out_of_distribution)):
        for name in (*SAFETY_RATES, "harmfulness") if prompts is not None else ():
            yield _heading(name, f", {prompts}"), "safety", ("by_split", str(prompts), name)
    yield _heading("over_refusal_rate"), "safety", ("overall", "over_refusal_rate")
    for name in ("attack_success_rate_5", "attack_success_rate"):
        yield _heading(name, ", GCG"), "gcg", ("attacks", "gcg", name)
    for name in ("helpfulness", "correct_answer_rate", "win_rate", "likeness"):
        yield _heading(name), "helpfulness", ("overall", name)
    yield _heading("kl_per_token"), "divergence", ("overall", "kl_per_token")


def _heading(name: str, prompts: str = "") -> str:
    return replace(METRICS[name], label=METRICS[name].label + prompts).heading


def _read(plan: Reproduction, run: str, kind: str) -> Mapping[str, Any]:
    path = plan.output_dir / "evaluated" / run / kind / METRICS_FILE
    return read_result(path) if path.exists() else {}


def _cell(plan: Reproduction, run: str, column: Column) -> str:
    _, kind, place = column
    value: Any = _read(plan, run, kind)
    for key in place:
        value = value.get(key, {})
    return METRICS[place[-1]].with_interval(Estimate(**value)) if value else ""


def _harness(plan: Reproduction, run: str) -> dict[str, str]:
    """Return the first score of each task."""
    measured = _read(plan, run, "harness")
    return {f"{task} (%)": f"{100 * value:.1f}" for task, value in capability(measured).items()} if measured else {}
