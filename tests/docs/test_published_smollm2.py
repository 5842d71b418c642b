"""The published results on SmolLM2: the pages have the numbers of the results."""

import json
import re

from published import DOCS, by_first_heading, tables_of

from sails_align.evaluation.intervals import span_of_difference
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.plan import FIRST_TUNING_SEED, RUNS
from sails_align.experiments.summary import Mean, mean_of
from sails_align.reporting.page import difference, interval


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
