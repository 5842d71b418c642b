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


def published() -> dict[str, Any]:
    return json.loads((DOCS / "results/comparison/results.json").read_text(encoding="utf-8"))


def by_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {row["run"]: row for row in rows}


def minus(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> str:
    """Return the difference of two rows of the results, paired by seed."""
    pairs = [(of[name], theirs["by_seed"][seed][name]) for seed, of in ours["by_seed"].items()]
    mean = mean_of([a - b for a, b in pairs], span_of_difference(METRICS[name].span))
    return difference(mean, METRICS[name]).text


def test_intervals_of_the_comparison_are_possible() -> None:
    results = published()
    found = [mean for mean in _means(results) if mean[2]["low"] is not None]
    assert len(found) > 1000
    for name, is_difference, mean in found:
        low, high = span_of_difference(METRICS[name].span) if is_difference else METRICS[name].span
        assert low <= mean["low"] < mean["value"] < mean["high"] <= high, (name, mean)
        assert mean["n"] >= LEAST_SEEDS, (name, mean)


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
    results = published()
    means = {row["run"]: row["means"] for row in results["rows"]}
    rows = by_first_heading(page)["SFT"]
    assert len(rows) == 5
    for name, row in rows.items():
        ours, _, theirs = name.strip("*").partition(" minus ")
        run = RUNS_OF_TABLES[ours]
        share = "" if theirs else f"{100 * means[run]['trainable_share']['value']:.1f}".removesuffix(".0")
        assert row.pop("trained parameters", share) == share, name
        assert row.pop("SFT") == name
        for heading, entry in row.items():
            metric = METRICS_OF_TABLES[heading]
            if theirs:
                of = results["differences"][RUNS_OF_TABLES[theirs]][run][metric]
                assert entry == difference(Mean(**of), METRICS[metric]).text, (name, heading)
            else:
                assert entry == interval(Mean(**means[run][metric]), METRICS[metric]), (name, heading)


RUNS_OF_WORLDS = {
    "minus LoRA": "sft-lora",
    "minus all weights": "sft-full",
    "minus mean difference": "basis-mean-diff",
    "minus activation PCA": "basis-pca",
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
    worlds = published()["studies"]["worlds"]
    table = by_first_heading("method.md")["world"]
    assert {name.strip("`") for name in table} == worlds.keys()
    for name, row in table.items():
        runs = by_run(worlds[row.pop("world").strip("`")])
        for heading, entry in row.items():
            assert entry == minus(runs["sft-sails"], runs[RUNS_OF_WORLDS[heading]], "merit"), (name, heading)


def test_the_table_of_ablations_is_that_of_the_results() -> None:
    runs = by_run(published()["studies"]["ablations"]["ablations"])
    table = by_first_heading("method.md")["change"]
    assert table.keys() == RUNS_OF_CHANGES.keys()
    for change, row in table.items():
        assert row.pop("change") == change
        for heading, entry in row.items():
            assert entry == minus(runs[RUNS_OF_CHANGES[change]], runs["sft-sails"], METRICS_OF_TABLES[heading]), change
