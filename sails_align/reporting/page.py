"""Write sections as a page: one self-contained HTML file, and the same in Markdown."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from sails_align.core.files import write_text
from sails_align.core.text import code_span, printable
from sails_align.evaluation.metrics import Metric
from sails_align.experiments.summary import Mean
from sails_align.reporting.drawing import Picture

PICTURES = "figures"
"""Folder of the figures, next to the pages."""
NOTE = (
    "Differences are in points and paired by seed, with 95% intervals in brackets. Better and worse are said only "
    "where the interval does not contain 0. Intervals are not corrected for multiple comparisons: of many differences, "
    "some appear by chance."
)
"""What all findings have in common."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""The content security policy of report.html: no script, no request; styles and pictures are in the file itself."""


@dataclass(frozen=True)
class TableCell:
    """A cell of a table."""

    text: str
    verdict: str = "open"
    """`better`, `worse` or `open`."""


@dataclass(frozen=True)
class Grid:
    """A table; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page, in the order of its fields."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs."""
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()
    meanings: Sequence[Mapping[str, Any]] = ()
    """Of features: the fields of `saes.explain.Meaning`."""
    findings: Sequence[str] = ()
    """Sentences that the page begins with."""


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    findings: Sequence[str]
    """Sentences that say what was found, and what is not known."""
    sections: Sequence[Section]
    command: str
    """Command that makes the same report."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, commit, machine, seconds."""


def write_page(page: Page, folder: Path) -> list[Path]:
    """Write report.html, report.md and the figures. Returns the two pages."""
    for section in page.sections:
        for picture in section.pictures:
            picture.write(folder / PICTURES)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sails_align.reporting"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"PICTURES": PICTURES, "NOTE": NOTE, "POLICY": POLICY, "data_uri": data_uri}
    environment.filters |= {"code": code, "plain": plain}
    paths = []
    for name in ("report.html", "report.md"):
        paths.append(folder / name)
        write_text(paths[-1], environment.get_template(f"{name}.j2").render(page=page))
    return paths


def entries(*texts: str) -> list[TableCell]:
    """Return a row of plain texts."""
    return [TableCell(text) for text in texts]


def number(value: float | None, metric: Metric) -> str:
    """Return a value as it is shown."""
    return "–" if value is None else f"{metric.scale * value:,.{metric.digits}f}"


def interval(mean: Mean, metric: Metric) -> str:
    """Return a mean and its interval: `98.0 (97.2 to 98.6)`."""
    if mean.value is None or mean.low is None or mean.high is None:
        return number(mean.value, metric)
    return f"{number(mean.value, metric)} ({number(mean.low, metric)} to {number(mean.high, metric)})"


def difference(mean: Mean, metric: Metric) -> TableCell:
    """Return a difference and its interval, with signs."""
    if mean.value is None:
        return TableCell("–")
    value = f"{metric.scale * mean.value:+.{metric.digits}f}"
    if mean.low is None or mean.high is None:
        return TableCell(value)
    low, high = (f"{metric.scale * bound:+.{metric.digits}f}" for bound in (mean.low, mean.high))
    return TableCell(f"{value} ({low} to {high})", verdict(mean, metric))


def verdict(mean: Mean, metric: Metric) -> str:
    """Return `better`, `worse`, or `open` if the interval contains 0."""
    if mean.value is None or mean.touches_zero:
        return "open"
    return "better" if (mean.value > 0) == metric.higher_is_better else "worse"


def data_uri(svg: bytes) -> str:
    """Return a picture as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def code(text: str) -> str:
    """Return a token as Markdown's code, where no other mark-up has an effect."""
    return code_span(" ".join(text.split()) or "␣")


def plain(text: str) -> str:
    """Return a text in one line of Markdown, where names from data are no mark-up and do not end a table's cell."""
    return re.sub(r"[\\`*<>|\[\]]", lambda mark: f"&#{ord(mark[0])};", " ".join(printable(text).split()))
