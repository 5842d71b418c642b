"""Safety and over-refusal on each prompt set."""

from collections.abc import Iterator

from sails_align.reporting.page import Grid, Section, TableCell, difference, interval
from sails_align.reporting.report import ReportData
from sails_align.reporting.sections import SAILS


def make(data: ReportData) -> Iterator[Section]:
    """Show what each run reaches on each set, then SAILS minus its baselines."""
    outcome = data.main
    sets = outcome.sets()
    if not sets:
        return
    named = {key: f"{key[0]} (n = {of.n}): {of.metric.heading}" for key, of in sets.items()}
    lines = [
        [TableCell(named[key]), *(TableCell(interval(of.mean(run), of.metric)) for run in outcome.labels)]
        for key, of in sets.items()
    ]
    grids = [Grid(["prompt set", *outcome.labels.values()], lines)]
    for ours, baselines in SAILS.items():
        known = [name for name in baselines if name in outcome.labels]
        if ours in outcome.labels and known:
            lines = [
                [TableCell(named[key]), *(difference(of.difference(ours, name), of.metric) for name in known)]
                for key, of in sets.items()
            ]
            head = [f"{outcome.labels[ours]}, by prompt set", *(f"minus {outcome.labels[name]}" for name in known)]
            grids.append(Grid(head, lines))
    text = ["Means over seeds with 95% intervals (none below three seeds). Differences are paired by seed."]
    yield Section("By prompt set", text, grids)
