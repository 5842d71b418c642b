"""A comparison -> a page that says what was found: one HTML file without network, and the same in Markdown.

All numbers come from results of cells; the templates hold words only.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from sails_align.artifacts import write_text
from sails_align.comparison.plan import Plan
from sails_align.comparison.summary import COMPARED, MEASURES, Mean, Measure, Row
from sails_align.reporting.figures import Picture

PICTURES = "figures"
"""Folder of the figures, beside the pages."""


@dataclass(frozen=True)
class Report:
    """What a page shows."""

    title: str
    plan: Plan
    rows: Sequence[Row]
    differences: Mapping[str, Mapping[str, Mapping[str, Mean]]]
    """By reference run, run and measure."""
    pictures: Sequence[Picture]
    command: str
    """That makes the same report."""
    provenance: Mapping[str, Any]
    """Versions, commit, machine, seconds."""

    def label(self, run: str) -> str:
        """What a run is called."""
        return next(row.run.label for row in self.rows if row.run.name == run)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.html, report.md and the figures. Returns the two pages."""
    for picture in report.pictures:
        picture.write(folder / PICTURES)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sails_align.reporting"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "MEASURES": MEASURES,
        "COMPARED": COMPARED,
        "PICTURES": PICTURES,
        "number": number,
        "interval": interval,
        "difference": difference,
        "verdict": verdict,
        "data_uri": data_uri,
    }
    pages = []
    for name in ("report.html", "report.md"):
        pages.append(folder / name)
        write_text(pages[-1], environment.get_template(f"{name}.j2").render(report=report))
    return pages


def number(value: float | None, measure: Measure) -> str:
    """A value as it is shown."""
    return "–" if value is None else f"{measure.scale * value:,.{measure.digits}f}"


def interval(mean: Mean, measure: Measure) -> str:
    """A mean and the half width of its interval."""
    if mean.value is None or mean.low is None or mean.high is None:
        return number(mean.value, measure)
    half = (mean.high - mean.low) / 2
    return f"{number(mean.value, measure)} ± {number(half, measure)}"


def difference(mean: Mean, measure: Measure) -> str:
    """A difference and its interval, with a sign."""
    if mean.value is None:
        return "–"
    value = f"{measure.scale * mean.value:+.{measure.digits}f}"
    if mean.low is None or mean.high is None:
        return value
    return (
        f"{value} ({measure.scale * mean.low:+.{measure.digits}f} to {measure.scale * mean.high:+.{measure.digits}f})"
    )


def verdict(mean: Mean, measure: Measure) -> str:
    """`better`, `worse`, or `open` if the interval holds 0."""
    if mean.value is None or mean.low is None or mean.high is None or mean.low <= 0 <= mean.high:
        return "open"
    return "better" if (mean.value > 0) == measure.higher_is_better else "worse"


def data_uri(svg: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
