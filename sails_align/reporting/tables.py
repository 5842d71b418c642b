"""Make the tables of several sections: levels of methods, and differences between them."""

from collections.abc import Mapping, Sequence

from sails_align.evaluation.metrics import Metric
from sails_align.experiments.summary import Mean, Row, with_numbers
from sails_align.reporting.page import Grid, TableCell, difference, entries, interval

PERCENT = Metric("", "", "")
"""A share that is not in METRICS."""
WHOLE_PERCENT = Metric("", "", "", digits=0)
PLAIN = Metric("", "", "", unit="")


def levels_grid(rows: Sequence[Row], metrics: Sequence[Metric], title: str) -> Grid:
    """Return what each method reaches: a line for each, with its learning rate."""
    lines = []
    for row in rows:
        rate = "–" if row.learning_rate is None else f"{row.learning_rate:g}"
        lines.append(entries(row.label, rate, *(interval(row.means[metric.name], metric) for metric in metrics)))
    return Grid([title, "learning rate", *(metric.heading for metric in metrics)], lines)


def differences_grid(
    found: Mapping[str, Mapping[str, Mean]], labels: Mapping[str, str], metrics: Sequence[Metric], title: str
) -> Grid:
    """Return differences with their intervals: a line for each name, a column for each metric that has numbers."""
    metrics = with_numbers(metrics, found.values())
    return Grid(
        [title, *(metric.heading for metric in metrics)],
        [
            [TableCell(labels[name]), *(difference(means[metric.name], metric) for metric in metrics)]
            for name, means in found.items()
        ],
    )
