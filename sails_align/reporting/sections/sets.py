"""Safety and over-refusal on each prompt set."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from sails_align.evaluation.tables import heading_on_set
from sails_align.experiments.summary import OnSet
from sails_align.reporting.page import Grid, Section, TableCell, difference, interval
from sails_align.reporting.report import ReportData
from sails_align.reporting.sections import SAILS


def make(data: ReportData) -> Iterator[Section]:
    """Show what each run reaches on each set, then SAILS minus its baselines."""
    outcome = data.main
    found, labels = outcome.sets(), {row.run.name: row.label for row in outcome.rows}
    if not found:
        return

    def grid(head: str, columns: Mapping[str, str], entry: Callable[[OnSet, str], TableCell]) -> Grid:
        names = [of.name for of in found]
        lines = []
        for of in found:
            texts = heading_on_set(of.metric.name, of.name, names), str(of.n_prompts)
            lines.append([*map(TableCell, texts), *(entry(of, name) for name in columns)])
        return Grid([head, "prompts", *columns.values()], lines)

    grids = [grid("rate on a prompt set", labels, lambda of, run: TableCell(interval(of.mean(run), of.metric)))]
    for ours in (name for name in SAILS if name in labels):
        minus = {name: f"minus {labels[name]}" for name in SAILS[ours] if name in labels}
        if minus:
            grids.append(grid(labels[ours], minus, partial(_minus, ours)))
    text = ["Means over seeds with 95% intervals (none below three seeds). Differences are paired by seed."]
    yield Section("By prompt set", text, grids)


def _minus(ours: str, of: OnSet, run: str) -> TableCell:
    return difference(of.difference(ours, run), of.metric)
