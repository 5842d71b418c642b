"""The published comparison on the testbed: intervals are possible, and the tables of pages are those of the results."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from published import DOCS, by_first_heading

from sails_align.evaluation.intervals import LEAST_SEEDS, span_of_difference
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.summary import Mean, mean_of
from sails_align.reporting.page import difference, interval


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


def published(name: str = "comparison") -> dict[str, Any]:
    return json.loads((DOCS / "results" / name / "results.json").read_text(encoding="utf-8"))


def by_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {row["run"]: row for row in rows}


def minus(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> str:
    """Return the difference of two rows of the results, paired by seed."""
    pairs = [(of[name], theirs["by_seed"][seed][name]) for seed, of in ours["by_seed"].items()]
    mean = mean_of([a - b for a, b in pairs], span_of_difference(METRICS[name].span))
    return difference(mean, METRICS[name]).text


@pytest.mark.parametrize("name", ["comparison", "worlds"])
def test_intervals_of_the_comparison_are_possible(name: str) -> None:
    results = published(name)
    found = [mean for mean in _means(results) if mean[2]["low"] is not None]
    assert len(found) > 400
    for metric, is_difference, mean in found:
        low, high = span_of_difference(METRICS[metric].span) if is_difference else METRICS[metric].span
        assert low <= mean["low"] < mean["value"] < mean["high"] <= high, (metric, mean)
        assert mean["n"] >= LEAST_SEEDS, (metric, mean)


METRICS_OF_TABLES = {
    "safety, trained": "safety_rate_in_distribution",
    "safety, trained categories": "safety_rate_in_distribution",
    "safety, held-out categories": "safety_rate_out_of_distribution",
    "over-refusal": "over_refusal_rate",
    "correct": "correct_answer_rate",
    "correct answers": "correct_answer_rate",
    "steps to 95%": "steps_to_95",
    "left after benign training": "left_after_benign",
    "safety left after benign training": "left_after_benign",
    "left after harmful training": "left_after_harmful",
}
RUNS_OF_TABLES = {"LoRA": "sft-lora", "SAILS": "sft-sails", "all weights": "sft-full"}


@pytest.mark.parametrize("page", ["../README.md", "method.md"])
def test_the_table_of_the_comparison_is_that_of_the_results(page: str) -> None:
    runs = by_run(published()["rows"])
    rows = by_first_heading(page)["SFT"]
    assert len(rows) == 5
    for name, row in rows.items():
        ours, _, theirs = name.strip("*").partition(" minus ")
        run = RUNS_OF_TABLES[ours]
        share = "" if theirs else f"{100 * runs[run]['means']['trainable_share']['value']:.1f}".removesuffix(".0")
        assert row.pop("trained parameters", share) == share, name
        assert row.pop("SFT") == name
        for heading, entry in row.items():
            metric = METRICS_OF_TABLES[heading]
            if theirs:
                assert entry == minus(runs[run], runs[RUNS_OF_TABLES[theirs]], metric), (name, heading)
            else:
                assert entry == interval(Mean(**runs[run]["means"][metric]), METRICS[metric]), (name, heading)


RUNS_OF_WORLDS = {
    "minus LoRA": "sft-lora",
    "minus all weights": "sft-full",
    "minus mean difference": "basis-mean-diff",
    "minus activation PCA": "basis-pca",
}
EARLIER_HEADINGS = {"minus LoRA": "minus SFT-LoRA", "minus all weights": "minus SFT-full"} | {
    heading: heading for heading in ("minus mean difference", "minus activation PCA")
}
RUNS_OF_CHANGES = {
    "preset `paper`": "paper",
    "contrast of all prompt tokens, not the last": "tokens-all",
    "all layers, not from the onset on": "layers-all",
    "directions not ranked against harmless variance": "not-whitened",
    "writers frozen, too": "mode-freeze",
    "nothing frozen": "mode-init",
    "basis: random SAE features": "basis-random-features",
    "basis: random directions": "basis-random",
    "basis: mean difference": "basis-mean-diff",
    "basis: activation PCA": "basis-pca",
    "rank 16": "rank-16",
    "plain LoRA in the same two blocks": "lora-last-blocks",
    "plain LoRA, rank 16, in all blocks": "lora-rank-16",
    "adapters on attention alone": "attention",
}


def test_the_table_of_worlds_is_that_of_the_results() -> None:
    of_earlier = by_first_heading("results/worlds/report.md")
    worlds = published()["studies"]["worlds"]
    assert len(worlds) == 3
    table = by_first_heading("method.md")["world"]
    again = {name.partition("`, built again")[0].strip("`") for name in table if "built again" in name}
    assert again == worlds.keys() - {"contamination=0.2"}
    assert len(table) == len(of_earlier["SFT-SAILS minus SFT-LoRA"]) + len(again)
    for name, row in table.items():
        world, _, is_again = row.pop("world").strip("`").partition("`, ")
        for heading, entry in row.items():
            if not is_again:
                earlier = of_earlier[f"SFT-SAILS {EARLIER_HEADINGS[heading]}"][world]
                mean = earlier["mean of safety and helpfulness (%)"].replace("**", "")
                assert entry == mean.removesuffix(" better").removesuffix(" worse"), (name, heading)
            if is_again or world == "contamination=0.2":
                runs = by_run(worlds[world])
                assert entry == minus(runs["sft-sails"], runs[RUNS_OF_WORLDS[heading]], "merit"), (name, heading)


def test_pages_say_in_which_world_built_again_sails_is_less_safe() -> None:
    runs = by_run(published()["studies"]["worlds"]["testbed:12"])
    of_held_out = minus(runs["sft-sails"], runs["sft-lora"], "safety_rate_out_of_distribution")
    refused = {run: round(100 * runs[run]["means"]["over_refusal_rate"]["value"]) for run in ("sft-lora", "sft-sails")}
    told = f"({of_held_out.replace(' (', ' points, ')}"
    readme, method = (
        " ".join((DOCS / page).read_text(encoding="utf-8").split()) for page in ("../README.md", "method.md")
    )
    assert f"SAILS is less safe than LoRA on held-out categories {told}" in readme
    assert f"SAILS is less safe on held-out categories {told}" in method
    assert f"LoRA refuses {refused['sft-lora']}% of the harmless requests and SAILS {refused['sft-sails']}%" in method


def test_the_table_of_ablations_is_that_of_the_results() -> None:
    runs = by_run(published()["studies"]["ablations"]["ablations"])
    table = by_first_heading("method.md")["change"]
    assert table.keys() == RUNS_OF_CHANGES.keys()
    for change, row in table.items():
        assert row.pop("change") == change
        for heading, entry in row.items():
            assert entry == minus(runs[RUNS_OF_CHANGES[change]], runs["sft-sails"], METRICS_OF_TABLES[heading]), change


def test_the_method_page_has_the_numbers_of_the_results() -> None:
    results = published()
    text = " ".join((DOCS / "method.md").read_text(encoding="utf-8").split())
    of_main, of_ablations = by_run(results["rows"]), by_run(results["studies"]["ablations"]["ablations"])
    capability = minus(of_main["sft-sails"], of_main["sft-lora"], "capability")
    assert f"higher capability ({capability.replace(' (', ' points, ')}" in text
    dpo = {
        name: minus(of_main["dpo-sails"], of_main["dpo-lora"], name).partition(" ")[0]
        for name in ("safety_rate_out_of_distribution", "correct_answer_rate")
    }
    assert f"SAILS is safer than LoRA ({dpo['safety_rate_out_of_distribution']} points on held-out categories)" in text
    assert f"fewer correct answers ({dpo['correct_answer_rate']})" in text
    assert len(of_main["dpo-sails"]["unstable_seeds"]) == 1
    assert "One of its 20 seeds is unstable" in text
    sails = of_ablations["sft-sails"]
    behind = {run: minus(sails, of_ablations[run], "merit") for run in ("lora-last-blocks", "sft-lora")}
    assert f"is {behind['lora-last-blocks'].removeprefix('+').replace(' (', ' points (')} behind SAILS" in text
    assert f"is {behind['sft-lora'].replace('+', '').replace(' (', ' points (')} behind" in text
    for run, told in {"rank-16": "Rank 16 is better than 8", "k-16": "Sixteen features in each layer"}.items():
        numbers = minus(of_ablations[run], sails, "merit").replace("+", "").replace(" (", " points, ")
        assert numbers.removesuffix(")") in text.partition(told)[2][:150], run
    of_examples = by_run(results["studies"]["examples"]["256"])
    for name, metric in (("held-out categories: ", "safety_rate_out_of_distribution"), ("is ", "over_refusal_rate")):
        told = [
            interval(Mean(**of_examples[run]["means"][metric]), METRICS[metric]) for run in ("sft-sails", "sft-lora")
        ]
        assert f"{name}{' against '.join(told)}" in text
