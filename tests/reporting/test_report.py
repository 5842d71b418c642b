"""A report made again from stored results, of this version's format and of the ones before."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from made_results import outcome, stored

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.experiments.plan import FORMAT, RUNS, Measures, Plan
from sails_align.experiments.results import Results
from sails_align.experiments.studies import Study, StudyKind
from sails_align.reporting.report import ReportData, rewrite_report, title_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of SAILS alone, whose cells all have the stored result."""
    plan = Plan(runs=(RUNS["sft-sails"],), n_seeds=2, learning_rates=(1e-2,), measures=Measures(n_examples=16))
    write_json(tmp_path / "plan.json", {"studies": [asdict(Study("main", (("testbed", plan),)))], "command": "sails c"})
    for cell in (*plan.tuning_cells(), *plan.test_cells({"sft-sails": 1e-2})):
        write_json(Results(tmp_path).path(cell), stored())
    return tmp_path


def test_stored_results_can_be_read(folder: Path) -> None:
    """The format of stored results changes with `FORMAT` alone; those of the format before must still be shown."""
    assert FORMAT == 2
    comparison, values, paths = rewrite_report(folder)
    numbers = stored()["numbers"]
    (row,) = comparison.main.rows
    for name in ("safety_rate_in_distribution", "over_refusal_rate", "correct_answer_rate", "harmfulness"):
        assert row.means[name].value == pytest.approx(numbers[name]["value"])
        assert values["rows"][0]["means"][name]["n"] == 2
    for name in ("attack_success_rate", "capability", "left_after_harmful", "train_seconds", "peak_memory_mb"):
        assert row.means[name].value is not None
    assert json.loads(paths[0].read_text())["chosen"] == {"sft-sails": 1e-2}
    assert "What the features mean" in (folder / "report.md").read_text()


def test_a_world_named_twice_is_reported_once(folder: Path) -> None:
    stored_plan = json.loads((folder / "plan.json").read_text())
    (main,) = stored_plan["studies"]
    again = {"kind": "worlds", "plans": 2 * main["plans"]}
    write_json(folder / "plan.json", {**stored_plan, "studies": [main, again]})
    _, values, _ = rewrite_report(folder)
    assert list(values["studies"]["worlds"]) == ["testbed"]


def test_a_report_made_again_is_the_same(folder: Path) -> None:
    rewrite_report(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".md", ".html", ".svg")}
    rewrite_report(folder)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("kinds", "command", "title"),
    [
        (["main"], "sails compare", "Comparison of alignment methods on the world testbed"),
        (
            ["main", "examples"],
            "sails compare --config recipes/configs/x.yaml --n_seeds 2",
            "Comparison of alignment methods on the world testbed (numbers of examples, x.yaml)",
        ),
        (["tampering"], "sails compare", "Defences against tampering on the world testbed"),
        (
            ["methods", "tampering"],
            "sails compare",
            "Side studies on the world testbed (all alignment methods, defences against tampering)",
        ),
    ],
)
def test_titles_tell_reports_apart(kinds: list[StudyKind], command: str, title: str) -> None:
    data = ReportData({kind: {"testbed": outcome()} for kind in kinds})
    assert title_of(data, command) == title


def test_how_long_it_took_is_kept(folder: Path) -> None:
    write_json(folder / "results.json", {"provenance": {"seconds_of_the_last_call": 77, "processes": 2}})
    assert rewrite_report(folder)[1]["provenance"]["seconds_of_the_last_call"] == 77


def test_a_missing_result_is_named(folder: Path) -> None:
    next((folder / "cells").iterdir()).unlink()
    with pytest.raises(InputError, match=r"1 of \d results are missing, such as of \w+/sft-sails/"):
        rewrite_report(folder)


def test_what_made_the_trainings_is_told_apart_from_what_made_the_report(folder: Path) -> None:
    first, *_ = sorted((folder / "cells").iterdir())
    result = json.loads(first.read_text())
    write_json(first, {**result, "made_by": {"commit": "abc", "machine": "one"}})
    provenance = rewrite_report(folder)[1]["provenance"]
    assert provenance["commit of the trainings"] == "abc; not recorded"
    assert provenance["machine of the trainings"] == "not recorded; one"
