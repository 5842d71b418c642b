"""Comparisons of other models than the testbed: what the file may say, and cells as jobs of their own."""

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT

from sails_align.core.command_line import CommandLine
from sails_align.core.errors import InputError
from sails_align.core.files import exclusive, write_json
from sails_align.experiments.commands import by_category, capability, check, gathered, training
from sails_align.experiments.launchers import Local, share_of
from sails_align.experiments.merits import helpfulness, merit
from sails_align.experiments.plan import RUNS, Cell, Measures, Plan, Protocol, Run
from sails_align.experiments.results import Results, cells_named, names_of
from sails_align.experiments.runner import run_jobs
from sails_align.experiments.studies import Study, read_plans
from sails_align.experiments.summary import REPORTED, mean_of, value_of, with_numbers

MODELS = ("gemma-2-2b", "gemma-2-9b", "llama-3.1-8b", "gemma-3-4b")
SAFETY = {"safety": {"prompts": ["jailbreakbench", "xstest"], "judge": "rules", "n_prompts": 4}}
VALIDATION = {**SAFETY, "helpfulness": {"prompts": ["mt-bench"], "judge": "llm", "judge_model": "m"}}
FILE: dict[str, Any] = {
    "model": "a model",
    "runs": {
        "base": {"model": "google/gemma-2-2b", "options": {"chat_template_path": "t.jinja"}},
        "sft-lora": {"train": "sft", "options": {"model_name_or_path": "google/gemma-2-2b", "dataset_name": "d"}},
        "sft-sails": {"train": "sft", "config": "sails.yaml", "options": {"lora_r": 4}},
    },
    "evaluate": {"validation": VALIDATION, "test": SAFETY},
    "learning_rates": [0.001, 0.01],
    "n_seeds": 2,
}
RECIPE = "model_name_or_path: google/gemma-2-2b\ndataset_name: d\nsae_path: saes\nlora_r: 8\n"


def studies_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str, **changes: Any) -> list[Study]:
    monkeypatch.chdir(folder)
    (folder / "sails.yaml").write_text(RECIPE)
    (folder / "compare.yaml").write_text(yaml.safe_dump({**FILE, **changes}, sort_keys=False))
    return read_plans(CommandLine.read(["--config", "compare.yaml", *options]), None)[2]


def main_plan(studies: list[Study]) -> Plan:
    return studies[0].plans[0][1]


@pytest.mark.parametrize("model", MODELS)
def test_files_of_real_models_can_be_used(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # vLLM is in an environment of its own
    _, _, studies = read_plans(CommandLine.read(["--config", f"recipes/configs/{model}/compare.yaml"]), None)
    plan = main_plan(studies)
    assert plan.protocol is not None
    check(plan.runs, plan.protocol)
    assert len(plan.tuning_cells()) == 6 * 5
    assert len(plan.test_cells({})) == 2 + 6 * 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else name)
    with pytest.raises(InputError, match=r"needs the package vllm; install 'sails-align\[vllm\]'"):
        check(plan.runs, plan.protocol)


def test_the_documented_file_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "docs" / "comparison.md").read_text().splitlines()
    start = lines.index("    model: google/gemma-2-9b")
    end = next(index for index in range(start, len(lines)) if not lines[index].startswith("    "))
    (tmp_path / "compare.yaml").write_text("\n".join(line[4:] for line in lines[start:end]))
    plan = main_plan(read_plans(CommandLine.read(["--config", str(tmp_path / "compare.yaml")]), None)[2])
    assert plan.protocol is not None
    check(plan.runs, plan.protocol)
    assert [run.label for run in plan.runs] == ["base", "SFT-LoRA", "SFT-SAILS", "Gemma-2-9B-it"]


def test_what_the_file_says_is_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = main_plan(studies_of(tmp_path, monkeypatch))
    assert plan.protocol is not None
    check(plan.runs, plan.protocol)
    base, lora, sails = plan.runs
    assert (base.trainer, base.is_reference, base.is_tuned) == ("none", True, False)
    assert base.options == ("--model", "google/gemma-2-2b", "--chat_template_path", "t.jinja")
    assert (lora.label, sails.label) == ("SFT-LoRA", "SFT-SAILS")
    cell = next(cell for cell in plan.tuning_cells() if cell.run is sails)
    command = training(cell, plan.protocol)
    assert command[1:] == [
        *("-m", "sails_align", "train", "sft", "--config", "sails.yaml", "--lora_r", "4"),
        *("--resume_from_checkpoint", "true", "--seed", "1000"),
        *("--learning_rate", "0.001"),
    ]
    launched = studies_of(tmp_path, monkeypatch, launch=["--num_processes", 2])
    of_launched = main_plan(launched).protocol
    assert of_launched is not None
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "2", "-m", "sails_align"]
    assert training(cell, of_launched)[1:8] == launch


