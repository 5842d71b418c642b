"""Print the results of evaluations."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sails_align.core.log import show
from sails_align.core.tables import FittedTable
from sails_align.evaluation.inspect_log import INSTALL, can_write_log
from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, SAFETY_RATES, Estimate
from sails_align.evaluation.output import METRICS_FILE, RESPONSES_FILE, VERDICTS_FILE

SPLITS = {"harmful": "trained categories", "ood": "held-out categories", "dual_use": "dual use"}
"""The testbed's prompt sets, in words."""
BY_SPLIT = {*SAFETY_RATES, "over_refusal_rate"}
"""Metrics shown for each prompt set."""
IN_COLUMNS = (*SAFETY_RATES, "harmfulness", "over_refusal_rate", *HELPFULNESS_RATES, "win_rate")
"""Metrics shown for each category."""


def show_rates(metrics: Mapping[str, Any], title: str, folder: Path) -> None:
    """Print the rates over all prompts, then those of each category, notes, and where the files are."""
    splits = metrics.get("by_split", {})
    named = [(METRICS[name].heading, name, value) for name, value in metrics["overall"].items()]
    for judge, rates in metrics["judges"].items():  # grades, if some judges give none
        named += [
            (f"{METRICS[name].heading}, {judge}", name, rates[name]) for name in rates if name not in metrics["overall"]
        ]
    for split, rates in splits.items() if len(splits) > 1 else ():
        shown = [name for name in rates if name in BY_SPLIT]
        named += [(f"  {heading_on_set(name, split, splits)}", name, rates[name]) for name in shown]
    all_scored = not any(value["n_unscored"] for _, _, value in named)
    headings = ("", "value", "95% interval", "n") + (() if all_scored else ("unscored", "bounds"))
    rows = [(heading, *_cells(name, value))[: len(headings)] for heading, name, value in named]
    show(FittedTable(title, headings, rows))
    if len(metrics["by_category"]) > 1:
        show(*_by_category(metrics["by_category"]))
    _show_rest(metrics, folder)
    _show_viewers(folder)


