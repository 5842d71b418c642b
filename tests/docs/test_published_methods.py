"""The published study of methods: the tables of pages are those of the reports."""

import json
import re

import pytest
from published import COLUMNS, DOCS, KEPT, MEAN_ON_SMOLLM2, TAMPERING_COLUMNS, by_first_heading, tables_of

from sails_align.experiments.methods.entries import METHODS


def minus_controls(method: str, study: str = "methods") -> list[dict[str, str]]:
    """Return a report's differences of a method from its controls."""
    rows = by_first_heading(f"results/{study}/report.md")["method minus control"]
    return [row for pair, row in rows.items() if pair.startswith(f"{method} minus ")]


def with_percent(entry: str) -> str:
    """Return an entry of a report's table, in %, as text has it: `98.0% (97.2 to 98.6)`."""
    return re.sub("^([0-9.]+)", r"\1%", entry)


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
    for name in levels:
        if name in pages:
            text = " ".join((DOCS / f"{pages[name]}.md").read_text().split())
            for of in (name, "SFT-LoRA"):
                assert f"{with_percent(levels[of][MEAN_ON_SMOLLM2])} with {of}" in text, name


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


def test_the_page_of_ablation_has_what_derta_does() -> None:
    (difference,) = re.findall(r"[+-][0-9.]+ points, .*?\)", (DOCS / "methods" / "ablation.md").read_text())
    minus = by_first_heading("results/ablation/report.md", "Tampering: ablate")["minus no defence"]
    value, low, high = re.findall(r"[+-][0-9.]+", minus["DeRTa"][KEPT])
    assert difference == f"{value} points, {low} to {high})"


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


def test_the_documents_have_what_methods_without_refusals_do_on_smollm2() -> None:
    """SSPU and CRISP teach no refusals; redirection is the training with random targets; and an orthonormal start."""
    of_report = by_first_heading("results/methods-smollm2/report.md")
    levels, minus = of_report["method"], of_report["method minus control"]
    for page, name in (("sspu", "SSPU"), ("crisp", "CRISP")):
        likeness = with_percent(levels[name]["likeness (%)"])
        assert f"likeness is {likeness}" in " ".join((DOCS / f"methods/{page}.md").read_text().split())
    text = " ".join((DOCS / "methods.md").read_text().split())
    assert f"with a likeness of {levels['SSPU']['likeness (%)'].split(' (')[0]}%" in text
    same = minus["SFT-LoRA (redirection) minus SFT-LoRA (random redirection)"]
    assert set(list(same.values())[1:]) == {"+0.0"}
    value, low, high = re.findall(
        r"[+-][0-9.]+", of_report["minus SFT-SAILS"]["SFT-LoRA (orthonormal start)"][MEAN_ON_SMOLLM2]
    )
    assert f"mean is {value.removeprefix('+')} points higher, {low} to {high})" in text
