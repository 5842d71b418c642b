"""Draw figures with matplotlib, each for light and dark pages, and give each method one look in all of them.

The colours are those of Okabe and Ito, which people with colour-blindness can tell apart. Markers and lines differ,
too, so that a figure can be read in grey.
"""

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sails_align.core.files import write_bytes
from sails_align.evaluation.metrics import Metric
from sails_align.experiments.ablations import ABLATIONS
from sails_align.experiments.methods.entries import METHODS
from sails_align.experiments.summary import Mean
from sails_align.experiments.tampering.defences import DEFENCES

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#7F7F7F"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^v<>phd8P"
LINES = ("-", "--", "-.", ":")
THEMES = {"light": ("#1b1b1b", "#d0d0d0", "#ffffff"), "dark": ("#e8e8e8", "#4a4a4a", "#16181b")}
"""Colours of text, of grid lines and of the background, which are those of the page."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    line: str


LOOKS: Mapping[str, Look] = {
    "base": Look(GREY, "H", ":"),
    "rlhf": Look(GREY, "P", "-."),
    "sft-sails": Look(VERMILLION, "o", "-"),
    "sft-lora": Look(BLUE, "s", "--"),
    "sft-full": Look(GREEN, "D", "-."),
    "sft-lora-blocks": Look(SKY, "^", ":"),
    "sft-random-features": Look(PURPLE, "v", "--"),
    "sft-random-basis": Look(ORANGE, ">", "-."),
    "sft-sails-paper": Look(VERMILLION, "X", ":"),
    "sft-mean-diff": Look(PURPLE, "h", ":"),
    "sft-pca": Look(ORANGE, "<", "--"),
    "dpo-sails": Look(VERMILLION, "*", "-"),
    "dpo-lora": Look(BLUE, "p", "--"),
    "dpo-full": Look(GREEN, "d", "-."),
}
"""By name of the run."""
SAME_AS = {
    "lora": "sft-lora",
    "lora-last-blocks": "sft-lora-blocks",
    "basis-random-features": "sft-random-features",
    "basis-random": "sft-random-basis",
    "basis-mean-diff": "sft-mean-diff",
    "basis-pca": "sft-pca",
    "paper": "sft-sails-paper",
}
"""Ablations and defences that are methods of the main study."""
SETTINGS = set(ABLATIONS.names()) - SAME_AS.keys()
"""Ablations that change a setting, which all look alike."""


def look_of(name: str) -> Look:
    """Return the look of a method, which depends on its name alone.

    No two methods or defences of this package share their colour and marker. Others may share them with each other.
    """
    if name in SETTINGS:
        return Look(GREY, "o", "-")
    known = _looks().get(SAME_AS.get(name, name))
    return _free_look(name, _looks()) if known is None else known


@cache
def _looks() -> Mapping[str, Look]:
    """Return the looks above, and one for each other method and defence."""
    looks = dict(LOOKS)
    for name in (*METHODS.names(), *DEFENCES.names()):
        if name not in looks and name not in SAME_AS:
            looks[name] = _free_look(name, looks)
    return looks


def _free_look(name: str, looks: Mapping[str, Look]) -> Look:
    """Return a look whose colour and marker are not among others: the first one from where the name's hash points to.

    So a new method changes the looks of few others.
    """
    taken = {(look.colour, look.marker) for look in looks.values()}
    pairs = list(itertools.product(COLOURS, MARKERS))
    number = zlib.crc32(name.encode())
    start = number % len(pairs)
    free = (pair for pair in (*pairs[start:], *pairs[:start]) if pair not in taken)
    colour, marker = next(free, pairs[start])
    return Look(colour, marker, LINES[number % len(LINES)])


@dataclass(frozen=True)
class Picture:
    """A figure, which is drawn when it is needed."""

    name: str
    title: str
    """Caption, and text for people who do not see it."""
    size: tuple[float, float]
    """In inches."""
    draw: Callable[[Figure], None] = field(compare=False)
    """Fills an empty figure."""

    @cached_property
    def svg(self) -> Mapping[str, bytes]:
        """The figure by theme."""
        return {theme: self._drawn(theme, "svg") for theme in THEMES}

    def png(self) -> bytes:
        """Return the figure as a PNG file, on white."""
        return self._drawn("light", "png")

    def write(self, folder: Path) -> None:
        """Write <name>.svg, which is on white."""
        write_bytes(folder / f"{self.name}.svg", self.svg["light"])

    def _drawn(self, theme: str, kind: str) -> bytes:
        """Return the figure as a file of a kind that matplotlib knows."""
        ink, grid, paper = THEMES[theme]
        style: dict[Any, Any] = {
            "font.size": 10,
            "font.family": "DejaVu Sans",
            "svg.hashsalt": self.name,  # so that the same figure is the same file
            "svg.fonttype": "path",
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
            "grid.color": grid,
            "grid.linewidth": 0.5,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            buffer = BytesIO()
            figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
        return buffer.getvalue()


def ink() -> str:
    """Return the colour of text."""
    return str(matplotlib.rcParams["text.color"])


def axis_label(metric: Metric) -> str:
    """Return a metric's heading, and the direction along its axis that is better."""
    return f"{metric.heading}, {'better →' if metric.higher_is_better else '← better'}"


