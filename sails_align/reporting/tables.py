"""Tables that several sections have: what methods reach, and how they differ."""

from collections.abc import Mapping, Sequence

from sails_align.evaluation.metrics import Metric
from sails_align.experiments.summary import Mean, Row, with_numbers
from sails_align.reporting.page import Entry, Grid, difference, entries, interval

PERCENT = Metric("", "", "")
"""A share that is no metric of the table."""
WHOLE_PERCENT = Metric("", "", "", digits=0)
PLAIN = Metric("", "", "", unit="")


def counted(n: int, what: str) -> str:
    """A number of things, in words."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def levels_grid(rows: Sequence[Row], metrics: Sequence[Metric], title: str) -> Grid:
    """What each method reaches: a line for each, with its learning rate."""

    def rate(row: Row) -> str:
        return "–" if row.learning_rate is None else f"{row.learning_rate:g}"

    return Grid(
        [title, "learning rate", *(metric.heading for metric in metrics)],
        [
            entries(row.run.label, rate(row), *(interval(row.means[metric.name], metric) for metric in metrics))
            for row in rows
        ],
    )


def differences_grid(
    found: Mapping[str, Mapping[str, Mean]], labels: Mapping[str, str], metrics: Sequence[Metric], title: str
) -> Grid:
    """Differences with their intervals: a line for each name, a column for each metric that has numbers."""
    metrics = with_numbers(metrics, found.values())
    return Grid(
        [title, *(metric.heading for metric in metrics)],
        [
            [Entry(labels[name]), *(difference(means[metric.name], metric) for metric in metrics)]
            for name, means in found.items()
        ],
    )
