"""Figures of safety against helpfulness: some eight methods in each."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, SAFETY_RATES, Metric
from sails_align.experiments.fronts import Front
from sails_align.experiments.plan import Run
from sails_align.experiments.summary import SummaryRow
from sails_align.reporting.drawing import Picture, arms, finish, ink, look_of, point

LOST = replace(METRICS["over_refusal_rate"], label="helpfulness lost")


def by_trainer(runs: Iterable[Run]) -> Iterator[tuple[str, list[str]]]:
    """Yield groups of runs that one figure can show: SFT, then DPO, each with the references but for the base.

    The base is left out because it is far from all others: its safety would stretch the axes.
    """
    shown = [run for run in runs if run.name != "base"]
    for trainer in ("sft", "dpo"):
        if any(run.trainer == trainer for run in shown):
            yield trainer, [run.name for run in shown if run.trainer == trainer or run.is_reference]


def trade_off(rows: Sequence[SummaryRow], names: Sequence[str], name: str) -> Picture:
    """Draw safety against helpfulness, by the first metrics of each that have numbers, and the Pareto front."""

    def known(*names: str) -> Metric:
        return METRICS[next((name for name in names if any(row.means[name].n for row in rows)), names[-1])]

    across = known(*HELPFULNESS_RATES, "over_refusal_rate")
    of_split = [f"{name}_{of}" for of in ("out_of_distribution", "in_distribution") for name in SAFETY_RATES]
    up = known(*of_split, "refusal_rate", "safety_rate")
    shown = [row for row in rows if row.run.name in names]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row in shown:
            x, y = row.means[across.name], row.means[up.name]
            if x.value is not None and y.value is not None:
                point(
                    axes, look_of(row.run.name), across.scale * x.value, up.scale * y.value,
                    x_arms=arms(x, across), y_arms=arms(y, up), size=9, label=row.label,
                )  # fmt: skip
        _draw_front(axes, pareto_front(shown, across, up), across, up)
        finish(figure, axes, across, up)

    title = f"{up.label.capitalize()} against {across.label}; means over seeds, 95% intervals"
    return Picture(name, title, (7.5, 4.2), draw)


def pareto_front(rows: Sequence[SummaryRow], across: Metric, up: Metric) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both metrics, in the order of the first."""
    means = ((row.means[across.name].value, row.means[up.name].value) for row in rows)
    points = sorted((x, y) for x, y in means if x is not None and y is not None)
    signs = [1 if metric.higher_is_better else -1 for metric in (across, up)]

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        pairs = zip(signs, one, other, strict=True)
        return one != other and all(sign * ours >= sign * theirs for sign, ours, theirs in pairs)

    return [point for point in points if not any(beats(other, point) for other in points)]


def _draw_front(axes: Axes, front: Sequence[tuple[float, float]], across: Metric, up: Metric) -> None:
    """Draw the border of what the points reach, up to the worse ends of both axes."""
    if not front:
        return
    x, y = (
        [metric.scale * value for value in of]
        for metric, of in zip((across, up), zip(*front, strict=True), strict=True)
    )
    x_limits, y_limits = axes.get_xlim(), axes.get_ylim()
    worst = y_limits[0 if up.higher_is_better else 1]
    if across.higher_is_better:
        x, y, where = [x_limits[0], *x, x[-1]], [y[0], *y, worst], "pre"
    else:
        x, y, where = [x[0], *x, x_limits[1]], [worst, *y, y[-1]], "post"
    axes.step(x, y, where=where, color=ink(), linewidth=1, linestyle=(0, (1, 2)), zorder=1, label="Pareto front")
    axes.set(xlim=x_limits, ylim=y_limits)


def fronts(found: Sequence[Front], safety: Metric, name: str) -> Picture:
    """Draw safety against lost helpfulness: a point for each learning rate, a line for the front."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for front in found:
            look = look_of(front.run.name)
            for points, line, shade, label in (
                (front.points, "none", 0.4, None),
                (front.pareto[1:], look.line, 1.0, front.run.label),
            ):
                x, y = ([100 * getattr(point, of) for point in points] for of in ("lost", "safety"))
                axes.plot(
                    x, y, color=look.colour, marker=look.marker, linestyle=line, alpha=shade, label=label, clip_on=False
                )
        finish(figure, axes, LOST, safety)

    title = f"{safety.label.capitalize()} against lost helpfulness, over learning rates (validation part)"
    return Picture(name, title, (7.5, 4.2), draw)
