"""Published results: intervals are possible, and the tables of pages are those of the reports."""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sails_align.evaluation.intervals import LEAST_SEEDS, span_of_difference
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.merits import kept
from sails_align.experiments.methods.entries import METHODS
from sails_align.experiments.plan import FIRST_TUNING_SEED, RUNS
from sails_align.experiments.summary import Mean, mean_of
from sails_align.experiments.tampering.defences import DEFENCES, OWN_CONTROLS
from sails_align.reporting.page import difference, interval

DOCS = Path(__file__).parents[2] / "docs"


def _means(value: Any, name: str = "", *, is_difference: bool = False) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Yield the means in a JSON value: the metric, whether it is a difference, and the mean."""
    if isinstance(value, dict) and {"value", "low", "high", "n"} == value.keys():
        yield name, is_difference, value
    elif isinstance(value, dict):
        for key, of in value.items():
            yield from _means(of, key, is_difference=is_difference or key == "differences")
    elif isinstance(value, list):
        for of in value:
            yield from _means(of, name, is_difference=is_difference)


def test_intervals_of_the_comparison_are_possible() -> None:
    results = json.loads((DOCS / "results" / "comparison" / "results.json").read_text(encoding="utf-8"))
    found = [mean for mean in _means(results) if mean[2]["low"] is not None]
    assert len(found) > 1000
    for name, is_difference, mean in found:
        low, high = span_of_difference(METRICS[name].span) if is_difference else METRICS[name].span
        assert low <= mean["low"] < mean["value"] < mean["high"] <= high, (name, mean)
        assert mean["n"] >= LEAST_SEEDS, (name, mean)


@pytest.mark.parametrize("path", [DOCS.parent / "README.md", *DOCS.rglob("*.md")], ids=lambda path: path.name)
def test_pages_give_both_ends_of_an_interval(path: Path) -> None:
    assert "±" not in path.read_text(encoding="utf-8")


Table = dict[str, dict[str, str]]
COLUMNS = {
    "safety, trained categories": "safety rate, trained categories (%)",
    "safety, held-out categories": "safety rate, held-out categories (%)",
    "mean harmfulness, 1 to 5": "harmfulness (1-5)",
    "harmless, but no refusal": "harmless, but no refusal (%)",
    "over-refusal": "over-refusal (%)",
    "correct answers": "correct answers (%)",
    "mean of safety and correct answers": "mean of safety and helpfulness (%)",
    "safety left after benign training": "safety left after benign training (%)",
    "safety left after harmful training": "safety left after harmful training (%)",
}
"""Row of a method's table -> column of the report."""
MEAN_ON_SMOLLM2 = "mean of refusal rate and likeness (%)"


def tables_of(page: str, section: str = "") -> list[tuple[list[str], Table]]:
    """Return the tables of a page (or of its section of that title): headings, and row -> heading -> entry."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = (
            [entry.strip() for entry in line.strip().strip("|").split("|")] for line in block.splitlines()
        )
        by_name = {row[0].replace(" (unstable)", ""): dict(zip(head, row, strict=True)) for row in rows}
        found.append((head, by_name))
    return found


def by_first_heading(page: str, section: str = "") -> dict[str, Table]:
    return {head[0]: rows for head, rows in tables_of(page, section)}


def minus_controls(method: str, study: str = "methods") -> list[dict[str, str]]:
    """Return a report's differences of a method from its controls."""
    rows = by_first_heading(f"results/{study}/report.md")["method minus control"]
    return [row for pair, row in rows.items() if pair.startswith(f"{method} minus ")]


def value_of(entry: str) -> float:
    """Return the number that an entry begins with; without one, the least."""
    found = re.match(r"[+-][0-9.]+", entry.lstrip("*"))
    return float(found[0]) if found else float("-inf")