def show_comparison(
    comparison: Mapping[str, Any], title: str, of_both: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Print the rates of a model and of the one that it is compared with, notes, and where the files are.

    Args:
        comparison: the contents of `comparison.json`.
        title: of the table.
        of_both: their `metrics.json`: the model's, and the other one's.
        folder: of the evaluation.
    """
    other = "base" if comparison["compared"] == "base" else "other"
    table = FittedTable(title, ("", other, "model", "difference", "95% interval", "n"))
    for name, row in comparison["overall"].items():
        table.add_row(METRICS[name].heading, *_compared_cells(name, row))
    splits = comparison["by_split"]
    for split, rows in splits.items() if len(splits) > 1 else ():
        for name, row in rows.items():
            if name in BY_SPLIT:
                table.add_row(f"  {heading_on_set(name, split, splits)}", *_compared_cells(name, row))
    show(table)
    for metrics, where in zip(of_both, (folder, folder / "compared"), strict=True):
        _show_rest(metrics, where)
    show(f"compared  {folder / 'comparison.json'}")
    _show_viewers(folder)


def _compared_cells(name: str, row: Mapping[str, Any]) -> Sequence[str]:
    text, difference = METRICS[name].text, row["difference"]
    values = text(row["compared"]["value"]), text(row["model"]["value"])
    if difference is None:  # the judges of one of them give no grades, or nothing is scored
        return *values, "", "", "0"
    value, low, high = (
        f"{'+' if number > 0 else ''}{text(number)}"
        for number in (difference["value"], difference["ci_low"], difference["ci_high"])
    )
    return *values, value, f"{low} to {high}", str(difference["n"])


def show_attacks(metrics: Mapping[str, Any], model: str, folder: Path) -> None:
    """Print the success rates of each attack, notes, and where the files are."""
    shown = list(next(iter(metrics["attacks"].values())))
    headings = ("attack", *(METRICS[name].heading for name in shown), "n", "unscored")
    table = FittedTable(f"Attacks on {model} (95% intervals over prompts)", headings)
    for attack, rates in metrics["attacks"].items():
        cells = [METRICS[name].with_interval(Estimate(**rates[name])) for name in shown]
        counts = rates[shown[0]]
        table.add_row(attack, *cells, str(counts["n"]), str(counts["n_unscored"]))
    show(table)
    _show_rest(metrics, folder)
    _show_viewers(folder)


def _show_rest(metrics: Mapping[str, Any], folder: Path) -> None:
    for task, found in metrics.get("agreement", {}).items():
        kappas = ", ".join(f"{pair} {_number(value)}" for pair, value in found["cohen_kappa"].items())
        alpha = _number(found["krippendorff_alpha"])
        show(f"agreement {task}: Krippendorff's alpha {alpha}; Cohen's kappa {kappas}")
    counted = metrics["unscored"]
    causes = "".join(f", {reason}: {n}" for reason, n in counted["reasons"].items())
    show(f"unscored  {counted['n']} of {counted['n_verdicts']} verdicts{causes}")
    for name, of_judge in counted["by_task"].items():
        if " by " in name and of_judge["n"]:
            show(f"unscored  {of_judge['n']} of {of_judge['n_verdicts']} verdicts on {name}")
    for note in metrics.get("notes", []):
        show(f"note      {note}")
    for name in (RESPONSES_FILE, VERDICTS_FILE, METRICS_FILE):
        show(f"{name.partition('.')[0]:<10}{folder / name}")


def _show_viewers(folder: Path) -> None:
    """Print how to read the responses and verdicts of a folder, and of the one in it that it is compared with."""
    show(f"browse    sails view {folder}")
    how = f"inspect view --log-dir {folder}" if can_write_log() else f"no log for inspect view; {INSTALL}"
    show(f"inspect   {how}")


def heading_on_set(name: str, split: str, splits: Iterable[str]) -> str:
    """Return the heading of a metric of one prompt set: a file's is its name, or its path if two have that name."""
    short = {path: Path(path).name for path in splits}
    is_unique = list(short.values()).count(short[split]) == 1
    return f"{METRICS[name].heading}, {SPLITS.get(split, short[split] if is_unique else split)}"


def _by_category(categories: Mapping[str, Mapping[str, Any]]) -> Iterator[FittedTable]:
    """Yield a table of the categories of harmful prompts, and one of those of harmless prompts."""
    harm = {name for name, metric in METRICS.items() if metric.task == "harm"}
    harmful = {name: rates for name, rates in categories.items() if rates and harm >= rates.keys()}
    harmless = {name: rates for name, rates in categories.items() if rates and name not in harmful}
    for kind, of_kind in (("harmful", harmful), ("harmless", harmless)):
        shown = [name for name in IN_COLUMNS if any(name in rates for rates in of_kind.values())]
        if shown:
            yield _category_table(f"By category of {kind} prompts", of_kind, shown)


def _category_table(title: str, categories: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> FittedTable:
    table = FittedTable(title, ("category", "n", *(METRICS[name].heading for name in shown)))
    for category, rates in categories.items():
        n = max(value["n"] + value["n_unscored"] for value in rates.values())
        cells = [METRICS[name].text(rates[name]["value"]) if name in rates else "" for name in shown]
        table.add_row(category.replace("(dual_use)", "(dual use)"), str(n), *cells)
    return table


def _cells(name: str, estimate: Mapping[str, Any]) -> Sequence[str]:
    text, (low, high) = METRICS[name].text, (estimate["ci_low"], estimate["ci_high"])
    interval = "" if low is None else f"{text(low)} to {text(high)}"
    unscored = estimate["n_unscored"]
    bounds = f"{text(estimate['bound_low'])} to {text(estimate['bound_high'])}" if unscored else ""
    return text(estimate["value"]), interval, str(estimate["n"]), str(unscored), bounds


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
