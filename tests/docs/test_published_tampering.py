"""The published studies of tampering: the tables of pages are those of the reports."""

import json
import re
import statistics
from typing import Any

import pytest
from published import DOCS, KEPT, KEPT_ON_SMOLLM2, TAMPERING_COLUMNS, Table, by_first_heading, tables_of

from sails_align.evaluation.intervals import span_of_difference
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.merits import kept
from sails_align.experiments.summary import mean_of
from sails_align.experiments.tampering.defences import DEFENCES, OWN_CONTROLS
from sails_align.reporting.page import difference


def levels_of_defences(attack: str, study: str = "tampering") -> Table:
    tables = tables_of(f"results/{study}/report.md", f"Tampering: {attack}")
    return next(rows for head, rows in tables if head[:2] == ["defence", "hyperparameter"])


def own_control_of(label: str) -> str:
    """Return the label of the control of a defence that lacks its choice alone; empty if it has none."""
    (name,) = (name for name, defence in DEFENCES.items() if defence.label == label)
    return DEFENCES.get(OWN_CONTROLS[name]).label if name in OWN_CONTROLS else ""


SHORT = {
    "lower rate": "minus lower learning rate",
    "safety examples": "minus safety rows mixed in",
    "WiSE-FT": "minus WiSE-FT",
    "LoRA": "minus LoRA",
    "its own": "minus its own control",
}


@pytest.mark.parametrize(
    ("study", "kept_there", "level", "not_beaten"),
    [
        ("tampering", KEPT, "testbed: kept, %", "controls not beaten"),
        ("defences-smollm2", KEPT_ON_SMOLLM2, "SmolLM2: kept, %", "controls not beaten there"),
    ],
)
def test_the_table_of_what_to_use_when_is_that_of_the_report(
    study: str, kept_there: str, level: str, not_beaten: str
) -> None:
    minus = by_first_heading(f"results/{study}/report.md", "Tampering: poison-10")[kept_there]
    levels = {name.removesuffix(", control"): row for name, row in levels_of_defences("poison-10", study).items()}
    of_page = by_first_heading("keeping_safety.md")["method"]
    labels = {
        "a smaller learning rate": "lower learning rate",
        "safety examples": "safety rows mixed in",
        "an average of the weights": "EMA",
        "frozen units": "SSAH",
        "SIFT's protected entries": "SIFT (protected entries)",
        "task arithmetic": "task arithmetic (RESTA)",
    }
    for name, row in of_page.items():
        title = re.sub(r"\[(.*)\]\(.*\)", r"\1", name)
        label = labels.get(title, title)
        assert row[level] == levels[label][kept_there].split(" (")[0], name
        if row[not_beaten] == "(a control)":
            assert label not in minus
            continue
        told = row[not_beaten].split(", ")
        found = [short for short, column in SHORT.items() if minus[label][column]]
        open_ = [short for short in found if not minus[label][SHORT[short]].endswith(" better")]
        assert told == (open_ or ["none"]), name


def test_the_tables_of_defences_are_those_of_the_report() -> None:
    of_report = by_first_heading("results/tampering/report.md", "Tampering: poison-10")
    levels = {name.removesuffix(", control"): row for name, row in levels_of_defences("poison-10").items()}
    minus_none, minus_controls = of_report["minus no defence"], of_report[KEPT]
    own = {"before": "before the attack", "no defence": "none"}
    seen = set()
    for path in (DOCS / "methods").glob("*.md"):
        tables = [(head, rows) for head, rows in tables_of(f"methods/{path.name}") if head[:2] == ["%", "before"]]
        for head, rows in tables:
            method = head[3]
            seen.add(method)
            for name, row in rows.items():
                column = TAMPERING_COLUMNS[name]
                for heading in head[1:4]:
                    assert row[heading] == levels[own.get(heading, heading)][column].split(" (")[0], (path, name)
                assert row["minus no defence"] == minus_none[method][column], (path, name)
            for first, rows_of in tables_of(f"methods/{path.name}"):
                if first == ["safety and task kept, %", "difference"]:
                    for name, row in rows_of.items():
                        column = "minus its own control" if name == f"minus {own_control_of(method)}" else name
                        assert row["difference"] == minus_controls[method][column], (path, name)
    assert seen >= {name for name in levels if name not in own.values() and name in minus_controls}


