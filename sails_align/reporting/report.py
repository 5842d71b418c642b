"""A comparison's results -> results.json, and the page that shows them."""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import package_versions
from sails_align.core.files import write_json
from sails_align.experiments.plan import Plan
from sails_align.experiments.results import Results, read_plan
from sails_align.experiments.studies import Study, StudyKind
from sails_align.experiments.summary import Outcome
from sails_align.reporting.page import Page, Section, write_page
from sails_align.reporting.sections import REFERENCES, SECTIONS
from sails_align.training.record import git_commit


@dataclass(frozen=True)
class Comparison:
    """All that sections are made of."""

    outcomes: Mapping[StudyKind, Mapping[str, Outcome]]
    """By study, and what its plan is called."""

    @classmethod
    def read(cls, studies: Sequence[Study], results: Results) -> "Comparison":
        """Read the results of all cells.

        Raises:
            InputError: if results are missing.
        """
        return cls(
            {
                study.kind: {
                    label: results.outcome(plan, prefix)
                    for (label, plan), prefix in zip(study.plans, study.by_prefix(), strict=True)
                }
                for study in studies
            }
        )

    @property
    def main(self) -> Outcome:
        """Of the main question."""
        return next(iter(self.outcomes["main"].values()))

    def sections(self) -> Iterator[Section]:
        """Those that there are results for, in the order of the registry."""
        for _, entry in SECTIONS.items():
            yield from entry.load()(self)

    def to_json(self) -> dict[str, Any]:
        """Every reported number, as it stands in `results.json`."""
        names = self.main.labels
        return {
            "rows": [row.to_json() for row in self.main.rows],
            "differences": {
                reference: {
                    name: {metric: asdict(mean) for metric, mean in means.items()}
                    for name, means in self.main.minus(reference).items()
                }
                for reference in REFERENCES
                if reference in names
            },
            "chosen": self.main.chosen,
            "studies": {kind: _side_study(of) for kind, of in self.outcomes.items() if kind != "main"},
        }


def _side_study(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    kept = ("run", "learning_rate", "means")
    return {
        label: [{name: value for name, value in row.to_json().items() if name in kept} for row in outcome.rows]
        for label, outcome in outcomes.items()
    }


def write_report(
    studies: Sequence[Study], results: Results, command: str, about: Mapping[str, Any]
) -> tuple[Comparison, dict[str, Any], list[Path]]:
    """Write results.json and the pages.

    Args:
        studies: what was compared.
        results: of the cells; the report goes to their folder.
        command: that makes the same report.
        about: what else is told of how it was made.

    Returns:
        the results, what is in results.json, and the files.

    Raises:
        InputError: if results are missing.
    """
    comparison = Comparison.read(studies, results)
    plan = comparison.main.plan
    values = {**comparison.to_json(), "command": command, "provenance": {**about, **_provenance(plan)}}
    path = results.folder / "results.json"
    write_json(path, values)
    where = plan.world if plan.protocol else f"the world {plan.world}"
    title = f"Comparison of alignment methods on {where}"
    page = Page(title, list(comparison.sections()), command, values["provenance"])
    return comparison, values, [path, *write_page(page, results.folder)]


def rewrite_report(folder: Path) -> tuple[Comparison, dict[str, Any], list[Path]]:
    """Make a comparison's report again, from the results there are.

    Raises:
        InputError: if the folder is of no comparison, or results are missing.
    """
    studies, command = read_plan(folder / "plan.json")
    return write_report(studies, Results(folder), command, _told_before(folder))


def _told_before(folder: Path) -> dict[str, Any]:
    """How long the comparison took, if a report has been made of it."""
    try:
        provenance = json.loads((folder / "results.json").read_text(encoding="utf-8"))["provenance"]
        return {name: provenance[name] for name in ("seconds_of_the_last_call", "processes") if name in provenance}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _provenance(plan: Plan) -> dict[str, Any]:
    commit = git_commit()
    versions = {name: version for name, version in package_versions().items() if version}
    return {
        "world": plan.world,
        "commit": "none" if commit is None else commit["commit"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