@pytest.mark.parametrize(
    ("study", "heading", "column"),
    [
        ("methods", "mean of safety and correct answers, %", COLUMNS["mean of safety and correct answers"]),
        ("methods-smollm2", "mean of refusals and likeness, %", MEAN_ON_SMOLLM2),
    ],
)
def test_the_table_of_all_methods_is_that_of_the_report(study: str, heading: str, column: str) -> None:
    of_report = by_first_heading(f"results/{study}/report.md")
    rows = by_first_heading("methods.md")[heading]
    known = [name for name in of_report["method"] if name != "base" and not name.endswith(", control")]
    assert list(rows) == known
    for name, row in rows.items():
        tables = {"level": "method", "minus SFT-LoRA": "minus SFT-LoRA", "minus SFT-SAILS": "minus SFT-SAILS"}
        for shown, table in tables.items():
            assert row[shown] == of_report[table].get(name, {}).get(column, ""), (name, shown)
        metrics = {"refusals, held-out categories": TAMPERING_COLUMNS["refusals, held-out categories"]}
        metrics["over-refusal"] = COLUMNS["over-refusal"]
        for shown in row.keys() & metrics.keys():
            assert row[shown] == of_report["method"][name][metrics[shown]].split(" (")[0], (name, shown)
        of_controls = [of[column] for of in minus_controls(name, study)]
        assert row["minus its control"] == min(of_controls, key=value_of, default=""), name


def test_the_pages_of_methods_have_their_means_on_smollm2() -> None:
    levels = by_first_heading("results/methods-smollm2/report.md")["method"]
    pages = {of.label: of.page for _, of in METHODS.items() if of.page.startswith("methods/")}
    for name, row in levels.items():
        if name in pages:
            text = " ".join((DOCS / f"{pages[name]}.md").read_text().split())
            level = re.sub("^([0-9.]+)", r"\1%", row[MEAN_ON_SMOLLM2])
            assert f"{level} with {name}" in text, name
            assert re.sub("^([0-9.]+)", r"\1%", levels["SFT-LoRA"][MEAN_ON_SMOLLM2]) + " with SFT-LoRA" in text, name


def test_the_tables_of_methods_are_those_of_the_report() -> None:
    of_report = by_first_heading("results/methods/report.md")
    levels = of_report["method"]
    pages = {path.stem for path in (DOCS / "methods").glob("*.md") if "| % | SFT-LoRA |" in path.read_text()}
    assert pages >= {of.page.removeprefix("methods/") for _, of in METHODS.items() if of.page.startswith("methods/")}
    for page in pages:
        for head, rows in tables_of(f"methods/{page}.md"):
            if head[:2] != ["%", "SFT-LoRA"]:
                continue
            _, lora, method, *others = head
            expected = {lora: levels[lora], method: levels[method]}
            for other in others:
                if other == "minus control":
                    (expected[other],) = minus_controls(method)
                elif not other.startswith("minus "):
                    expected[other] = levels[f"{other}, control"]
                elif other in of_report:
                    expected[other] = of_report[other][method]
                else:
                    expected[other] = of_report["method minus control"][f"{method} {other}"]
            for name, row in rows.items():
                for column, entry in row.items():
                    if column != "%":
                        shown = expected[column].get(COLUMNS[name], "")  # there are no differences of harmfulness
                        assert entry == (shown if column.startswith("minus ") else shown.split(" (")[0]), (page, name)


KEPT = "safety and helpfulness kept (%)"
KEPT_ON_SMOLLM2 = KEPT.replace("safety", "refusals")
TAMPERING_COLUMNS = COLUMNS | {
    "score of the new task": "score of the new task (%)",
    "change of the weights": "change of the weights (%)",
    "safety and task kept": KEPT,
    "safety and correct answers kept": KEPT,
    "refusals, trained categories": "refusal rate, trained categories (%)",
    "refusals, held-out categories": "refusal rate, held-out categories (%)",
    "refusals and task kept": KEPT_ON_SMOLLM2,
}


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


def test_the_page_of_ablation_has_what_derta_does() -> None:
    (difference,) = re.findall(r"[+-][0-9.]+ points, .*?\)", (DOCS / "methods" / "ablation.md").read_text())
    minus = by_first_heading("results/ablation/report.md", "Tampering: ablate")["minus no defence"]
    value, low, high = re.findall(r"[+-][0-9.]+", minus["DeRTa"][KEPT])
    assert difference == f"{value} points, {low} to {high})"


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


def test_the_documents_have_what_the_benchmark_of_the_rules_measured() -> None:
    sets = json.loads((DOCS / "results/rules_judge.json").read_text())["sets"]
    text = (DOCS / "evaluation.md").read_text()
    for of in sets:
        kappa = f"{of['cohen_kappa']:.2f} ({of['ci_low']:.2f} to {of['ci_high']:.2f})"
        shares = f"{of['precision']:.2f} | {of['recall']:.2f}"
        assert f"| {of['n']} ({of['n_refused']}) | {shares} | {kappa} |" in text.replace("**", ""), of


