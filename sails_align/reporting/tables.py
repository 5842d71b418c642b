"""Make the tables of several sections: levels of methods, and differences between them."""

from collections.abc import Iterable, Mapping, Sequence

from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, Metric
from sails_align.experiments.summary import Mean, SummaryRow, with_numbers
from sails_align.reporting.page import Grid, TableCell, difference, entries, interval

PERCENT = Metric("", "", "")
"""A share that is not in METRICS."""
WHOLE_PERCENT = Metric("", "", "", digits=0)
PLAIN = Metric("", "", "", unit="")
RATES: tuple[tuple[str, ...], ...] = (
    ("safety_rate_in_distribution", "refusal_rate_in_distribution", "safety_rate", "refusal_rate"),
    ("safety_rate_out_of_distribution", "refusal_rate_out_of_distribution"),
    ("over_refusal_rate",),
    HELPFULNESS_RATES,
)
"""The rates of a first table: of each group, the first metric that has numbers."""
LEFT = ("left_after_benign", "left_after_harmful")
HEADLINE = (*RATES, ("capability",), LEFT, ("trainable_share",))
"""What the first table of the main study and the findings are about, as groups likewise."""


def headline(found: Iterable[Mapping[str, Mean]], groups: Sequence[Sequence[str]] = HEADLINE) -> list[Metric]:
    """Return the metrics of the first table: of each group the first one that has numbers, so at most seven."""
    means = list(found)
    known = [[name for name in names if any(name in of and of[name].n for of in means)] for names in groups]
    return [METRICS[names[0]] for names in known if names]


def levels_grid(
    rows: Sequence[SummaryRow], metrics: Sequence[Metric], head: str, *, title: str = "", rates: bool = True
) -> Grid:
    """Return what each method reaches: a line for each, with its learning rate unless `rates` is off."""
    lines = []
    for row in rows:
        rate = "–" if row.learning_rate is None else f"{row.learning_rate:g}"
        words = (*((rate,) if rates else ()), *(interval(row.means[metric.name], metric) for metric in metrics))
        lines.append(entries(row.label, *words))
    return Grid([head, *(["learning rate"] if rates else []), *(metric.heading for metric in metrics)], lines, title)


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
