"""Report a comparison: results.json, and the page that shows it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import package_versions
from sails_align.core.files import write_json
from sails_align.core.machine import machine_name
from sails_align.experiments.results import Results, read_plan
from sails_align.experiments.studies import Study, StudyKind
from sails_align.experiments.summary import Outcome
from sails_align.reporting.findings import not_known
from sails_align.reporting.page import Page, Section, write_page
from sails_align.reporting.sections import REFERENCES, SAILS, SECTIONS
from sails_align.training.record import git_commit

TITLES: Mapping[StudyKind, str] = {
    "ablations": "ablations",
    "tampering": "defences against tampering",
    "methods": "all alignment methods",
    "examples": "numbers of examples",
    "worlds": "other worlds",
}
"""What side studies are called in the title."""


@dataclass(frozen=True)
class ReportData:
    """All that sections are made of."""

    outcomes: Mapping[StudyKind, Mapping[str, Outcome]]
    """By study and name of the plan."""

    @property
    def main(self) -> Outcome:
        """Outcome of the main study; a comparison may be without one (`shown`)."""
        return next(iter(self.outcomes["main"].values()))

    @property
    def shown(self) -> list[Outcome]:
        """The outcomes of the main study, or else of the first one."""
        return list(next(iter(self.outcomes.values())).values())

    @cached_property
    def sections(self) -> list[Section]:
        """The sections that there are results for, in the order of the registry."""
        entries = [entry for _, entry in SECTIONS.items() if "main" in self.outcomes or not entry.is_of_main]
        return [section for entry in entries for section in entry.load()(self)]

    def to_json(self) -> dict[str, Any]:
        """Return every reported number, for `results.json`."""
        studies = {kind: _side_study(of) for kind, of in self.outcomes.items() if kind != "main"}
        return {**(_main_study(self.main) if "main" in self.outcomes else {}), "studies": studies}


def _main_study(outcome: Outcome) -> dict[str, Any]:
    return {
        "rows": [row.to_json() for row in outcome.rows],
        "differences": {
            reference: {
                name: {metric: asdict(mean) for metric, mean in means.items()}
                for name, means in outcome.minus(reference).items()
            }
            for reference in REFERENCES
            if reference in outcome.labels
        },
        "chosen": outcome.chosen,
        "sets": [
            {
                "set": of.name,
                "metric": of.metric.name,
                "n_prompts": of.n_prompts,
                "means": {run: asdict(of.mean(run)) for run in of.by_run},
                "differences": {
                    ours: {name: asdict(of.difference(ours, name)) for name in baselines if name in of.by_run}
                    for ours, baselines in SAILS.items()
                    if ours in of.by_run
                },
            }
            for of in outcome.sets()
        ],
    }


def _side_study(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    kept = ("run", "learning_rate", "means", "by_seed", "tuning", "unstable_seeds", "doubts")
    return {
        label: [{name: value for name, value in row.to_json().items() if name in kept} for row in outcome.rows]
        for label, outcome in outcomes.items()
    }


def write_report(
    studies: Sequence[Study], results: Results, command: str, about: Mapping[str, Any]
) -> tuple[ReportData, dict[str, Any], list[Path]]:
    """Write results.json and the pages to the folder of the results.

    Returns:
        the results, what is in results.json, and the files.

    Raises:
        InputError: if results are missing.
    """
    outcomes: dict[StudyKind, dict[str, Outcome]] = {
        study.kind: {
            label: results.outcome(plan, prefix)
            for (label, plan), prefix in zip(dict(study.plans).items(), study.by_prefix(), strict=True)
        }
        for study in studies
    }
    data = ReportData(outcomes)
    findings = [*(sentence for section in data.sections for sentence in section.findings), *not_known(data.shown)]
    provenance = {**about, **_provenance(outcomes)}
    values = {"findings": findings, **data.to_json(), "command": command, "provenance": provenance}
    path = results.folder / "results.json"
    write_json(path, values)
    page = Page(title_of(data, command), findings, data.sections, command, provenance)
    return data, values, [path, *write_page(page, results.folder)]


def title_of(data: ReportData, command: str) -> str:
    """Name the studies, the model and the file of `--config`, so that reports on one model can be told apart."""
    plan = data.shown[0].plan
    what = "Comparison of alignment methods" if "main" in data.outcomes else "Side studies"
    studies = [TITLES[kind] for kind in data.outcomes if kind != "main"]
    if "main" not in data.outcomes and len(studies) == 1:
        what, studies = studies[0][0].upper() + studies[0][1:], []
    where = plan.world if plan.protocol else f"the world {plan.world}"
    words = shlex.split(command)
    config = [Path(word).name for option, word in pairwise(words) if option == "--config"][:1]
    return f"{what} on {where}{_in_brackets([*studies, *config])}"


def _in_brackets(texts: Sequence[str]) -> str:
    return f" ({', '.join(texts)})" if texts else ""


def rewrite_report(folder: Path) -> tuple[ReportData, dict[str, Any], list[Path]]:
    """Write a comparison's report again; see `write_report`.

    Raises `InputError` if the folder has no comparison, or results are missing.
    """
    studies, command = read_plan(folder / "plan.json")
    try:
        before = json.loads((folder / "results.json").read_text(encoding="utf-8"))["provenance"]
        about = {name: before[name] for name in ("seconds_of_the_last_call", "processes") if name in before}
    except (OSError, ValueError, KeyError, TypeError):  # there is no report yet
        about = {}
    return write_report(studies, Results(folder), command, about)


def _provenance(outcomes: Mapping[StudyKind, Mapping[str, Outcome]]) -> dict[str, Any]:
    """Return what made the trainings, which the results say, and what made the report."""
    commit = git_commit()
    versions = {name: version for name, version in package_versions().items() if version}
    of_plans = [outcome for of in outcomes.values() for outcome in of.values()]
    results = [result for outcome in of_plans for found in (outcome.tuned, outcome.tested) for result in found.values()]
    made_by = [result.get("made_by") or {} for result in results]

    def told(name: str) -> str:
        return "; ".join(sorted({str(of.get(name) or "not recorded") for of in made_by})) or "none"

    return {
        "world": of_plans[0].plan.world,
        "commit of the trainings": told("commit"),
        "machine of the trainings": told("machine"),
        "commit of the report": "none" if commit is None else commit["commit"],
        "machine of the report": machine_name(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
