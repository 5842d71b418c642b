"""Side studies, fronts and learning curves; concepts of harm; training after alignment."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align import align
from sails_align.comparison.plan import RUNS, Measures, Plan
from sails_align.comparison.relearning import DATA, trained_on
from sails_align.comparison.studies import ABLATIONS, ablations, examples, worlds
from sails_align.comparison.summary import Front, Point, examples_to, fronts
from sails_align.subspace.concepts import harm_share
from sails_align.testbed.build import resolve_testbed

PLAN = Plan(n_seeds=3, n_tuning_seeds=2, learning_rates=(1e-3, 1e-2))


@pytest.mark.parametrize("run", ABLATIONS, ids=lambda run: run.name)
def test_an_ablation_is_a_training_that_can_be_made_and_another_one(run):
    args = align.parse("sft", list(run.options))
    default = align.parse("sft", ["--init", "sails"])
    changed = (args.sails != default.sails, args.model.lora_r != default.model.lora_r)
    assert any(changed) or args.model.lora_target_modules != default.model.lora_target_modules


def test_side_studies_share_the_main_ones_budget():
    study = ablations(PLAN, 2)
    ((_, plan),) = study.plans
    assert plan.n_seeds == 2
    assert plan.learning_rates == PLAN.learning_rates
    of_many = replace(PLAN, learning_rates=(1e-2, 3e-4, 1e-3, 3e-3))
    assert ablations(of_many, 2).plans[0][1].learning_rates == (1e-3, 3e-3, 1e-2)
    assert plan.measures == Measures(n_attacked=0, n_capability=0, relearning=False)
    assert {"sft-lora", "sft-sails"} < {run.name for run in plan.runs}
    numbers = [plan.measures.n_examples for _, plan in examples(PLAN, [64, 16, 64], 2).plans]
    assert numbers == [16, 64]
    assert [plan.world for _, plan in worlds(PLAN, ["testbed:1", "testbed:2"]).plans] == ["testbed:1", "testbed:2"]
    assert all(plan.n_seeds == 3 for _, plan in worlds(PLAN, ["testbed:1"]).plans)


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
    (front,) = fronts(plan, results)
    assert [point.safety for point in front.points] == [pytest.approx(0.1), pytest.approx(0.55)]
    assert [point.lost for point in front.points] == [pytest.approx(2e-3), pytest.approx(2e-2)]
    assert [point.over_refusal for point in front.points] == [1e-3, 1e-2]


def test_examples_to_a_safety_rate():
    curve = [(16, 0.5), (64, 0.9), (256, 1.0)]
    assert examples_to(0.95, curve) == pytest.approx(128)
    assert examples_to(0.4, curve) == 16
    assert examples_to(0.95, curve[:2]) is None


def test_share_of_a_features_activation_on_harm():
    harmful_NK = torch.tensor([[4.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    harmless_NK = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    assert harm_share(harmful_NK, harmless_NK).tolist() == pytest.approx([0.75, 1 / 3, 0.0])


@pytest.mark.parametrize("name", DATA)
def test_training_after_alignment_changes_the_model_that_is_given(name: str, tmp_path: Path):
    testbed = resolve_testbed("testbed")
    model = AutoModelForCausalLM.from_pretrained(testbed.model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    changed = trained_on(name, model, tokenizer, testbed.world, 0, tmp_path)
    moved = [not torch.equal(a, b) for a, b in zip(before, changed.parameters(), strict=True)]
    assert all(moved)
    assert changed is model
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sails_finds_concepts_of_harm_and_says_so(tmp_path: Path):
    """A cell of SAILS tells what its features are, and what training left and undid."""
    from sails_align.comparison.cells import run_cell
    from sails_align.comparison.plan import Cell

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