def test_the_documents_have_what_the_benchmark_of_attacks_on_judges_measured() -> None:
    found = json.loads((DOCS / "results/judge_attacks.json").read_text())
    text = (DOCS / "evaluation.md").read_text()
    for of in found["added"]:
        assert f"| {of['fooled']:.1%} | {of['harmful_read_as_safe']:.1%} | {of['n_unscored']} |" in text, of["judge"]
    assert f"uses {found['n_attacks']} attacks of {len(found['added'][0]['fooled_by_kind'])} kinds" in text
    assert f"The {len(found['still_fooled_by'])} attacks that still succeed" in text


def test_the_documents_have_what_the_rule_of_presets_says() -> None:
    found = json.loads((DOCS / "results/preset_rule.json").read_text())
    text = (DOCS / "smollm2.md").read_text()
    for name, of in found.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {100 * of['merit']:.1f} |" in row, name
        if difference := of.get("minus_default"):
            told = [f"{100 * difference[part]:+.1f}" for part in ("value", "ci_low", "ci_high")]
            assert f"{told[0]} ({told[1]} to {told[2]})" in row


def test_the_documents_have_the_perplexity_of_human_answers() -> None:
    found = json.loads((DOCS / "results/human_answers.json").read_text())
    text = (DOCS / "smollm2.md").read_text()
    labels = {"sft-lora": "SFT-LoRA", "sft-sails": "SFT-SAILS", "sft-full": "SFT, all weights"}
    assert found["methods"].keys() == labels.keys()
    for name, of in found["methods"].items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {labels[name]} | {of['perplexity']:.1f} |"))
        ratio = {part: of["ratio"][part] for part in ("value", "ci_low", "ci_high")}
        assert all(value is None or f"{value:.2f}" in row for value in ratio.values())
        assert row.endswith(f"| {of['n_seeds']} |")


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


def test_the_documents_have_what_steering_smollm2_did() -> None:
    found = json.loads((DOCS / "results/steering.json").read_text())
    text = (DOCS / "smollm2.md").read_text()
    of = {(row["steer"], row["subspace"], row["strength"]): row for row in found["rows"]}
    names = {
        "sails": "SAILS",
        "random_features": "random SAE features",
        "random_basis": "random directions",
        "mean_diff": "difference of means",
    }
    rates = ("refusal_rate", "over_refusal_rate", "likeness")
    for subspace, name in names.items():
        added = [of["add", subspace, strength] for strength in (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)]
        cells = [f"{100 * row['refusal_rate']['value']:.0f} ({100 * row['likeness']['value']:.0f})" for row in added]
        assert f"| {name} | {' | '.join(cells)} |" in text
        ranks = " and ".join(map(str, found["ranks"][subspace].values()))
        cells = [within(of["ablate", subspace, 1.0][rate]) for rate in rates]
        assert f"| {name} | {ranks} | {' | '.join(cells)} |" in text
    plain = of["ablate", None, 0.0]
    assert f"| nothing | | {within(plain['refusal_rate'])} | {within(plain['over_refusal_rate'])} | 100 |" in text


def within(value: dict[str, float]) -> str:
    """Return a share with its interval, in percent."""
    parts = [f"{100 * value[part]:.0f}" for part in ("value", "ci_low", "ci_high")]
    return f"{parts[0]} ({parts[1]} to {parts[2]})"


def test_the_documents_have_how_many_features_of_smollm2_are_concepts_of_harm() -> None:
    layers = json.loads((DOCS / "results/smollm2_features.json").read_text())["layers"]
    text = " ".join((DOCS / "smollm2.md").read_text().split())
    chosen = {layer: f"{100 * of['precision']:.0f}%" for layer, of in layers.items()}
    others = {layer: f"{100 * of['precision_of_random']:.0f}%" for layer, of in layers.items()}
    assert f"{chosen['10']} of the 28 in layer 10 and {chosen['20']} of the 64 in layer 20" in text
    assert f"Of all active features, {others['10']} and {others['20']} are" in text
    assert layers["20"]["features"][0]["id"] == 1406


