"""Send the report of a comparison to the trackers of `--report_to`."""

from collections.abc import Sequence
from pathlib import Path

from sails_align.core.log import say
from sails_align.core.trackers import services_of, trackers_of
from sails_align.experiments.summary import SHOWN, with_numbers
from sails_align.reporting.report import ReportData


def send(data: ReportData, report_to: Sequence[str], folder: Path) -> None:
    """Send the means of each method over seeds, with the ends of their intervals, and the report's figures.

    Args:
        data: of the report.
        report_to: names of services.
        folder: of the comparison, which names the run. TensorBoard's files are in its `tensorboard`.
    """
    if not (services := services_of(report_to)):
        return
    with trackers_of(services, folder.resolve().name, folder / "tensorboard") as trackers:
        trackers.numbers(_headline(data))
        for picture in (picture for section in data.sections for picture in section.pictures):
            trackers.picture(picture.name, picture.png())
    say(f"sent to {', '.join(services)}")


def _headline(data: ReportData) -> dict[str, float]:
    """Return the numbers of the table on the console."""
    numbers: dict[str, float | None] = {}
    for kind, outcomes in data.outcomes.items():
        for label, outcome in outcomes.items():
            for row in outcome.rows:
                for metric in with_numbers(SHOWN, [row.means]):
                    name = f"{kind}/{label}/{row.run.label}/{metric.name}"
                    mean = row.means[metric.name]
                    numbers |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return {name: value for name, value in numbers.items() if value is not None}
