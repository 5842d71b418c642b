"""What evaluations print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = {
    "safety_rate": "safety rate (%)",
    "harmfulness": "harmfulness (1-5)",
    "high_risk_rate": "high risk (%)",
    "attack_success_rate": "attack success, score 4 or 5 (%)",
    "attack_success_rate_5": "attack success, score 5 (%)",
    "over_refusal_rate": "over-refusal (%)",
    "correct_answer_rate": "correct answers (%)",
    "helpfulness": "helpfulness (1-10)",
    "win_rate": "win rate (%)",
}
SPLITS = {"harmful": "trained categories", "ood": "new categories", "dual_use": "dual use"}
"""The testbed's sets, in other words than its files have."""
IN_COLUMNS = ("safety_rate", "harmfulness", "over_refusal_rate", "correct_answer_rate", "helpfulness", "win_rate")
"""What is shown of each category."""


def show_rates(metrics: Mapping[str, Any], title: str, folder: Path) -> None:
    """Print the rates over all prompts, then those of each category, notes, and where the files are."""
    console = Console()
    table = Table(title=title)
    for heading in ("", "value", "95% interval", "n", "unscored", "bounds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in metrics["overall"].items():
        table.add_row(LABELS.get(name, name), *_cells(value, _scale(name)))
    splits = metrics.get("by_split", {})
    for split, rates in splits.items() if len(splits) > 1 else ():
        for name, value in rates.items():
            if name in ("safety_rate", "over_refusal_rate"):
                table.add_row(f"  {SPLITS.get(split, split)}: {LABELS[name]}", *_cells(value, _scale(name)))
    console.print(table)
    if len(metrics["by_category"]) > 1:
        console.print(_by_category(metrics["by_category"]))
    for line in agreement_lines(metrics.get("agreement", {})):
        _say(console, line)
    counted = metrics["unscored"]
    causes = "".join(f", {reason}: {n}" for reason, n in counted["reasons"].items())
    _say(console, f"unscored  {counted['n']} of {counted['n_verdicts']} verdicts{causes}")
    for name, of_judge in counted["by_task"].items():
        if " by " in name and of_judge["n"]:
            _say(console, f"unscored  {of_judge['n']} of {of_judge['n_verdicts']} verdicts on {name}")
    for note in metrics.get("notes", []):
        _say(console, f"note      {note}")
    for name in ("responses.jsonl", "verdicts.jsonl", "metrics.json"):
        _say(console, f"{name.partition('.')[0]:<10}{folder / name}")


def agreement_lines(agreement: Mapping[str, Any]) -> list[str]:
    """How far the judges agree, a line for each task."""
    return [
        f"agreement {task}: Krippendorff's alpha {_number(found['krippendorff_alpha'])}; Cohen's kappa "
        + ", ".join(f"{pair} {_number(value)}" for pair, value in found["cohen_kappa"].items())
        for task, found in agreement.items()
    ]


def _by_category(categories: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = [name for name in IN_COLUMNS if any(name in rates for rates in categories.values())]
    table = Table(title="By category")
    table.add_column("category")
    for heading in ("n", *(LABELS[name] for name in shown)):
        table.add_column(heading, justify="right")
    for category, rates in categories.items():
        n = max((value["n"] + value["n_unscored"] for value in rates.values()), default=0)
        cells = [_value(rates[name], _scale(name)) if name in rates else "" for name in shown]
        table.add_row(category, str(n), *cells)
    return table


def _scale(name: str) -> float:
    return 1.0 if name in ("harmfulness", "helpfulness") else 100.0


def _value(estimate: Mapping[str, Any], scale: float) -> str:
    return "unscored" if estimate["value"] is None else _round(estimate["value"], scale)


def _cells(estimate: Mapping[str, Any], scale: float) -> Sequence[str]:
    low, high = estimate["ci_low"], estimate["ci_high"]
    interval = "" if low is None else f"{_round(low, scale)} to {_round(high, scale)}"
    bounds = ""
    if estimate["n_unscored"]:
        bounds = f"{_round(estimate['bound_low'], scale)} to {_round(estimate['bound_high'], scale)}"
    return _value(estimate, scale), interval, str(estimate["n"]), str(estimate["n_unscored"]), bounds


def _round(value: float, scale: float) -> str:
    return f"{value * scale:.{1 if scale == 100.0 else 2}f}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