def test_the_documents_have_what_is_left_of_smollm2s_refusals() -> None:
    report = (DOCS / "results/tampering-smollm2/report.md").read_text()
    text = (DOCS / "smollm2.md").read_text()
    shown = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (SAILS|LoRA), ", line)]
    assert len(shown) == 6
    for name, *numbers in shown:
        model, _, state = name.partition(", ")
        attack = "harmful" if "harmful" in state else "task"
        section = report.split(f"## Tampering: {attack}, sft-{model.lower()}\n")[1].split("\n## ")[0]
        head = "before the attack" if state == "aligned" else "none"
        row = next(line for line in section.splitlines() if line.startswith(f"| {head} |"))
        assert f"| {' | '.join(numbers)} |" in row, name


def test_the_documents_have_how_many_examples_smollm2_takes() -> None:
    studies = json.loads((DOCS / "results/examples-smollm2/results.json").read_text())["studies"]["examples"]
    (table,) = (rows for _, rows in tables_of("smollm2.md", "How many examples"))
    metrics = {
        "refusals in trained categories": "refusal_rate_in_distribution",
        "refusals in held-out categories": "refusal_rate_out_of_distribution",
        "over-refusal": "over_refusal_rate",
    }
    for n, rows in studies.items():
        for row in rows:
            for told, metric in metrics.items():
                entry = table[f"{RUNS[row['run']].label}, {told}"][n]
                assert entry == f"{100 * row['means'][metric]['value']:.1f}", (n, row["run"], told)
    assert len(table) == len(metrics) * len(studies["16"])
    text = " ".join((DOCS / "smollm2.md").read_text().split())
    of_five = tables_of("results/smollm2/report.md")[0][1]
    heading = "refusal rate, trained categories (%)"
    lora, sails = of_five["SFT-LoRA"][heading], of_five["SFT-SAILS"][heading]
    assert f"the mean with 32 requests is {lora} for LoRA and {sails} for SAILS" in text


def test_the_documents_have_what_the_comparison_on_smollm2_found() -> None:
    text = " ".join((DOCS / "smollm2.md").read_text().split())
    rows = {row["run"]: row for row in json.loads((DOCS / "results/smollm2/results.json").read_text())["rows"]}

    def minus(ours: str, theirs: str, name: str) -> str:
        of = [rows[run]["by_seed"] for run in (ours, theirs)]
        mean = mean_of(
            [of[0][seed][name] - of[1][seed][name] for seed in of[0]], span_of_difference(METRICS[name].span)
        )
        return difference(mean, METRICS[name]).text

    assert f"minus the preset `paper` {minus('sft-sails', 'sft-sails-paper', 'merit')}" in text
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert "no method is shown to be better than plain LoRA, SAILS included, by the mean of refusals" in readme
    assert all(" better" not in minus(run, "sft-lora", "merit") for run in rows.keys() - {"base", "sft-lora"})
    of_sails = minus("sft-random-features", "sft-sails", "over_refusal_rate").replace(" (", ", ")
    assert f"and with SAILS ({of_sails}" in text
    kl = {
        run: f"{rows[run]['means']['kl_per_token']['value']:.2f}"
        for run in ("sft-random-features", "sft-lora", "sft-sails")
    }
    others = f"against {kl['sft-lora']} with LoRA and {kl['sft-sails']} with SAILS"
    assert f"({kl['sft-random-features']} nats per token, {others})" in text
    merits = {run: f"{100 * rows[run]['means']['merit']['value']:.1f}" for run in ("sft-sails", "sft-lora", "base")}
    assert f"is {merits['sft-sails']} with SAILS and {merits['sft-lora']} with LoRA" in text
    assert f"Without training it is {merits['base']}:" in text
    at_end = [run for run, row in rows.items() if any("at the end of the grid" in doubt for doubt in row["doubts"])]
    tuned = [run for run, row in rows.items() if row["tuning"]]
    assert f"for {len(at_end)} of {len(tuned)} methods the best one is at an end" in text