def test_prompts_that_are_reported_and_chosen_by_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(prompts: list[str], **options: str) -> bool:
        caplog.clear()
        safety = {**SAFETY["safety"], "prompts": prompts, **options}
        twins = {"helpfulness": {"prompts": ["twins"], "judge": "llm", "judge_model": "m"}}
        evaluate = {"validation": {**VALIDATION, "safety": safety}, "test": SAFETY | twins}
        plan = main_plan(studies_of(tmp_path, monkeypatch, evaluate=evaluate))
        assert plan.protocol is not None
        check(plan.runs, plan.protocol)
        return "validation and test both have the prompts" in caplog.text

    assert not warned(["hex-phi"])
    assert warned(["hex-phi", "xstest"])
    assert warned(["twins"])
    assert not warned(["twins"], part="validation")


def test_other_evaluations_need_no_other_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cell_of(**changes: Any) -> Any:
        return main_plan(studies_of(tmp_path, monkeypatch, **changes)).tuning_cells()[-1]

    cell = cell_of()
    other = cell_of(evaluate={"validation": {**VALIDATION, "safety": {"prompts": ["hex-phi"]}}, "test": SAFETY})
    assert other.key != cell.key
    assert other.training_key == cell.training_key
    more = {**SAFETY, "harness": {"tasks": "arc_easy"}}
    assert cell_of(evaluate={"validation": VALIDATION, "test": more}).key == cell.key  # of the test part
    launched = cell_of(launch=["--num_processes", "2"])
    assert launched.training_key != cell.training_key
    (tmp_path / "sails.yaml").write_text(RECIPE + "num_train_epochs: 2\n")
    _, _, studies = read_plans(CommandLine.read(["--config", "compare.yaml"]), None)
    assert main_plan(studies).tuning_cells()[-1].training_key != cell.training_key