@pytest.mark.parametrize("method", ["IRR", "SIFT (protected entries)", "Safe LoRA", "GuardSpace", "SSAH"])
def test_the_documents_have_what_the_choices_of_defences_do_on_smollm2(method: str) -> None:
    minus = by_first_heading("results/defences-smollm2/report.md", "Tampering: poison-10")[KEPT_ON_SMOLLM2]
    entry = minus[method]["minus its own control"]
    value, low, high = re.findall(r"[+-][0-9.]+", entry)
    text = (DOCS / "keeping_safety.md").read_text().partition("### On SmolLM2")[2].partition("\n### ")[0]
    ends = f"{low.removeprefix('+')} to {high.removeprefix('+') if entry.endswith('better') else high}"
    assert re.search(rf"\({re.escape(value)}( points)?, {re.escape(ends)}\)", " ".join(text.split())), ends


def test_the_pages_of_methods_have_what_they_keep_on_smollm2() -> None:
    levels = {
        name.removesuffix(", control"): row[KEPT_ON_SMOLLM2].replace(" (", "% (")
        for name, row in levels_of_defences("poison-10", "defences-smollm2").items()
    }
    for path in (DOCS / "methods").glob("*.md"):
        for head, _ in tables_of(f"methods/{path.name}"):
            if head[:2] == ["%", "before"]:
                told = re.search(
                    r"On SmolLM2 with three seeds, .*? keeps? (.*?), and a smaller learning rate (.*?) \(\[table",
                    " ".join(path.read_text().split()),
                )
                assert told is not None, path
                assert told.groups() == (levels[head[3]], levels["lower learning rate"]), path


@pytest.mark.parametrize(
    ("page", "first_heading", "study", "attack"),
    [
        ("keeping_safety.md", "`poison-10`, %", "tampering", "poison-10"),
        ("keeping_safety.md", "`prefill-5`, %", "tampering", "prefill-5"),
        ("keeping_safety.md", "`poison-10` on SmolLM2, %", "defences-smollm2", "poison-10"),
        ("methods/ablation.md", "`ablate`, %", "ablation", "ablate"),
    ],
)
def test_the_tables_of_all_defences_are_those_of_the_report(
    page: str, first_heading: str, study: str, attack: str
) -> None:
    levels = levels_of_defences(attack, study)
    rows = by_first_heading(page)[first_heading]
    assert list(rows) == list(levels)
    for name, row in rows.items():
        for heading in row.keys() - {first_heading}:
            column = TAMPERING_COLUMNS.get(heading, heading)
            assert row[heading] in (levels[name][column], levels[name][column].split(" (")[0]), (name, heading)


@pytest.mark.parametrize("defence", ["irr", "constrained"])
def test_the_documents_have_what_defences_keep_more_than_frozen_random_units(defence: str) -> None:
    studies = json.loads((DOCS / "results/tampering/results.json").read_text())["studies"]["tampering"]
    rows = {row["run"]: row["by_seed"] for row in studies["poison-10"]}
    metric = METRICS["kept"]
    by_seed = [of["kept"] - rows["ssah-random"][seed]["kept"] for seed, of in rows[defence].items()]
    assert len(by_seed) == 20
    found = difference(mean_of(by_seed, span_of_difference(metric.span)), metric).text
    value, _, span = found.partition(" (")
    text = " ".join((DOCS / "methods" / f"{defence}.md").read_text().split())
    assert re.search(rf"freezing random units [^.(]*\({re.escape(f'{value} points, {span}')}", text), found


def test_the_documents_have_what_safety_examples_keep() -> None:
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for path in (DOCS / "results/tampering/cells").glob("*.json"):
        result = json.loads(path.read_text())
        cell, of = result["cell"], result["tampering"]
        if (cell["part"], of["attack"]) == ("validation", "poison-10"):
            found.setdefault((of["defence"], cell["learning_rate"]), []).append(result)
    text = (DOCS / "keeping_safety.md").read_text()
    rows = {("safety-rows", n): f"| {n} " for n in (16, 32, 64, 128)}
    rows |= {("sift", 0.75): "| none, SIFT", ("guardspace", 0.99): "| none, GuardSpace"}
    for key, first in rows.items():
        results = found[key]
        assert len(results) == 3
        values = [
            [result["numbers"][name]["value"] for result in results] for name in ("safety_rate", "task_score")
        ] + [[kept(result) for result in results]]
        told = " | ".join(f"{100 * statistics.mean(of):.1f}" for of in values)
        assert any(line.startswith(first) and line.endswith(f"| {told} |") for line in text.splitlines()), (key, told)
