"""Published measurements of benchmarks: the pages have the numbers of the results, with both ends of an interval."""

import json
import statistics
from pathlib import Path

import pytest
from published import DOCS, by_first_heading


@pytest.mark.parametrize("path", [DOCS.parent / "README.md", *DOCS.rglob("*.md")], ids=lambda path: path.name)
def test_pages_give_both_ends_of_an_interval(path: Path) -> None:
    assert "±" not in path.read_text(encoding="utf-8")


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
