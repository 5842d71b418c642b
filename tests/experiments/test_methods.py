"""The study `methods`: all methods that align a model in one comparison."""

from pathlib import Path

import pytest
from constant_model import Says
from paths import ROOT

from sails_align.cli import compare
from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.experiments.benches.bench import LEFT_AFTER, Asked
from sails_align.experiments.benches.smollm2 import SmolLM2Bench
from sails_align.experiments.benches.testbed import TestbedBench
from sails_align.experiments.merits import merit
from sails_align.experiments.methods.cells import run_method
from sails_align.experiments.methods.entries import METHODS, SAES, ComparedMethod, identity_of
from sails_align.experiments.placeholders import KNOB, SEED
from sails_align.experiments.plan import Cell, Measures, Run
from sails_align.experiments.studies import read_plans
from sails_align.guards.bounds import upper_bound
from sails_align.models.spec import model_path
from sails_align.training import run as align

TRAINED = [name for name, method in METHODS.items() if method.trainer != "none"]


def filled(word: str, method: ComparedMethod) -> str:
    word = word.replace(KNOB, f"{(method.values or (0.01,))[0]:g}").replace(SEED, "0")
    return f"path/of/{word.strip('{}')}" if word.startswith("{") else word


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_is_a_training_that_can_be_made(name: str) -> None:
    method = METHODS.get(name)
    words = [filled(word, method) for word in method.training]
    parsed = align.parse("sft", ["--model_name_or_path", "testbed", *words])
    assert parsed.given.keys() >= {word.removeprefix("--") for word in words if word.startswith("--")}


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_has_its_page(name: str) -> None:
    assert (ROOT / "docs" / f"{METHODS.get(name).page}.md").is_file()


def test_controls_are_of_methods_and_tuned_alike() -> None:
    for name, method in METHODS.items():
        for original in map(METHODS.get, method.control_of):
            assert (method.values, method.trainer) == (original.values, original.trainer), name
            parts = ("training", "steering", "has_shuffled_labels")
            assert any(getattr(method, part) != getattr(original, part) for part in parts), name


def test_the_plan_tunes_each_method_by_its_own_hyperparameter() -> None:
    argv = ["--study", "methods", "--methods", "base", "sft-lora", "redirection", "guard", "--n_seeds", "10"]
    _, _, (study,) = read_plans(CommandLine.read(argv), None)
    ((_, plan),) = study.plans
    tuned = {name: [cell.learning_rate for cell in plan.tuning_cells() if cell.run.name == name] for name in argv[3:7]}
    assert tuned["base"] == []
    assert tuned["sft-lora"] == list(plan.learning_rates)
    assert tuned["redirection"] == list(METHODS.get("redirection").values)
    assert tuned["guard"] == list(METHODS.get("guard").values)
    cells = plan.test_cells({})
    assert sum(cell.run.name == "base" for cell in cells) == 1  # one model, whatever the seed
    assert sum(cell.run.name == "guard" for cell in cells) == 10
    knob = next(cell for cell in plan.tuning_cells() if cell.run.name == "redirection")
    assert "--learning_rate" not in knob.training_options
    rate = next(cell for cell in plan.tuning_cells() if cell.run.name == "sft-lora")
    assert "--learning_rate" in rate.training_options


def test_all_that_makes_a_method_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = [identity_of(name) for name in METHODS.names()]
    assert len(set(identities)) == len(identities)
    monkeypatch.setitem(SAES, "{saes-gba}", {"architecture": "gba", "k": 12})
    changed = [name for name, before in zip(METHODS.names(), identities, strict=True) if identity_of(name) != before]
    assert changed == ["sails-gba"]


def test_what_cannot_be_studied_is_refused() -> None:
    config = str(ROOT / "recipes/configs/smollm2-135m/compare.yaml")
    cases = [
        (["--study", "methods", "--methods", "sift-randm"], "there is no method 'sift-randm'; did you mean"),
        (["--methods", "sift"], "methods is of the study methods; add --study methods"),
        (["--config", config, "--study", "methods", "--methods", "sails-gba"], "sails-gba is compared on the testbed"),
    ]
    for argv, message in cases:
        with pytest.raises(InputError, match=message):
            read_plans(CommandLine.read(argv), None)


