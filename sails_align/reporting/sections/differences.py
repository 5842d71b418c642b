"""Differences from each baseline, paired by seed."""

from collections.abc import Iterator

from sails_align.experiments.summary import COMPARED
from sails_align.reporting import figures
from sails_align.reporting.findings import as_measured
from sails_align.reporting.page import Section
from sails_align.reporting.report import ReportData
from sails_align.reporting.sections import REFERENCES
from sails_align.reporting.tables import differences_grid, headline


def make(data: ReportData) -> Iterator[Section]:
    """Show a section for each baseline."""
    outcome = data.main
    for reference in REFERENCES:
        if reference not in outcome.labels or not (found := outcome.minus(reference)):
            continue
        title = f"Minus {outcome.labels[reference]}"
        of_figure = f"Each method minus {outcome.labels[reference]}, paired by seed"
        metrics = as_measured(headline(found.values()), outcome)
        compared = as_measured(COMPARED, outcome)
        text = [
            "Paired by seed, in points (steps: in steps), with 95% intervals (none below three seeds). Better and "
            "worse are marked where the interval does not contain 0."
        ]
        picture = figures.forest(found, outcome.labels, f"minus_{reference}", of_figure, metrics)
        yield Section(title, text, [differences_grid(found, outcome.labels, compared, "method")], [picture])