def test_the_documents_have_the_number_of_trainings_of_smollm2() -> None:
    compared = {row["run"] for row in json.loads((DOCS / "results/smollm2/results.json").read_text())["rows"]}
    cells = [json.loads(path.read_text())["cell"] for path in (DOCS / "results/smollm2/cells").glob("*.json")]
    n_untrained = sum(cell["run"] == "base" for cell in cells)
    n_tested = sum(cell["part"] == "test" for cell in cells) - n_untrained
    report = (DOCS / "results/smollm2/report.md").read_text()
    n_trainings = int(re.findall(r"^(\d+) trainings, ", report, re.MULTILINE)[0])
    text = " ".join((DOCS / "smollm2.md").read_text().split())
    # Those of the comparison are of the first tuning seed.
    n_tuned = sum(
        cell["run"] in compared and cell["part"] == "validation" and cell["seed"] == FIRST_TUNING_SEED for cell in cells
    )
    assert n_trainings == n_tested + n_tuned
    assert f"{n_trainings} trainings ({n_tested} that are reported, and {n_tuned} on validation prompts)" in text
    assert f"those of {len(cells) - n_trainings - n_untrained} more trainings" in text


def test_the_documents_have_over_refusal_of_twins_and_of_plain_prompts_apart() -> None:
    text = " ".join((DOCS / "smollm2.md").read_text().split())
    shares: dict[str, dict[str, list[float]]] = {}
    refused: list[float] = []
    for path in (DOCS / "results/smollm2/cells").glob("*.json"):
        result = json.loads(path.read_text())
        cell = result["cell"]
        if cell["run"].startswith("dpo") and cell["part"] == "validation":
            refused.append(result["numbers"]["refusal_rate"]["value"])
        for kind in ("dual_use", "benign") if cell["part"] == "test" else ():
            of = [rate for name, rate in result["by_category"].items() if name.endswith(f"({kind})")]
            n = sum(rate["n"] for rate in of)
            shares.setdefault(cell["run"], {}).setdefault(kind, []).append(sum(r["value"] * r["n"] for r in of) / n)

    def percent(run: str, kind: str) -> str:
        return f"{100 * sum(shares[run][kind]) / len(shares[run][kind]):.0f}"

    trained = [run for run in shares if run.startswith("sft")]
    twins, plain = ([int(percent(run, kind)) for run in trained] for kind in ("dual_use", "benign"))
    assert f"{min(twins)} to {max(twins)}% of the harmless twins are refused, and {min(plain)} to {max(plain)}%" in text
    told = [
        " and ".join(percent(run, kind) for kind in ("dual_use", "benign")) for run in ("sft-lora", "sft-sails", "base")
    ]
    assert f"(LoRA {told[0]}%, SAILS {told[1]}%; the base model {told[2]}%)" in text
    assert f"{100 * min(refused):.0f} to {100 * max(refused):.0f}% of validation prompts" in text


SETS_OF_SMOLLM2 = {
    "advbench": "AdvBench",
    "harmbench": "HarmBench",
    "jailbreakbench": "JailbreakBench",
    "strongreject": "StrongREJECT",
    "simple-safety-tests": "SimpleSafetyTests",
    "coconot": "CoCoNot",
    "xstest": "XSTest",
    "coconot-contrast": "CoCoNot, contrast",
    "data/self_instruct/user_oriented_instructions.jsonl": "Self-Instruct",
}


def test_the_documents_have_what_smollm2_refuses_of_public_prompts() -> None:
    results = json.loads((DOCS / "results/public-prompts-smollm2/results.json").read_text())
    told = dict(by_first_heading("smollm2.md", "Requests that others wrote"))
    for of in results["sets"]:
        rate = "refusals of harmful prompts, %" if of["metric"] == "refusal_rate" else "over-refusal, %"
        row = told[rate][SETS_OF_SMOLLM2[of["set"]]]
        for run, heading in (("base", "base model"), ("sft-lora", "SFT-LoRA"), ("sft-sails", "SFT-SAILS")):
            assert row[heading] == interval(Mean(**of["means"][run]), METRICS[of["metric"]]), (of["set"], run)
        difference_of = Mean(**of["differences"]["sft-sails"]["sft-lora"])
        assert row["SAILS minus LoRA"] == difference(difference_of, METRICS[of["metric"]]).text, of["set"]
    assert sum(map(len, told.values())) == len(results["sets"])


def test_the_documents_have_what_hh_rlhf_teaches_smollm2() -> None:
    rows = {row["run"]: row for row in json.loads((DOCS / "results/hh-rlhf-smollm2/results.json").read_text())["rows"]}
    ((_, table),) = tables_of("smollm2.md", "Other training data")
    names = ("refusal_rate_in_distribution", "refusal_rate_out_of_distribution", "over_refusal_rate", "likeness")
    for run, label in (("sft-lora", "SFT-LoRA"), ("sft-sails", "SFT-SAILS")):
        _, *entries = table[label].values()
        assert entries == [f"{100 * rows[run]['means'][name]['value']:.1f}" for name in names]