def end_at_range(axes: Axes, metric: Metric, axis: Literal["x", "y"]) -> None:
    """End an axis where the metric's range ends, such as at 100%. Call it once all is drawn."""
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    least, most = (metric.scale * bound for bound in metric.span)
    limits = max(low, least), min(high, most)
    axes.set_xlim(*limits) if axis == "x" else axes.set_ylim(*limits)


def panels(figure: Figure, n: int, n_columns: int, **shared: Any) -> list[Axes]:
    """Add panels in rows of at most `n_columns`."""
    n_columns = min(n_columns, n)
    found = figure.subplots(-(-n // n_columns), n_columns, squeeze=False, **shared).ravel()
    for axes in found[n:]:
        axes.set_visible(False)
    return list(found[:n])


def point(
    axes: Axes, look: Look, x: float, y: float, *, x_arms: Any = None, y_arms: Any = None, hollow: bool = False,
    size: float = 8, label: str | None = None,
) -> None:  # fmt: skip
    """Draw a marker, and below it the thin arms of its interval."""
    if x_arms is not None or y_arms is not None:
        axes.errorbar(
            x, y, xerr=x_arms, yerr=y_arms, fmt="none", ecolor=look.colour, elinewidth=1.2, capsize=2, alpha=0.6,
            zorder=2, clip_on=False,
        )  # fmt: skip
    axes.plot(
        x, y, color=look.colour, marker=look.marker, markersize=size, linestyle="none", label=label, zorder=3,
        markerfacecolor=axes.get_facecolor() if hollow else look.colour, clip_on=False,
    )  # fmt: skip


def arms(mean: Mean, metric: Metric) -> list[list[float]] | None:
    """Return the lengths of an interval's arms, for matplotlib; None if there is no interval."""
    if mean.value is None or mean.low is None or mean.high is None:
        return None
    return [[metric.scale * (mean.value - mean.low)], [metric.scale * (mean.high - mean.value)]]


def legend(figure: Figure, axes: Sequence[Axes], **where: Any) -> None:
    """Add one legend of all panels, with each name once."""
    found = {name: handle for of in axes for handle, name in zip(*of.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), fontsize=9, **where)


def finish(figure: Figure, axes: Axes, across: Metric | None, up: Metric) -> None:
    """Name the axes of a figure with one panel, end them where their metrics do, and add grid lines and a legend."""
    if across is not None:
        axes.set_xlabel(axis_label(across))
        end_at_range(axes, across, "x")
    axes.set_ylabel(axis_label(up))
    end_at_range(axes, up, "y")
    axes.grid(visible=True)
    legend(figure, [axes], loc="outside right upper")
