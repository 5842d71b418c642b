"""Figures of differences, categories, learning curves and learning rates."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sails_align.evaluation.metrics import Metric
from sails_align.experiments.summary import Mean, SummaryRow
from sails_align.reporting.drawing import (
    GREEN,
    Picture,
    arms,
    axis_label,
    end_at_range,
    finish,
    ink,
    legend,
    look_of,
    panels,
    point,
)


def forest(
    found: Mapping[str, Mapping[str, Mean]],
    labels: Mapping[str, str],
    name: str,
    title: str,
    metrics: Sequence[Metric],
    *,
    of: str | None = None,
) -> Picture:
    """Draw differences with their intervals: a panel for each metric, a line for each run (or world, all of run `of`).

    The better side is tinted. A marker is filled if the interval does not contain 0. The title says what is subtracted.
    """
    n_lines = -(-len(metrics) // 6)

    def draw(figure: Figure) -> None:
        shown = panels(figure, len(metrics), 6, sharey=True)
        for axes, metric in zip(shown, metrics, strict=True):
            axes.axvline(0, color=ink(), linewidth=1)
            for place, run in enumerate(found):
                mean = found[run][metric.name]
                if mean.value is not None:
                    point(
                        axes, look_of(of or run), metric.scale * mean.value, place, x_arms=arms(mean, metric),
                        hollow=mean.touches_zero, size=6,
                    )  # fmt: skip
            _tint_better_side(axes, metric)
            axes.set_title(_in_lines(metric.label), fontsize=8.5)
            axes.set_xlabel("better →" if metric.higher_is_better else "← better", fontsize=8)
            axes.grid(visible=True, axis="x")
            axes.tick_params(labelsize=8)
        shown[0].set_yticks(range(len(found)), [labels[run] for run in found])
        shown[0].set_ylim(len(found) - 0.5, -0.5)
        figure.suptitle(title, fontsize=10)
        figure.supxlabel(
            "difference in points, 95% interval; hollow: the interval contains 0, or there is none", fontsize=9
        )

    return Picture(name, title, (10.0, n_lines * (1.6 + 0.28 * len(found))), draw)


def _tint_better_side(axes: Axes, metric: Metric) -> None:
    low, high = axes.get_xlim()
    side = (0, max(high, 0)) if metric.higher_is_better else (min(low, 0), 0)
    axes.axvspan(*side, color=GREEN, alpha=0.1, linewidth=0, zorder=0)
    axes.set_xlim(low, high)


def _drawn(mean: Mean) -> float:
    """Return a mean as it is drawn: NaN, which is not, if there is none."""
    return math.nan if mean.value is None else mean.value


def bars(
    by_category: Mapping[str, Mapping[str, Mean]], rows: Sequence[SummaryRow], name: str, title: str, metric: Metric
) -> Picture:
    """Draw a panel for each run, and a bar for each category."""
    shown = [row for row in rows if any(row.run.name in of for of in by_category.values())]

    def draw(figure: Figure) -> None:
        for axes, row in zip(panels(figure, len(shown), 4, sharex=True, sharey=True), shown, strict=True):
            means = [of.get(row.run.name, Mean(None, None, None, 0)) for of in by_category.values()]
            places = range(len(means))
            values = [100 * _drawn(mean) for mean in means]
            axes.barh(places, values, color=look_of(row.run.name).colour, height=0.7)
            axes.set_title(row.run.label, fontsize=9)
            axes.set_yticks(places, [category.replace("_", " ") for category in by_category], fontsize=8)
            axes.set_ylim(len(means) - 0.5, -0.5)
            axes.set_xlim(0, 100)
            axes.grid(visible=True, axis="x")
        figure.supxlabel(axis_label(metric), fontsize=9)

    n_lines = -(-len(shown) // 4)
    return Picture(name, title, (10.0, 0.4 + n_lines * (0.8 + 0.19 * len(by_category))), draw)


def curves(
    found: Mapping[str, Mapping[str, Sequence[tuple[int, Mean]]]],
    labels: Mapping[str, str],
    metrics: Sequence[Metric],
) -> Picture:
    """Draw metrics over the number of training examples: a panel for each metric, a line for each run."""
    n_columns = 3

    def draw(figure: Figure) -> None:
        shown = panels(figure, len(metrics), n_columns, sharex=True)
        for axes, metric in zip(shown, metrics, strict=True):
            for run, of in found[metric.name].items():
                look, x = look_of(run), [n for n, _ in of]
                y = [metric.scale * _drawn(mean) for _, mean in of]
                lengths = np.concatenate([arms(mean, metric) or [[0.0], [0.0]] for _, mean in of], axis=1)
                axes.errorbar(
                    x, y, yerr=lengths, fmt="none", ecolor=look.colour, elinewidth=1, capsize=2, alpha=0.6, zorder=2,
                    clip_on=False,
                )  # fmt: skip
                axes.plot(
                    x, y, color=look.colour, marker=look.marker, linestyle=look.line, markersize=6, label=labels[run],
                    zorder=3, clip_on=False,
                )  # fmt: skip
            _log_ticks(axes, {n for of in found[metric.name].values() for n, _ in of})
            end_at_range(axes, metric, "y")
            axes.set_title(_in_lines(metric.label), fontsize=9)
            axes.set_ylabel(f"{metric.unit}, {'better →' if metric.higher_is_better else '← better'}", fontsize=9)
            axes.grid(visible=True)
        figure.supxlabel("harmful training examples", fontsize=9)
        legend(figure, shown, loc="outside upper center", ncols=4)

    n_lines = -(-len(metrics) // n_columns)
    return Picture(
        "examples", "Learning curves over the number of training examples", (10.0, 0.6 + 2.6 * n_lines), draw
    )


def learning_rates(
    found: Mapping[str, Mapping[float, float]], rows: Sequence[SummaryRow], name: str, metric: Metric
) -> Picture:
    """Draw what learning rates are chosen by, on the validation part, by run and rate, and mark the chosen rate."""
    by_name = {row.run.name: row for row in rows}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for run, of_rate in found.items():
            rates, look = sorted(of_rate), look_of(run)
            axes.plot(
                rates, [100 * of_rate[rate] for rate in rates], color=look.colour, marker=look.marker,
                linestyle=look.line, label=by_name[run].run.label, clip_on=False,
            )  # fmt: skip
            best = by_name[run].learning_rate
            if best is not None:
                mark = {"marker": "o", "markersize": 14, "fillstyle": "none", "clip_on": False}
                axes.plot(best, 100 * of_rate[best], color=look.colour, **mark)
        _log_ticks(axes, {rate for of_rate in found.values() for rate in of_rate})
        finish(figure, axes, None, metric)
        axes.set_xlabel("learning rate (circle: chosen)")

    return Picture(name, "Learning rates on the validation part, by method", (7.5, 4.0), draw)


def _log_ticks(axes: Axes, values: Iterable[float]) -> None:
    """Make the axis across logarithmic, with these values as its ticks."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    axes.set_xticks([], minor=True)


PANEL_LETTERS = 20
"""That fit above a panel in a line."""


def _in_lines(title: str) -> str:
    """Break a metric's label, which is wider than a panel, into lines."""
    return ",\n".join(textwrap.fill(part, PANEL_LETTERS) for part in title.split(", "))
