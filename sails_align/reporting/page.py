"""Sections -> a page: one HTML file without network, and the same in Markdown. The templates hold no numbers."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from sails_align.core.files import write_text
from sails_align.evaluation.metrics import Metric
from sails_align.experiments.summary import Mean
from sails_align.reporting.figures import Picture

PICTURES = "figures"
"""Folder of the figures, beside the pages."""


@dataclass(frozen=True)
class Entry:
    """What stands in a table."""

    text: str
    verdict: str = "open"
    """`better`, `worse` or `open`: how it is shown."""


@dataclass(frozen=True)
class Grid:
    """A table; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]


@dataclass(frozen=True)
class Section:
    """A part of a page, in the order of its fields."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs."""
    grids: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()
    meanings: Sequence[Mapping[str, Any]] = ()
    """Of features, as `subspace.meaning.Meaning.to_json` gives them."""


@dataclass(frozen=True)
class Page:
    """What is shown."""

    title: str
    sections: Sequence[Section]
    command: str
    """That makes the same report."""
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
    environment.globals |= {"PICTURES": PICTURES, "data_uri": data_uri, "highest": highest}
    environment.filters["code"] = code
    paths = []
    for name in ("report.html", "report.md"):
        paths.append(folder / name)
        write_text(paths[-1], environment.get_template(f"{name}.j2").render(page=page))
    return paths


def entries(*texts: str) -> list[Entry]:
    """A row of plain texts."""
    return [Entry(text) for text in texts]


def number(value: float | None, metric: Metric) -> str:
    """A value as it is shown."""
    return "–" if value is None else f"{metric.scale * value:,.{metric.digits}f}"


def interval(mean: Mean, metric: Metric) -> str:
    """A mean and the half width of its interval."""
    if mean.value is None or mean.low is None or mean.high is None:
        return number(mean.value, metric)
    half = (mean.high - mean.low) / 2
    return f"{number(mean.value, metric)} ± {number(half, metric)}"


def difference(mean: Mean, metric: Metric) -> Entry:
    """A difference and its interval, with a sign."""
    if mean.value is None:
        return Entry("–")
    value = f"{metric.scale * mean.value:+.{metric.digits}f}"
    if mean.low is None or mean.high is None:
        return Entry(value)
    low, high = (f"{metric.scale * bound:+.{metric.digits}f}" for bound in (mean.low, mean.high))
    return Entry(f"{value} ({low} to {high})", verdict(mean, metric))


def verdict(mean: Mean, metric: Metric) -> str:
    """`better`, `worse`, or `open` if the interval holds 0."""
    if mean.value is None or mean.touches_zero:
        return "open"
    return "better" if (mean.value > 0) == metric.higher_is_better else "worse"


def data_uri(svg: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def highest(activations: Sequence[float]) -> float:
    """What the tokens of a context are coloured by."""
    return max([*activations, 1e-9])


def code(text: str) -> str:
    """A token as Markdown's code: no other mark-up in it acts."""
    shown = " ".join(text.split()) or "␣"
    return "`" + shown.replace("`", "'").replace("|", "¦") + "`"
