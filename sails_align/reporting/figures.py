"""Figures of a comparison, each for light and dark pages: what matplotlib draws, in one style.

Colours are those of Okabe and Ito, which people with colour-blindness tell apart; markers tell the same.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sails_align.core.files import write_bytes
from sails_align.evaluation.metrics import METRICS, Metric
from sails_align.experiments.summary import Front, Mean, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F")
MARKERS = "osD^vP*X"
THEMES = {"light": ("#1b1b1b", "#d0d0d0"), "dark": ("#e8e8e8", "#4a4a4a")}
"""Of text and of lines in the background; the background itself is the page's."""


@dataclass(frozen=True)
class Picture:
    """A figure, drawn."""

    name: str
    title: str
    """What it shows, for those who do not see it, too."""
    svg: Mapping[str, bytes]
    """By theme."""
    png: bytes
    """On white."""

    def write(self, folder: Path) -> None:
        """Write it as <name>.svg and <name>.png."""
        write_bytes(folder / f"{self.name}.svg", self.svg["light"])
        write_bytes(folder / f"{self.name}.png", self.png)


def picture(name: str, title: str, size: tuple[float, float], draw: Callable[[Figure, str, str], None]) -> Picture:
    """Draw a figure in both themes.

    Args:
        name: of its files.
        title: what it shows.
        size: in inches.
        draw: puts it on an empty figure; given the colours of text and of lines in the background.
    """
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
            draw(figure, ink, grid)
            svg[theme] = _bytes(figure, "svg", transparent=True)
            if theme == "light":
                png = _bytes(figure, "png", facecolor="white", dpi=110)
    return Picture(name, title, svg, png)


