"""Draw the figures of a comparison with matplotlib, each for light and dark pages.

The colours of Okabe and Ito can be told apart by people with colour-blindness, and so can the markers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sails_align.core.files import write_bytes
from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, SAFETY_RATES, Metric
from sails_align.experiments.summary import Front, Mean, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F")
MARKERS = "osD^vP*X"
THEMES = {"light": ("#1b1b1b", "#d0d0d0"), "dark": ("#e8e8e8", "#4a4a4a")}
"""Colours of text and of grid lines; the background is the page's."""


@dataclass(frozen=True)
class Picture:
    """A figure, drawn."""

    name: str
    title: str
    """Caption, and text for people who do not see it."""
    svg: Mapping[str, bytes]
    """By theme."""
    png: bytes
    """On white."""

    def write(self, folder: Path) -> None:
        """Write <name>.svg and <name>.png."""
        write_bytes(folder / f"{self.name}.svg", self.svg["light"])
        write_bytes(folder / f"{self.name}.png", self.png)


def picture(name: str, title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Picture:
    """Draw a figure in both themes, of a size in inches; `draw` fills an empty figure."""
    svg: dict[str, bytes] = {}
    png = b""
    for theme, (ink, grid) in THEMES.items():
        style: dict[Any, Any] = {
            "font.size": 10,
            "font.family": "DejaVu Sans",
            "svg.hashsalt": name,  # so that the same figure is the same file
            "svg.fonttype": "path",
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink),
            "grid.color": grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            svg[theme] = _bytes(figure, "svg", transparent=True)
            if theme == "light":
                png = _bytes(figure, "png", facecolor="white", dpi=110)
    return Picture(name, title, svg, png)


def _bytes(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    return buffer.getvalue()


def style_of(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return the colour and marker of each run, the same in all figures."""
    return {
        row.run.name: (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]) for index, row in enumerate(rows)
    }


def trade_off(rows: Sequence[Row]) -> Picture:
    """Draw safety against helpfulness, by the first metrics of each that have numbers, and the Pareto front."""

    def known(*names: str) -> Metric:
        return METRICS[next((name for name in names if any(row.means[name].n for row in rows)), names[-1])]

    across = known(*HELPFULNESS_RATES, "over_refusal_rate")
    of_split = [f"{name}_{of}" for of in ("out_of_distribution", "in_distribution") for name in SAFETY_RATES]
    up = known(*of_split, "refusal_rate", "safety_rate")
    styles = style_of(rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row in rows:
            x, y = row.means[across.name], row.means[up.name]
            if x.value is None or y.value is None:
                continue
            colour, marker = styles[row.run.name]
            axes.errorbar(
                across.scale * x.value, up.scale * y.value, xerr=_arms(x, across), yerr=_arms(y, up), color=colour,
                marker=marker, markersize=8, capsize=3, linestyle="none", label=row.run.label,
            )  # fmt: skip
        front = pareto_front(rows, across, up)
        axes.step(
            [across.scale * x for x, _ in front], [up.scale * y for _, y in front], where="pre", color=_ink(),
            linewidth=1, linestyle=":", zorder=0, label="not beaten in both",
        )  # fmt: skip
        axes.set_axisbelow(True)
        _label(figure, across.heading, up.heading)

    title = f"{up.label.capitalize()} against {across.label}; means over seeds, 95% intervals"
    return picture("trade_off", title, (7.5, 4.5), draw)


def pareto_front(rows: Sequence[Row], across: Metric, up: Metric) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both metrics, in the order of the first."""
    means = ((row.means[across.name].value, row.means[up.name].value) for row in rows)
    points = sorted((x, y) for x, y in means if x is not None and y is not None)
    signs = [1 if metric.higher_is_better else -1 for metric in (across, up)]

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        pairs = zip(signs, one, other, strict=True)
        return one != other and all(sign * ours >= sign * theirs for sign, ours, theirs in pairs)

    return [point for point in points if not any(beats(other, point) for other in points)]


def forest(
    found: Mapping[str, Mapping[str, Mean]],
    labels: Mapping[str, str],
    name: str,
    title: str,
    metrics: Sequence[Metric],
) -> Picture:
    """Draw differences (by run and metric) with their intervals: a panel for each metric, a line for each run."""
    n_lines = -(-len(metrics) // 5)

    def draw(figure: Figure) -> None:
        panels = _panels(figure, len(metrics), 5, sharey=True)
        for axes, metric in zip(panels, metrics, strict=True):
            axes.axvline(0, color=_ink(), linewidth=1)
            for place, run in enumerate(found):
                mean = found[run][metric.name]
                if mean.value is None:
                    continue
                good = (mean.value > 0) == metric.higher_is_better
                colour = "#7F7F7F" if mean.touches_zero else "#009E73" if good else "#D55E00"
                axes.errorbar(
                    metric.scale * mean.value, place, xerr=_arms(mean, metric), color=colour, marker="o", capsize=3
                )
            axes.set_title(_in_lines(metric.label), fontsize=8.5)
            axes.grid(visible=True, axis="x", linewidth=0.5)
            axes.tick_params(labelsize=8)
        panels[0].set_yticks(range(len(found)), [labels[run] for run in found])
        panels[0].set_ylim(len(found) - 0.5, -0.5)
        figure.supxlabel("difference in points; green: better, orange: worse, grey: the interval holds 0", fontsize=9)

    return picture(name, title, (10.0, n_lines * (1.2 + 0.3 * len(found))), draw)


def bars(
    by_category: Mapping[str, Mapping[str, Mean]], rows: Sequence[Row], name: str, title: str, label: str
) -> Picture:
    """Draw a panel for each run, and a bar for each category."""
    shown = [row for row in rows if any(row.run.name in of for of in by_category.values())]
    styles = style_of(rows)

    def draw(figure: Figure) -> None:
        panels = _panels(figure, len(shown), 4, sharex=True, sharey=True)
        for axes, row in zip(panels, shown, strict=True):
            means = [of.get(row.run.name, Mean(None, None, None, 0)) for of in by_category.values()]
            places = range(len(means))
            axes.barh(places, [100 * (mean.value or 0.0) for mean in means], color=styles[row.run.name][0], height=0.7)
            axes.set_title(row.run.label, fontsize=9.5)
            axes.set_yticks(places, list(by_category), fontsize=8)
            axes.set_ylim(len(means) - 0.5, -0.5)
            axes.set_xlim(0, 100)
            axes.grid(visible=True, axis="x", linewidth=0.5)
            axes.set_axisbelow(True)
        figure.supxlabel(label, fontsize=9)

    n_lines = -(-len(shown) // 4)
    return picture(name, title, (10.0, n_lines * (0.8 + 0.19 * len(by_category))), draw)


def fronts(found: Sequence[Front], rows: Sequence[Row]) -> Picture:
    """Draw safety against lost helpfulness: a point for each learning rate, a line for the front."""
    styles = style_of(rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for front in found:
            colour, marker = styles[front.run.name]
            for points, line, shade, label in (
                (front.points, "none", 0.4, None),
                (front.pareto, "-", 1.0, front.run.label),
            ):
                x, y = ([100 * getattr(point, name) for point in points] for name in ("lost", "safety"))
                axes.plot(x, y, color=colour, marker=marker, linestyle=line, alpha=shade, label=label)
        _label(figure, "helpfulness lost (%)", "safety (%)")

    return picture(
        "fronts", "Safety against what is lost of helpfulness, over learning rates (validation part)", (7.5, 4.2), draw
    )


def curves(
    found: Mapping[str, Mapping[str, Sequence[tuple[int, Mean]]]],
    labels: Mapping[str, str],
    metrics: Sequence[Metric],
) -> Picture:
    """Draw metrics over the number of training examples: a panel for each metric, a line for each run."""

    def draw(figure: Figure) -> None:
        panels = _panels(figure, len(metrics), len(metrics))
        for axes, metric in zip(panels, metrics, strict=True):
            for place, (run, of) in enumerate(found[metric.name].items()):
                axes.errorbar(
                    [n for n, _ in of], [metric.scale * (mean.value or 0.0) for _, mean in of],
                    yerr=np.concatenate([_arms(mean, metric) or [[0.0], [0.0]] for _, mean in of], axis=1),
                    color=COLOURS[place], marker=MARKERS[place], capsize=3, label=labels[run],
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_title(_in_lines(metric.heading), fontsize=9)
            axes.grid(visible=True, linewidth=0.5)
        figure.supxlabel("harmful training examples (and as many harmless ones)", fontsize=9)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9)

    return picture("examples", "Learning curves over the number of training examples", (10.0, 3.6), draw)


def learning_rates(found: Mapping[str, Mapping[float, float]], rows: Sequence[Row]) -> Picture:
    """Draw the merit of each learning rate on the validation part, by run, and mark the chosen one."""
    styles, labels = style_of(rows), {row.run.name: row.run.label for row in rows}
    chosen = {row.run.name: row.learning_rate for row in rows}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for run, of_rate in found.items():
            rates = sorted(of_rate)
            colour, marker = styles[run]
            axes.plot(rates, [100 * of_rate[rate] for rate in rates], color=colour, marker=marker, label=labels[run])
            best = chosen[run]
            if best is not None:
                axes.plot(best, 100 * of_rate[best], marker="o", markersize=14, fillstyle="none", color=colour)
        axes.set_xscale("log")
        _label(figure, "learning rate (circle: chosen)", "mean of safety and helpfulness (%)")

    return picture("learning_rates", "Learning rates on the validation part, by method", (7.5, 4.0), draw)


def _in_lines(title: str) -> str:
    """Break a metric's label, which is wider than a panel, into lines."""
    return re.sub(r", | (?=after |and )", lambda found: found[0].rstrip() + "\n", title)


def _ink() -> str:
    """Return the colour of text."""
    return str(matplotlib.rcParams["text.color"])


def _label(figure: Figure, across: str, up: str) -> None:
    """Name the axes of a figure with one panel, and add grid lines and a legend."""
    (axes,) = figure.axes
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(visible=True, linewidth=0.5)
    figure.legend(loc="outside right upper", fontsize=9)


def _panels(figure: Figure, n: int, n_columns: int, **shared: Any) -> list[Any]:
    """Add panels in rows of at most `n_columns`."""
    n_columns = min(n_columns, n)
    panels = figure.subplots(-(-n // n_columns), n_columns, squeeze=False, **shared).ravel()
    for axes in panels[n:]:
        axes.set_visible(False)
    return list(panels[:n])


def _arms(mean: Mean, metric: Metric) -> list[list[float]] | None:
    """Return the lengths of an interval's arms, for matplotlib; None if there is no interval."""
    if mean.value is None or mean.low is None or mean.high is None:
        return None
    return [[metric.scale * (mean.value - mean.low)], [metric.scale * (mean.high - mean.value)]]
