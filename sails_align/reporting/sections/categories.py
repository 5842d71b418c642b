"""Safety and over-refusal by category."""

from collections.abc import Iterator

from sails_align.evaluation.metrics import METRICS
from sails_align.reporting import figures
from sails_align.reporting.page import Section
from sails_align.reporting.report import ReportData

BARS = (
    ("harmful", "safety_harmful", "{} by category: trained harm categories"),
    ("ood", "safety_ood", "{} by category: held-out harm categories"),
    ("harmless", "over_refusal", "{} by category of harmless requests"),
)
"""Splits, each with its figure's name and title, which begins with the metric."""


def make(data: ReportData) -> Iterator[Section]:
    """Show a figure for each split."""
    outcome = data.main
    safety = METRICS["refusal_rate" if any(row.means["refusal_rate"].n for row in outcome.rows) else "safety_rate"]
    pictures = []
    for split, name, title in BARS:
        if found := outcome.categories(split):
            metric = METRICS["over_refusal_rate"] if split == "harmless" else safety
            title = title.format(metric.label.capitalize())
            pictures.append(figures.bars(found, outcome.rows, name, title, metric))
    yield Section("By category", pictures=pictures)