def test_smollm2_has_its_own_values_and_no_further_training() -> None:
    config = str(ROOT / "recipes/configs/smollm2-135m/compare.yaml")
    _, _, (study,) = read_plans(CommandLine.read(["--config", config, "--study", "methods"]), None)
    grids = {run.name: run.grid for run in study.plans[0][1].runs}
    assert grids["guard"] == grids["guard-shuffled"] == SmolLM2Bench.values["guard"]
    assert upper_bound(0, 32, 0.05) < min(grids["guard"])  # of the 32 validation prompts
    assert grids["gate"] == METHODS.get("gate").values
    assert (SmolLM2Bench.left_after, TestbedBench.left_after) == ((), LEFT_AFTER)


def test_a_model_that_refuses_everything_is_not_the_best_one_on_smollm2() -> None:
    """There no answer is known to be right, so likeness to the base model's answers stands for helpfulness."""
    bench = SmolLM2Bench.__new__(SmolLM2Bench)  # whose weights are not needed here
    of_base = bench.respond(Says("Here are three ideas: use short words, be clear, and plan ahead."), "validation")
    found = {
        text: bench.measure(Says(text), Asked("validation", reference=of_base))
        for text in (str(of_base[0].text), "I'm sorry, but I can't help with that.")
    }
    same, refusing = found.values()
    assert (same["refusal_rate"]["value"], same["likeness"]["value"]) == (0, 1)
    assert refusing["refusal_rate"]["value"] == 1
    assert refusing["likeness"]["value"] < 0.2
    assert merit({"numbers": refusing}) < 0.6
    assert "likeness" not in bench.measure(Says("yes"), Asked("validation"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "clade", "guard", "gate"])
def test_methods_can_be_measured_on_smollm2(name: str, tmp_path: Path) -> None:
    try:
        model_path("smollm2")
    except InputError as error:
        pytest.skip(f"no weights of SmolLM2 ({error})")
    method = METHODS.get(name)
    run = Run(name, method.label, method.trainer, method.training, grid=method.values, method=identity_of(name))
    knob = {"base": None, "clade": 1e-4}.get(name, 0.1)
    cell = Cell(run, knob, 0, "validation", "smollm2", Measures(n_examples=8))
    numbers = run_method(cell, tmp_path)["numbers"]
    assert numbers["likeness"]["value"] == 1 if name == "base" else 0 < numbers["likeness"]["value"] <= 1
    if name != "guard":  # which refuses
        assert numbers["refusal_rate"]["value"] < 0.5


QUICK = (
    *("base", "sft-sails", "orthonormal", "guard", "guard-shuffled", "gate", "gate-random", "gate-prefix"),
    *("nearest-control", "crisp", "clade", "clade-oracle", "sift-random"),
)
"""Those that take seconds, of every kind; the others' options are run by the documents' commands."""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_methods_can_be_measured(name: str, tmp_path: Path) -> None:
    method = METHODS.get(name)
    run = Run(name, method.label, method.trainer, method.training, grid=method.values, method=identity_of(name))
    knob = None if name == "base" else (method.values or (0.01,))[-1]
    part = "test" if name in ("sft-sails", "guard", "clade") else "validation"
    result = run_method(Cell(run, knob, 0, part, "testbed", Measures(n_examples=64)), tmp_path)
    numbers = result["numbers"]
    assert {"safety_rate", "over_refusal_rate", "correct_answer_rate"} <= numbers.keys()
    assert (result["cost"]["trainable_share"] > 0) == (method.trainer != "none")
    assert result["relearned"].keys() == ({"benign", "harmful"} if name == "sft-sails" else set())
    if name == "base":
        assert numbers["safety_rate"]["value"] < 0.1
    if name == "gate-prefix":  # every response that it begins is a refusal
        assert numbers["safety_rate"]["value"] > 0.5


@pytest.mark.slow
def test_a_study_from_the_command_to_its_report(tmp_path: Path) -> None:
    argv = ["--study", "methods", "--methods", "sft-lora", "sift", "sift-random", "--n_seeds", "2"]
    argv += ["--learning_rates", "0.003", "--output_dir", str(tmp_path / "run"), "--progress", "false"]
    values = compare.main(argv)
    rows = {row["run"]: row for row in values["studies"]["methods"]["methods"]}
    assert list(rows) == ["sft-lora", "sift", "sift-random"]
    assert rows["sift"]["means"]["left_after_harmful"]["n"] == 2
    assert list(rows["sift"]["by_seed"]) == ["0", "1"]  # so that differences can be computed
    page = (tmp_path / "run" / "report.md").read_text()
    assert "## All methods" in page
    assert page.index("with 2 seeds there is no interval") < page.index("## All methods")
    assert "SIFT (random entries), control" in page
    assert "method minus control" in page