def _bytes(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    return buffer.getvalue()


def style_of(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each run, the same in all figures."""
    return {
        row.run.name: (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]) for index, row in enumerate(rows)
    }


def trade_off(rows: Sequence[Row]) -> Picture:
    """Safety (on held-out categories) against helpfulness (correct answers), or what is known of them.

    Runs that no other one beats in both are joined.
    """

    def known(*names: str) -> Metric:
        return METRICS[next((name for name in names if any(row.means[name].n for row in rows)), names[-1])]

    across = known("correct_answer_rate", "helpfulness", "over_refusal_rate")
    up = known("safety_rate_out_of_distribution", "safety_rate_in_distribution", "safety_rate")
    styles = style_of(rows)

    def draw(figure: Figure, ink: str, grid: str) -> None:
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
            [across.scale * x for x, _ in front], [up.scale * y for _, y in front], where="pre", color=ink, linewidth=1,
            linestyle=":", zorder=0, label="not beaten in both",
        )  # fmt: skip
        axes.set_xlabel(across.heading)
        axes.set_ylabel(up.heading)
        axes.grid(visible=True, linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(loc="outside right upper", fontsize=9)

    title = f"{up.label.capitalize()} against {across.label}; means over seeds, 95% intervals"
    return picture("trade_off", title, (7.5, 4.5), draw)


def pareto_front(rows: Sequence[Row], across: Metric, up: Metric) -> list[tuple[float, float]]:
    """Points that no other one exceeds in one metric without falling behind in the other, by the first."""
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
    """Differences with their intervals: a panel for each metric, a line for each run.

    Args:
        found: by run and metric.
        labels: of the runs.
        name: of the figure.
        title: what it shows.
        metrics: in this order.
    """
    n_columns = min(5, len(metrics))
    n_lines = -(-len(metrics) // n_columns)

    def draw(figure: Figure, ink: str, grid: str) -> None:
        panels = figure.subplots(n_lines, n_columns, sharey=True, squeeze=False)
        for axes in panels.ravel()[len(metrics) :]:
            axes.set_visible(False)
        for axes, metric in zip(panels.ravel(), metrics, strict=False):
            axes.axvline(0, color=ink, linewidth=1)
            for place, run in enumerate(found):
                mean = found[run][metric.name]
                if mean.value is None:
                    continue
                good = (mean.value > 0) == metric.higher_is_better
                colour = "#7F7F7F" if mean.touches_zero else "#009E73" if good else "#D55E00"
                axes.errorbar(
                    metric.scale * mean.value, place, xerr=_arms(mean, metric), color=colour, marker="o", capsize=3
                )
            lines = re.sub(r", | (?=after |and )", lambda found: found[0].rstrip() + "\n", metric.label)
            axes.set_title(lines, fontsize=8.5)
            axes.grid(visible=True, axis="x", linewidth=0.5)
            axes.tick_params(labelsize=8)
        panels[0, 0].set_yticks(range(len(found)), [labels[run] for run in found])
        panels[0, 0].set_ylim(len(found) - 0.5, -0.5)
        figure.supxlabel("difference in points; green: better, orange: worse, grey: the interval holds 0", fontsize=9)

    return picture(name, title, (10.0, n_lines * (1.2 + 0.3 * len(found))), draw)


def bars(
    by_category: Mapping[str, Mapping[str, Mean]], rows: Sequence[Row], name: str, title: str, label: str
) -> Picture:
    """A panel for each run, a bar for each category."""
    shown = [row for row in rows if any(row.run.name in of for of in by_category.values())]
    styles = style_of(rows)

    def draw(figure: Figure, ink: str, grid: str) -> None:
        n_columns = min(4, len(shown))
        n_lines = -(-len(shown) // n_columns)
        panels = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, row in zip(panels, shown, strict=False):
            means = [of.get(row.run.name, Mean(None, None, None, 0)) for of in by_category.values()]
            places = range(len(means))
            axes.barh(places, [100 * (mean.value or 0.0) for mean in means], color=styles[row.run.name][0], height=0.7)
            axes.set_title(row.run.label, fontsize=9.5)
            axes.set_yticks(places, list(by_category), fontsize=8)
            axes.set_ylim(len(means) - 0.5, -0.5)
            axes.set_xlim(0, 100)
            axes.grid(visible=True, axis="x", linewidth=0.5)
            axes.set_axisbelow(True)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel(label, fontsize=9)

    n_lines = -(-len(shown) // 4)
    return picture(name, title, (10.0, n_lines * (0.8 + 0.19 * len(by_category))), draw)


def fronts(found: Sequence[Front], rows: Sequence[Row]) -> Picture:
    """Safety against what is lost of helpfulness: a point for each learning rate, a line for the front."""
    styles = style_of(rows)

    def draw(figure: Figure, ink: str, grid: str) -> None:
        axes = figure.subplots()
        for front in found:
            colour, marker = styles[front.run.name]
            for points, line, shade, label in (
                (front.points, "none", 0.4, None),
                (front.pareto, "-", 1.0, front.run.label),
            ):
                x, y = ([100 * getattr(point, name) for point in points] for name in ("lost", "safety"))
                axes.plot(x, y, color=colour, marker=marker, linestyle=line, alpha=shade, label=label)
        axes.set_xlabel("helpfulness lost (%)")
        axes.set_ylabel("safety (%)")
        axes.grid(visible=True, linewidth=0.5)
        figure.legend(loc="outside right upper", fontsize=9)

    return picture(
        "fronts", "Safety against what is lost of helpfulness, over learning rates (validation part)", (7.5, 4.2), draw
    )


def curves(
    found: Mapping[str, Mapping[str, Sequence[tuple[int, Mean]]]],
    labels: Mapping[str, str],
    metrics: Sequence[Metric],
) -> Picture:
    """Metrics over the number of training examples: a panel for each, a line for each run.

    Args:
        found: by metric and run: numbers of examples with their means.
        labels: of the runs.
        metrics: in this order.
    """

    def draw(figure: Figure, ink: str, grid: str) -> None:
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for place, (run, of) in enumerate(found[metric.name].items()):
                axes.errorbar(
                    [n for n, _ in of], [metric.scale * (mean.value or 0.0) for _, mean in of],
                    yerr=[
                        [metric.scale * ((mean.value or 0.0) - (mean.low or mean.value or 0.0)) for _, mean in of],
                        [metric.scale * ((mean.high or mean.value or 0.0) - (mean.value or 0.0)) for _, mean in of],
                    ],
                    color=COLOURS[place], marker=MARKERS[place], capsize=3, label=labels[run],
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_title(metric.heading, fontsize=9)
            axes.grid(visible=True, linewidth=0.5)
        figure.supxlabel("harmful training examples (and as many harmless ones)", fontsize=9)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9)

    return picture("examples", "Learning curves over the number of training examples", (10.0, 3.6), draw)


def learning_rates(found: Mapping[str, Mapping[float, float]], rows: Sequence[Row]) -> Picture:
    """What each learning rate reached on the validation part, by run; the chosen one is marked."""
    styles, labels = style_of(rows), {row.run.name: row.run.label for row in rows}
    chosen = {row.run.name: row.learning_rate for row in rows}

    def draw(figure: Figure, ink: str, grid: str) -> None:
        axes = figure.subplots()
        for run, of_rate in found.items():
            rates = sorted(of_rate)
            colour, marker = styles[run]
            axes.plot(rates, [100 * of_rate[rate] for rate in rates], color=colour, marker=marker, label=labels[run])
            best = chosen[run]
            if best is not None:
                axes.plot(best, 100 * of_rate[best], marker="o", markersize=14, fillstyle="none", color=colour)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate (circle: chosen)")
        axes.set_ylabel("mean of safety and helpfulness (%)")
        axes.grid(visible=True, linewidth=0.5)
        figure.legend(loc="outside right upper", fontsize=9)

    return picture("learning_rates", "Learning rates on the validation part, by method", (7.5, 4.0), draw)


def _arms(mean: Mean, metric: Metric) -> list[list[float]] | None:
    """Lengths of an interval's arms, as matplotlib has them."""
    if mean.value is None or mean.low is None or mean.high is None:
        return None
    return [[metric.scale * (mean.value - mean.low)], [metric.scale * (mean.high - mean.value)]]
