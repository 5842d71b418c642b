"""Send the result of an evaluation to the trackers of `--report_to`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sails_align.core.log import say
from sails_align.core.trackers import services_of, trackers_of
from sails_align.evaluation.compared import comparison_of
from sails_align.evaluation.metrics import as_numbers
from sails_align.evaluation.output import COMPARED
from sails_align.evaluation.result import EvaluationResult


def send(results: Sequence[EvaluationResult], report_to: Sequence[str], folder: Path) -> None:
    """Send rates, also of each category, and a table of responses with their verdicts.

    Args:
        results: of the model; and of the one it is compared with, if there is one, whose differences are sent, too.
        report_to: names of services.
        folder: of the evaluation, which names the run. TensorBoard's files are in its `tensorboard`.
    """
    if not services_of(report_to):
        return
    numbers = _numbers(results[0])
    if len(results) > 1:
        overall = comparison_of(*results)["overall"]
        for part in (COMPARED, "difference"):
            numbers |= as_numbers({name: row[part] for name, row in overall.items()}, f"{part}/")
    tables = zip(("responses", f"{COMPARED}/responses"), results, strict=False)
    send_numbers(numbers, report_to, folder, dict(tables))


def send_numbers(
    numbers: Mapping[str, float],
    report_to: Sequence[str],
    folder: Path,
    tables: Mapping[str, EvaluationResult] | None = None,
) -> None:
    """Send numbers, and tables of responses by their names; `report_to` and `folder` as for `send`."""
    if not (services := services_of(report_to)):
        return
    with trackers_of(services, folder.resolve().name, folder / "tensorboard") as trackers:
        trackers.numbers(dict(numbers))
        for name, result in (tables or {}).items():
            trackers.table(name, _rows(result))
    say(f"sent to {', '.join(services)}")


def _numbers(result: EvaluationResult) -> dict[str, float]:
    numbers = as_numbers(result.metrics["overall"], "overall/")
    for category, rates in result.metrics["by_category"].items():
        numbers |= as_numbers(rates, f"by_category/{category}/")
    return numbers


def _rows(result: EvaluationResult) -> list[dict[str, Any]]:
    """Return a row for each response, with the score of each task; None if it has none."""
    frame = result.to_pandas().astype(object)
    return frame.where(frame.notna(), None).to_dict("records")  # pyright: ignore[reportReturnType]
