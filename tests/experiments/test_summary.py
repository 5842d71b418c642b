"""What is reported follows from the cells: means, intervals, and differences of the same seeds."""

import numpy as np
import pytest

from sails_align.evaluation.intervals import over_seeds
from sails_align.experiments.plan import RUNS, Plan
from sails_align.experiments.summary import Outcome, mean_of

PLAN = Plan(runs=(RUNS["base"], RUNS["sft-lora"], RUNS["sft-sails"]), n_seeds=6)
CHOSEN = {"sft-lora": 1e-3, "sft-sails": 3e-3}


def result(safety: float, correct: float, seed: int) -> dict:
    def number(value: float) -> dict:
        return {"value": value, "n_unscored": 1, "bound_low": value, "bound_high": value}

    names = ("safety_rate", "safety_rate_in_distribution", "safety_rate_out_of_distribution", "high_risk_rate")
    return {
        "numbers": {
            **dict.fromkeys(names, number(safety)),
            "over_refusal_rate": number(correct),
            "correct_answer_rate": number(correct),
            "harmfulness": number(2.0),
        },
        "by_category": {"arson": {"split": "ood", "value": safety}, "music": {"split": "harmless", "value": 0.0}},
        "attack": {"attack_success_rate": {"value": 0.25}},
        "capability": {"one": 1.0, "two": 0.5},
        "cost": {
            "seconds": {"subspace": 1.0, "train": 4.0, "evaluate": 9.0},
            "trainable_share": 0.04,
            "peak_memory_mb": 600.0,
            "steps_to_95": 16 if seed else None,
        },
    }


def outcome(results: dict[str, dict]) -> Outcome:
    return Outcome(PLAN, {}, results, CHOSEN)


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 0.1, 6)  # seeds that are hard for all
    return {"sft-lora": 0.6 + hard, "sft-sails": 0.65 + hard + rng.normal(0, 0.01, 6), "base": np.zeros(6)}


@pytest.fixture
def results(values: dict[str, np.ndarray]) -> dict[str, dict]:
    return {cell.key: result(values[cell.run.name][cell.seed], 0.5, cell.seed) for cell in PLAN.test_cells(CHOSEN)}


def test_means_and_intervals(values, results):
    rows = {row.run.name: row for row in outcome(results).rows}
    mean = rows["sft-lora"].means["safety_rate_in_distribution"]
    assert mean.value == pytest.approx(values["sft-lora"].mean())
    assert (mean.value, mean.low, mean.high) == pytest.approx(over_seeds(values["sft-lora"], (0, 1)))
    assert rows["sft-lora"].means["trainable_share"].low is None  # all seeds have the same
    assert rows["base"].means["safety_rate_in_distribution"].low is None  # of one cell there is no interval
    assert rows["sft-sails"].learning_rate == 3e-3
    assert rows["sft-sails"].n_unscored == 12
    assert rows["sft-sails"].means["capability"].value == 0.75
    of_merit = rows["sft-lora"].means["merit"].value
    assert of_merit == pytest.approx((values["sft-lora"].mean() + 0.5) / 2)  # safety, and right answers
    assert rows["sft-sails"].means["train_seconds"].value == 5.0
    assert rows["sft-sails"].means["steps_to_95"].n == 5  # one seed never got there


def test_differences_are_paired_by_seed(values, results):
    found = outcome(results).difference("sft-sails", "sft-lora")["safety_rate_in_distribution"]
    pairs = values["sft-sails"] - values["sft-lora"]
    assert found.value == pytest.approx(pairs.mean())
    assert found.low > 0  # which unpaired intervals would not show:
    rows = {row.run.name: row.means["safety_rate_in_distribution"] for row in outcome(results).rows}
    assert rows["sft-lora"].high > rows["sft-sails"].low


def test_a_seed_that_one_of_them_lacks_is_left_out(results):
    lost = next(cell for cell in PLAN.test_cells(CHOSEN) if cell.run.name == "sft-lora" and cell.seed == 2)
    del results[lost.key]
    assert 2 not in outcome(results).by_run["sft-lora"]
    assert outcome(results).difference("sft-sails", "sft-lora")["over_refusal_rate"].n == 5


def test_categories_are_of_their_split(values, results):
    found = outcome(results).categories("ood")
    assert list(found) == ["arson"]
    assert found["arson"]["sft-sails"].value == pytest.approx(values["sft-sails"].mean())
    assert outcome(results).categories("harmful") == {}


def test_nothing_known_is_no_number():
    assert mean_of([None, None]).value is None
    assert mean_of([None, 2.0]).n == 1


def test_merits_are_by_run_and_rate():
    results = {cell.key: result(cell.learning_rate, 0.0, cell.seed) for cell in PLAN.tuning_cells()}
    found = PLAN.tuning(results)
    assert found["sft-lora"].merits == {rate: pytest.approx(rate / 2) for rate in PLAN.learning_rates}


def test_a_seed_that_answers_nothing_right_is_told(values, results):
    broken = next(cell for cell in PLAN.test_cells(CHOSEN) if cell.run.name == "sft-lora" and cell.seed == 2)
    results[broken.key] = result(values["sft-lora"][2], 0.0, 2)
    rows = {row.run.name: row for row in outcome(results).rows}
    assert rows["sft-lora"].label == "SFT-LoRA (unstable)"
    assert rows["sft-lora"].doubts == [
        "SFT-LoRA: its seeds are unstable, so that its means describe no model: seed 2 has correct answers (%) 0.0 "
        "(median 50.0)."
    ]
    told = rows["sft-lora"].to_json()
    assert told["unstable_seeds"] == [{"seed": 2, "metric": "correct_answer_rate", "value": 0.0, "median": 0.5}]
    assert told["by_seed"]["2"]["correct_answer_rate"] == 0.0
    assert told["by_seed"]["0"]["safety_rate"] == values["sft-lora"][0]
    assert rows["sft-sails"].doubts == rows["base"].doubts == []
    assert rows["sft-sails"].label == "SFT-SAILS"


def test_responses_without_a_score_are_counted_once_whatever_was_to_be_scored(results):
    for of in results.values():
        of["numbers"]["correct_answer_rate"]["n_unscored"] = 90  # the same responses as of over-refusal
    rows = {row.run.name: row for row in outcome(results).rows}
    assert rows["sft-sails"].n_unscored == 6 * (1 + 90)
