"""Side studies, fronts and learning curves; concepts of harm; training after alignment."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sails_align.core.errors import InputError
from sails_align.experiments.ablations import ABLATIONS, Ablation
from sails_align.experiments.benches.bench import LEFT_AFTER
from sails_align.experiments.benches.make import bench_of
from sails_align.experiments.fronts import Front, Point, fronts_of, hypervolume_difference
from sails_align.experiments.options import CompareOptions
from sails_align.experiments.plan import RUNS, Cell, Measures, Plan, Run
from sails_align.experiments.steps import Steps
from sails_align.experiments.studies import ablations, examples, worlds
from sails_align.experiments.summary import Outcome, examples_to, value_of
from sails_align.subspace.concepts import harm_share
from sails_align.testbed.build import resolve_testbed
from sails_align.training import run as align

PLAN = Plan(n_seeds=3, n_tuning_seeds=2, learning_rates=(1e-3, 1e-2))


@pytest.mark.parametrize("ablation", [entry for _, entry in ABLATIONS.items()], ids=lambda ablation: ablation.name)
def test_an_ablation_is_a_training_that_can_be_made_and_another_one(ablation):
    args = align.parse("sft", list(ablation.of(RUNS["sft-sails"]).options))
    default = align.parse("sft", ["--init", "sails"])
    changed = (args.sails != default.sails, args.model.lora_r != default.model.lora_r)
    assert any(changed) or args.model.lora_target_modules != default.model.lora_target_modules


def test_side_studies_share_the_main_ones_budget():
    study = ablations(PLAN, CompareOptions(n_side_seeds=2))
    ((_, plan),) = study.plans
    assert plan.n_seeds == 2
    assert plan.learning_rates == PLAN.learning_rates
    of_many = replace(PLAN, learning_rates=(1e-2, 3e-4, 1e-3, 3e-3))
    assert ablations(of_many, CompareOptions()).plans[0][1].learning_rates == (1e-3, 3e-3, 1e-2)
    assert plan.measures == Measures(n_attacked=0, n_capability=0, relearning=False)
    assert {"sft-lora", "sft-sails"} < {run.name for run in plan.runs}
    numbers = [plan.measures.n_examples for _, plan in examples(PLAN, [64, 16, 64], 2).plans]
    assert numbers == [16, 64]
    assert [plan.world for _, plan in worlds(PLAN, ["testbed:1", "testbed:2"]).plans] == ["testbed:1", "testbed:2"]
    assert all(plan.n_seeds == 3 for _, plan in worlds(PLAN, ["testbed:1"]).plans)


def test_some_of_the_ablations() -> None:
    chosen = ablations(PLAN, CompareOptions(ablations=["k-16", "lora-last-blocks", "k-16"])).plans[0][1]
    assert [run.name for run in chosen.runs] == ["sft-lora", "sft-sails", "k-16", "lora-last-blocks"]
    with pytest.raises(InputError, match="there is no ablation 'k-17'; did you mean 'k-16'"):
        ablations(PLAN, CompareOptions(ablations=["k-17"]))


def test_an_ablation_replaces_options_and_leaves_the_others():
    run = Run("x", "x", "sft", ("--config", "f.yaml", "--init", "sails", "--lora_r", "4"), files_sha256="abc")
    changed = Ablation("y", "Y", ("--init", "activation_pca", "--lora_target_modules", "q", "k")).of(run)
    assert changed.options == (
        *("--config", "f.yaml", "--init", "activation_pca", "--lora_r", "4", "--lora_target_modules", "q", "k"),
    )
    assert (changed.name, changed.label, changed.files_sha256) == ("y", "Y", "abc")


def test_worlds_by_parameter():
    names = [
        "testbed:3",
        "shared_harm=0",
        "d_model=48,seed=2",
        "contamination=0.2,n_examples=32",
        "shared_harm=1,n_examples=9",
    ]
    plans = dict(worlds(PLAN, names).plans)
    assert [plan.world for plan in plans.values()] == [
        *("testbed:3", "testbed:shared_harm=0.0", "testbed:seed=2,d_model=48", "testbed", "testbed:shared_harm=1.0")
    ]
    measures = [(plan.measures.n_examples, plan.measures.contamination) for plan in plans.values()]
    assert measures == [(128, 0.0), (128, 0.0), (128, 0.0), (32, 0.2), (9, 0.0)]
    keys = {plan.tuning_cells()[0].key for plan in plans.values()}
    assert len(keys) == len(names)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt2", "worlds has 'gpt2'; give testbed"),
        ("contamination=1.5", "contamination a share"),
        ("contamination=x", "contamination is 'x', but it must be a number"),
        ("n_examples=0", "n_examples must be 1 or more"),
        ("n_examples=1.5", "n_examples is '1.5', but it must be a whole number"),
        ("shared_harm=7", "shared_harm is 7.0"),
        ("d_model=48,harm=1", "worlds has 'd_model=48,harm=1'"),
    ],
)
def test_worlds_that_there_are_not(name, says):
    with pytest.raises(InputError, match=says):
        worlds(PLAN, [name])


@pytest.mark.slow
def test_cells_of_a_world_are_trained_on_its_data():
    """Wrong labels reach the training, and the fewer of them the safer the model."""
    from sails_align.experiments.cells import run_cell

    ((_, plan),) = worlds(replace(PLAN, measures=Measures(n_examples=128, n_prompts=32)), ["contamination=0.5"]).plans
    cell = Cell(RUNS["sft-full"], 1e-3, 1, "validation", "testbed", plan.measures)
    clean = replace(cell, measures=replace(plan.measures, contamination=0.0))
    wrong, right = (run_cell(of)["numbers"]["safety_rate"]["value"] for of in (cell, clean))
    assert wrong < right - 0.1


def test_a_front_by_hand():
    points = [Point(0.1, 0.5, 0.05), Point(0.3, 0.9, 0.25), Point(0.2, 0.4, 0.1), Point(0.6, 0.9, 0.5)]
    front = Front(RUNS["sft-lora"], tuple(points))
    assert front.pareto == (Point(0.0, 0.0, 0.0), points[0], points[1])
    assert front.hypervolume == pytest.approx(0.2 * 0.5 + 0.7 * 0.9)
    found = front.at(0.7)
    assert found is not None
    assert (found.lost, found.over_refusal) == (pytest.approx(0.2), pytest.approx(0.15))
    assert front.at(0.95) is None
    better = Front(RUNS["sft-sails"], (Point(0.05, 0.5, 0.0), Point(0.2, 0.95, 0.1)))
    assert better.hypervolume > front.hypervolume


def test_a_broken_model_does_not_look_good_on_a_front():
    broken = Point(1.0, 1.0, 0.0)  # complies with nothing, refuses nothing, and answers nothing
    assert Front(RUNS["dpo-full"], (broken,)).hypervolume == 0.0


def test_fronts_are_of_the_tuning_cells():
    plan = Plan(runs=(RUNS["base"], RUNS["sft-lora"]), n_tuning_seeds=2, learning_rates=(1e-3, 1e-2))

    def result(rate: float, seed: int) -> dict:
        return {
            "numbers": {
                "safety_rate": {"value": 50 * rate + 0.1 * (seed % 2)},
                "over_refusal_rate": {"value": rate},
                "correct_answer_rate": {"value": 1 - 2 * rate},
            }
        }

    results = {cell.key: result(cell.learning_rate or 0.0, cell.seed) for cell in plan.tuning_cells()}
    (front,) = fronts_of(Outcome(plan, results, {}, {}))
    assert [point.safety for point in front.points] == [pytest.approx(0.1), pytest.approx(0.55)]
    assert [point.lost for point in front.points] == [pytest.approx(2e-3), pytest.approx(2e-2)]
    assert [point.over_refusal for point in front.points] == [1e-3, 1e-2]
    # of the first seed, a staircase under (0.002, 0.05) and (0.02, 0.5); the second is 0.1 safer at each rate
    assert front.hypervolumes == pytest.approx({1000: 0.018 * 0.05 + 0.98 * 0.5, 1001: 0.018 * 0.15 + 0.98 * 0.6})
    assert hypervolume_difference(front, front).value == 0.0
    for of in results.values():
        del of["numbers"]["correct_answer_rate"]
    assert fronts_of(Outcome(plan, results, {}, {})) == []  # nothing that could be lost was measured


def test_fronts_are_paired_by_the_tuning_seeds_that_both_have():
    run, low, high = RUNS["sft-lora"], (Point(0.2, 0.5, 0.0),), (Point(0.2, 0.8, 0.0),)
    two, three = Front(run, low, {1000: low, 1001: low}), Front(run, high, {1000: high, 1001: high, 1002: low})
    difference = hypervolume_difference(three, two)
    assert (difference.value, difference.n) == (pytest.approx(0.8 * 0.3), 2)


@pytest.mark.parametrize("rate", ["safety_rate", "refusal_rate"])
def test_safety_left_is_by_the_rate_that_the_judge_gives(rate: str) -> None:
    result = {"relearned": {"benign": {rate: {"value": 0.25}, "over_refusal_rate": {"value": 0.1}}}}
    assert value_of(result, "left_after_benign") == 0.25
    assert value_of(result, "left_after_harmful") is None


def test_examples_to_a_safety_rate():
    curve = [(16, 0.5), (64, 0.9), (256, 1.0)]
    assert examples_to(0.95, curve) == pytest.approx(128)
    assert examples_to(0.4, curve) == 16
    assert examples_to(0.95, curve[:2]) is None


def test_share_of_a_features_activation_on_harm():
    harmful_NK = torch.tensor([[4.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    harmless_NK = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    assert harm_share(harmful_NK, harmless_NK).tolist() == pytest.approx([0.75, 1 / 3, 0.0])


@pytest.mark.parametrize("attack", LEFT_AFTER)
def test_further_training_changes_all_weights_of_a_new_model(attack: str, tmp_path: Path):
    given = Path(resolve_testbed("testbed").model_path)
    cell = Cell(RUNS["sft-full"], None, 0, "test", "testbed", Measures())
    changed = Steps(cell, bench_of("testbed"), tmp_path, tmp_path).further(given, attack)
    before, after = (load_file(folder / "model.safetensors") for folder in (given, changed))
    assert changed != given
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_sails_finds_concepts_of_harm_and_says_so():
    """A cell of SAILS tells what its features are, and what training left and undid."""
    from sails_align.experiments.cells import run_cell

    measures = Measures(n_examples=64, n_prompts=64, n_attacked=0, n_capability=0)
    result = json.loads(json.dumps(run_cell(Cell(RUNS["sft-sails"], 1e-2, 3, "test", "testbed", measures))))
    features = result["features"]
    best = features["layers"]["3"]
    assert features["onset"] == 3
    assert best["precision"] > best["precision_of_random"]
    assert best["precision"] > best["precision_of_pca"]
    assert 0 < features["drift"]["adapter_energy_inside"] < 1
    first = best["features"][0]
    assert first["harmful_before"] > first["harmless_before"]
    assert {meaning["layer"] for meaning in features["meanings"]} == {1, 2, 3}
    aligned = result["numbers"]["safety_rate"]["value"]
    for left in result["relearned"].values():
        assert left["safety_rate"]["value"] < aligned - 0.1