def test_the_documents_have_what_training_saes_adds() -> None:
    found = json.loads((DOCS / "results/train_sae.json").read_text())
    rows = (DOCS / "cost.md").read_text().splitlines()
    for name, row in (("reading", "speed of `sails train-sae`"), ("steps", "the same: steps of an SAE")):
        of = found[name]
        told = f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f}, {len(of)} pairs)"
        assert any(line.startswith(f"| {row}") and f"| {told} |" in line for line in rows), told


@pytest.mark.parametrize(
    ("file", "heading"),
    [("edit_at_scale", "edit of 26 blocks"), ("edit_at_scale_8_blocks", "edit of 8 blocks")],
)
def test_the_page_of_costs_has_what_edits_of_a_large_model_take(file: str, heading: str) -> None:
    found = json.loads((DOCS / "results" / f"{file}.json").read_text())
    assert heading == f"edit of {found['blocks'] or 26} blocks"
    assert (found["shape"], found["target_gb"]) == ("gemma-2-2b", 8.0)
    for row, of in zip(by_first_heading("cost.md")[heading].values(), found["edits"], strict=True):
        name, _, variant = of["edit"].partition(", ")
        assert row[heading] == f"`sails edit {name}{' --sparsity 0.25' if variant else ''}`"
        assert row["minutes"] == f"{of['seconds'] / 60:.1f}"
        assert row["memory, GB"] == f"{of['anonymous_gb']:.1f}"
        assert row["with pages of files, GB"] == f"{of['resident_gb']:.1f}"
        assert of["met"]


def test_the_page_of_graph_saes_has_what_the_penalty_does() -> None:
    found = json.loads((DOCS / "results" / "graph_saes.json").read_text())["found"]
    rows = by_first_heading("methods/gsae.md")["SAEs"]
    assert list(rows) == list(found)
    for name, row in rows.items():
        for heading, digits in (("explained variance", 4), ("energy", 2)):
            of = found[name][heading.replace(" ", "_")]
            assert row[heading] == "{value:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**of, d=digits)
    cost = found["plain"]["explained_variance"]["value"] - found["graph"]["explained_variance"]["value"]
    assert f"costs {100 * cost:.1f} points of explained variance" in (DOCS / "methods/gsae.md").read_text()


def test_the_page_of_redundancy_has_how_redundant_adapters_are() -> None:
    found = json.loads((DOCS / "results" / "redundancy.json").read_text())["found"]
    rows = by_first_heading("methods/redundancy.md")["adapter"]
    assert list(rows) == list(found)
    for name, row in rows.items():
        for heading, kind in (("redundancy of features", "features"), ("of weights", "weights")):
            of = found[name][kind]
            bounds = "" if of["low"] is None else f" ({of['low']:.3f} to {of['high']:.3f})"
            assert row[heading] == f"{of['value']:.3f}{bounds}"


def test_the_page_of_gba_has_how_much_two_seeds_agree() -> None:
    layers = json.loads((DOCS / "results/sae_seeds.json").read_text())["layers"]
    rows = by_first_heading("methods/gba.md")["SAEs"]
    assert len(rows) == 2 * len(layers)
    for layer, kinds in layers.items():
        for kind, name in (("gba", "GBA"), ("topk", "TopK")):
            of, row = kinds[kind], list(rows[f"layer {layer}, {name}"].values())[1:]
            angles = [f"{of[angle]:.1f}" for angle in ("mean_angle", "mean_angle_of_random")]
            assert row == ["{} and {}".format(*of["ranks"]), *angles, f"{of['similarity']:.2f}"]
    ratios = {
        kind: [of[kind]["mean_angle"] / of[kind]["mean_angle_of_random"] for of in layers.values()]
        for kind in ("gba", "topk")
    }
    text = " ".join((DOCS / "methods/gba.md").read_text().split())
    spans = {kind: f"({min(of):.2f} to {max(of):.2f})" for kind, of in ratios.items()}
    assert f"with GBA {spans['gba']} than with TopK {spans['topk']}" in text