def test_side_studies_change_the_files_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--study", "main", "ablations", "--examples", "8", "--worlds", "contamination=0.2"]
    _, ablations, examples, worlds = studies_of(tmp_path, monkeypatch, *more)
    changed = {run.name: run.options for run in ablations.plans[0][1].runs}
    assert "rank-4" not in changed  # which sft-sails has already
    assert changed["k-16"] == ("--config", "sails.yaml", "--lora_r", "4", "--top_k", "16")
    assert "mode-decay" in changed
    launched = studies_of(tmp_path, monkeypatch, *more, launch=["--num_processes", "2"])[1].plans[0][1]
    assert "mode-decay" not in {run.name for run in launched.runs}
    assert changed["rank-16"] == ("--config", "sails.yaml", "--lora_r", "16")
    plan = examples.plans[0][1]
    assert plan.protocol is not None
    assert [run.name for run in plan.runs] == ["sft-lora", "sft-sails"]  # what the file does not have is not made up
    assert training(plan.tuning_cells()[0], plan.protocol)[-2:] == ["--max_train_examples", "8"]
    plan = worlds.plans[0][1]
    assert plan.protocol is not None
    assert training(plan.tuning_cells()[0], plan.protocol)[-2:] == ["--contamination", "0.2"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"runs": {"x": {}}}, "runs: x is {}, but it must be a mapping"),
        ({"runs": {"x": {"label": "x"}}}, "has both or neither of `model` and `train`"),
        ({"runs": {"x": {"train": "sft", "model": "m"}}}, "has both or neither"),
        ({"runs": {"x": {"train": "ppo"}}}, "train is 'ppo'; did you mean 'dpo'"),
        ({"runs": {"x": {"train": "sft", "config": "no.yaml"}}}, "there is no file no.yaml"),
        ({"runs": {"x": {"train": "sft", "lr": 1}}}, "has the unknown entry 'lr'"),
        ({"runs": {"a/b": {"model": "m"}}}, "a name has letters, digits"),
        ({"runs": {"..": {"model": "m"}}}, "a name has letters, digits"),
        ({"runs": {"a": {"model": "m", "label": "[/b]"}}}, "and a label letters, digits"),
        ({"runs": {"a": {"model": "m", "label": "x"}, "b": {"model": "n", "label": "x"}}}, "the same label"),
        ({"runs": {"a": {"train": "sft", "options": {"hub_token": "hf_x"}}}}, "has hub_token, a secret"),
        ({"runs": {"a": {"train": "sft", "options": {"hub-token": "hf_x"}}}}, "has hub_token, a secret"),
        ({"runs": {"a": {"train": "sft", "options": {"output-dir": "x"}}}}, "has output_dir, which each cell sets"),
        ({"runs": None}, "runs is None, but it must be a mapping"),
        ({"worlds": None}, "worlds is None, but it must be a list"),
        ({"evaluate": None}, "evaluate is None"),
        ({"evaluate": {"validation": VALIDATION}}, "evaluate: test is None"),
        ({"evaluate": {"test": SAFETY}}, "sft-lora is tuned, but evaluate has no `validation`"),
        ({"evaluate": {"validation": SAFETY, "test": SAFETY}}, "validation has no helpfulness evaluation"),
        (
            {"evaluate": {"validation": VALIDATION, "test": {"harness": {"tasks": "x"}}}},
            "test has no safety evaluation",
        ),
        ({"evaluate": {"validation": VALIDATION, "test": SAFETY, "x": SAFETY}}, "unknown entry 'x'"),
        ({"evaluate": {"validation": VALIDATION, "test": {"safety": {"model": "m"}}}}, "safety has model, which each"),
        ({"runs": {"x": {"train": "sft", "options": {"output_dir": "m"}}}}, "x has output_dir, which each cell sets"),
        ({"runs": {"x": {"train": "sft", "options": {"learning_rate": 1}}}}, "x has learning_rate, which each cell"),
        ({"runs": {"x": {"train": "sft", "tuned": "no"}}}, "tuned is 'no', but it must be true or false"),
        ({"runs": {"x": {"train": "sft", "options": {"lora_r": None}}}}, "lora_r has no value"),
        ({"launch": "zero3.yaml"}, "launch is 'zero3.yaml', but it must be a list"),
        ({"model": None}, "model is None, but it must be a text"),
        ({"out_of_distribution": 3}, "out_of_distribution is 3"),
        ({"n_prompts": 3}, "n_prompts is of the testbed"),
        ({"n_seed": 3}, "unknown option 'n_seed'; did you mean --n_seeds"),
    ],
)
def test_files_that_are_not_understood(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=says):
        studies_of(tmp_path, monkeypatch, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"runs": {"x": {"train": "sft", "config": "sails.yaml", "options": {"lora": 1}}}},
            "the run x cannot be trained",
        ),
        ({"runs": {"x": {"model": "m", "options": {"lora_r": 1}}}}, "the run x cannot be evaluated.*--lora_r"),
        ({"evaluate": {"validation": VALIDATION, "test": {"safety": {"judge": "x"}}}}, "evaluate: test: safety cannot"),
        (
            {"evaluate": {"validation": VALIDATION, "test": {"safety": {"prompts": "xstest"}}}},
            "test: safety names no judge",
        ),
        ({"launch": ["--config_file", "/no/zero3.yaml"]}, "launch names /no/zero3.yaml, which does not exist"),
        ({"runs": {"x": {"model": "./gone"}}}, "the run x names ./gone, which does not exist"),
        (
            {"evaluate": {"validation": VALIDATION, "test": {"safety": {"prompts": "/no.jsonl", "judge": "rules"}}}},
            "evaluate: test: safety names /no.jsonl, which does not exist",
        ),
        ({"in_distribution": "hex-phi"}, "'hex-phi', which is not a prompt set"),
        ({"out_of_distribution": "hex-phi"}, "'hex-phi', which is not a prompt set"),
    ],
)
def test_commands_that_could_not_be_given_are_told_before_the_first(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = main_plan(studies_of(tmp_path, monkeypatch, **changes))
    assert plan.protocol is not None
    with pytest.raises(InputError, match=says):
        check(plan.runs, plan.protocol)


@pytest.mark.parametrize("name", ["public_prompts", "hh_rlhf"])
def test_without_tuned_runs_there_is_no_validation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = f"recipes/configs/smollm2-135m/{name}.yaml"
    plan = main_plan(read_plans(CommandLine.read(["--config", config]), None)[2])
    assert plan.protocol is not None
    check(plan.runs, plan.protocol)
    assert not plan.tuning_cells()
    trained = [cell for cell in plan.test_cells({}) if cell.run.trainer == "sft"]
    assert {cell.run.name for cell in trained} == {"sft-lora", "sft-sails"}
    for cell in trained:
        words = training(cell, plan.protocol)
        assert words[words.index("--learning_rate") + 1] == "0.00333"


def test_names_of_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = studies_of(tmp_path, monkeypatch, "--examples", "8", n_seeds=1)
    assert list(names_of(studies, Results(tmp_path))) == [
        "validation/sft-lora/0.001/1000",
        "validation/sft-lora/0.01/1000",
        "validation/sft-sails/0.001/1000",
        "validation/sft-sails/0.01/1000",
        "test/base/0",
        "test/sft-lora/0",
        "test/sft-sails/0",
        *(f"examples/8/validation/{run}/{rate}/1000" for run in ("sft-lora", "sft-sails") for rate in (0.001, 0.01)),
        *(f"examples/8/test/{run}/{seed}" for seed in range(5) for run in ("sft-lora", "sft-sails")),
    ]
    results = Results(tmp_path)
    (cell,) = cells_named(["examples/8/validation/sft-sails/0.01/1000"], studies, results)
    assert (cell.run.name, cell.learning_rate, cell.measures.n_examples) == ("sft-sails", 0.01, 8)
    with pytest.raises(InputError, match=r"there is no cell 'test/sft-sail/0'; did you mean 'test/sft-sails/0'"):
        cells_named(["test/sft-sail/0"], studies, results)
    with pytest.raises(InputError, match=r"2 of 2 results are missing, such as of validation/sft-sails/0.001/1000"):
        cells_named(["test/sft-sails/0"], studies, results)  # for which the other runs are not needed
    with pytest.raises(InputError, match=r"such as of examples/8/validation/sft-lora/0.001/1000"):
        cells_named(["examples/8/test/sft-lora/0"], studies, results)
    tuned = cells_named(["validation/sft-sails/*"], studies, results)
    assert {cell.run.name for cell in tuned} == {"sft-sails"}
    assert [cell.part for cell in tuned] == ["validation"] * len(tuned)
    assert len(tuned) > 1
    (base,) = cells_named(["test/base/0"], studies, results)
    assert base.learning_rate is None


@pytest.mark.parametrize(
    ("gpus", "n_processes", "shares"),
    [
        ("0,1,2,3", 4, [["0"], ["1"], ["2"], ["3"]]),
        ("0,1,2,3", 2, [["0", "1"], ["2", "3"]]),
        ("4,5", 1, [["4", "5"]]),
        ("4,5", 3, [["4"], ["5"], ["4"]]),
    ],
)
def test_gpus_are_shared_out(gpus: str, n_processes: int, shares: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert [share_of(slot, n_processes) for slot in range(n_processes)] == shares


def test_without_gpus_there_is_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert share_of(0, 2) == []


def test_helpfulness_is_what_is_known_of_it() -> None:
    def result(**numbers: float | None) -> dict[str, Any]:
        return {"numbers": {name: {"value": value} for name, value in numbers.items()}}

    assert helpfulness(result(correct_answer_rate=0.7, helpfulness=9.0)) == 0.7
    assert helpfulness(result(helpfulness=5.5, over_refusal_rate=0.9)) == pytest.approx(0.5)
    assert helpfulness(result(helpfulness=None)) == 0.0  # nothing was scored
    assert helpfulness(result(over_refusal_rate=0.0)) is None  # a broken model refuses nothing
    assert merit(result(safety_rate=0.8)) == 0.8
    assert value_of(result(safety_rate=0.8), "merit") is None
    assert merit(result(safety_rate=1.0, helpfulness=5.5)) == 0.75


def test_categories_know_the_set_that_they_are_of(tmp_path: Path) -> None:
    rows = [
        {"kind": "harmful", "category": "arson", "meta": {"split": "hex-phi"}},
        {"kind": "harmful", "category": "theft", "meta": {"split": "hh-rlhf"}},
        {"kind": "dual_use", "category": "theft", "meta": {"split": "xstest"}},
        {"kind": "harmful", "category": "fraud", "meta": {"split": "hh-rlhf"}},
        {"kind": "harmful", "category": "fraud", "meta": {"split": "hex-phi"}},  # whose rate is of both sets
        {"kind": "harmful", "category": "contrast", "meta": {"split": "xstest"}},  # of neither set
    ]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = {
        "arson": {"safety_rate": {"value": 0.5}},
        "theft": {"safety_rate": {"value": 1.0}},
        "theft (dual_use)": {"over_refusal_rate": {"value": 0.25}},
        "fraud": {"safety_rate": {"value": 0.5}},
        "contrast": {"safety_rate": {"value": 0.5}},
    }
    protocol = Protocol("m", (), in_distribution="hh-rlhf", out_of_distribution="hex-phi")
    found = by_category({"by_category": rates}, tmp_path / "responses.jsonl", protocol)
    assert {name: (of["split"], of["value"]) for name, of in found.items()} == {
        "arson": ("ood", 0.5),
        "theft": ("harmful", 1.0),
        "theft (dual_use)": ("harmless", 0.25),
    }


@pytest.mark.parametrize("rate", ["safety_rate", "refusal_rate"])
def test_where_rules_alone_judge_the_refusal_rate_takes_the_place_of_the_safety_rate(tmp_path: Path, rate: str) -> None:
    """Results of earlier versions call it the safety rate."""
    of_set = {rate: {"value": 0.5, "n_unscored": 0}}
    safety = {
        "overall": {rate: {"value": 0.75, "n_unscored": 2}, "over_refusal_rate": {"value": 0.25, "n_unscored": 1}},
        "by_split": {"hh-rlhf": of_set, "hex-phi": of_set},
        "by_category": {"arson": of_set},
    }
    sets = {"in_distribution": "hh-rlhf", "out_of_distribution": "hex-phi"}
    protocol = Protocol("m", (("test", "safety", ()),), **sets)
    cell = Cell(Run("base", "base", "none"), None, 0, "test", "m", Measures(), protocol)
    folder = tmp_path / cell.key / "safety"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(safety))
    row = {"kind": "harmful", "category": "arson", "meta": {"split": "hex-phi"}}
    (folder / "responses.jsonl").write_text(json.dumps(row) + "\n")
    found = gathered(cell, protocol, tmp_path)
    assert found["by_category"]["arson"]["value"] == 0.5
    assert found["by_set"]["hex-phi"][rate]["value"] == 0.5
    assert value_of(found, rate) == 0.75
    assert value_of(found, f"{rate}_in_distribution") == value_of(found, f"{rate}_out_of_distribution") == 0.5
    assert merit({"numbers": {**found["numbers"], "correct_answer_rate": {"value": 0.25}}}) == 0.5
    means = [{metric.name: mean_of([value_of(found, metric.name)]) for metric in REPORTED}]
    shown = [metric.name for metric in with_numbers(REPORTED, means) if "rate" in metric.name]
    assert shown == [f"{rate}_in_distribution", f"{rate}_out_of_distribution", "over_refusal_rate"]


def test_capability_is_of_what_was_asked_for() -> None:
    def task(value: float, higher: bool = True) -> dict[str, Any]:
        return {"acc": {"model": {"value": value, "higher_is_better": higher}}}

    harness = {
        "tasks": {"mmlu": task(0.5), "mmlu_anatomy": task(0.9), "gsm8k": task(0.25)},
        "provenance": {"options": {"tasks": ["mmlu", "gsm8k"]}},
    }
    assert capability(harness) == {"mmlu": 0.5, "gsm8k": 0.25}
    harness["provenance"]["options"]["tasks"] = ["a_tag"]
    assert capability(harness).keys() == {"mmlu", "mmlu_anatomy", "gsm8k"}


@pytest.mark.slow
def test_cells_of_one_key_are_computed_once(tmp_path: Path) -> None:
    """Two jobs with the same cell: the second waits for the first one's result."""
    cell = Plan(runs=(RUNS["base"],), measures=Measures(n_prompts=4, n_attacked=0, n_capability=0)).test_cells({})[0]
    results = Results(tmp_path)
    pool = ThreadPoolExecutor()
    with exclusive(results.path(cell, ".lock")):
        waiting = pool.submit(run_jobs, results.jobs([cell]), Local(1))
        with pytest.raises(FutureTimeout):
            waiting.result(timeout=5)
        write_json(results.path(cell), {"cell": "of the other job"})
    assert waiting.result() == []
    assert results.all([cell]) == {cell.key: {"cell": "of the other job"}}
