"""Results of cells, made by hand: what sections of a report are tested with."""

import json
from pathlib import Path
from typing import Any

from sails_align.experiments.plan import RUNS, Cell, Plan, Run
from sails_align.experiments.studies import StudyKind
from sails_align.experiments.summary import Outcome
from sails_align.reporting.report import ReportData

STORED = Path(__file__).parent / "experiments" / "data" / "cell_format_2.json"
"""A whole result of a SAILS cell, as it was written when the format had the number 2."""
LEVELS = {"base": 0.0, "sft-lora": 0.6, "sft-sails": 0.8, "sft-full": 0.7}
"""Safety rate of each run, without what a seed changes."""


def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text())


def result(safety: float, correct: float = 0.9, **more: Any) -> dict[str, Any]:
    """A cell's result with the numbers given."""

    def number(value: float, n_unscored: int = 0) -> dict[str, Any]:
        return {"value": value, "n_unscored": n_unscored, "bound_low": value, "bound_high": value}

    names = ("safety_rate", "safety_rate_in_distribution", "safety_rate_out_of_distribution")
    return {
        "numbers": {
            **{name: number(safety) for name in names},
            "over_refusal_rate": number(1 - correct, 1),
            "correct_answer_rate": number(correct),
        },
        "by_category": {
            "theft": {"split": "harmful", "value": safety},
            "arson": {"split": "ood", "value": safety / 2},
            "music": {"split": "harmless", "value": 0.1},
        },
        "cost": {"seconds": {"train": 3.0, "evaluate": 1.0}, "trainable_share": 0.04, "steps_to_95": 8},
        **more,
    }


def outcome(
    *names: str, n_seeds: int = 3, levels: dict[str, float] | None = None, more: dict[str, dict[str, Any]] | None = None
) -> Outcome:
    """The outcome of a plan in which every seed changes all runs alike, and some a little more.

    Args:
        names: of the runs.
        n_seeds: that are reported.
        levels: of safety, by run.
        more: of results, by run.
    """
    runs = tuple(RUNS.get(name) or Run(name, name, "sft") for name in names or LEVELS)
    plan = Plan(runs=runs, n_seeds=n_seeds, n_tuning_seeds=2, learning_rates=(1e-3, 1e-2))
    chosen = {run.name: 1e-3 for run in runs if run.is_tuned}

    def of(cell: Cell) -> dict[str, Any]:
        own = {"sft-sails": 0.002, "sft-full": 0.001}.get(cell.run.name, 0.0) * (cell.seed % 2)
        safety = {**LEVELS, **(levels or {})}.get(cell.run.name, 0.5) + 0.05 * (cell.seed % 3) + own
        return result(safety, **(more or {}).get(cell.run.name, {}))

    tuned = {cell.key: of(cell) for cell in plan.tuning_cells()}
    return Outcome(plan, tuned, {cell.key: of(cell) for cell in plan.test_cells(chosen)}, chosen)


def comparison(main: Outcome, **studies: dict[str, Outcome]) -> ReportData:
    kinds: tuple[StudyKind, ...] = ("ablations", "examples", "worlds")
    return ReportData({"main": {"testbed": main}, **{kind: studies[kind] for kind in kinds if kind in studies}})
