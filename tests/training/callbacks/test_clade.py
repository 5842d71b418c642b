"""Trainings of conditional norms: labels reach the model, only norms train, and a run is loaded as any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Project, base_logits, build, logits

from sails_align.core.errors import InputError
from sails_align.data.messages import user
from sails_align.evaluation.backends.known_classes import known_classes
from sails_align.evaluation.backends.serving import check_serving
from sails_align.evaluation.records import Prompt
from sails_align.models.clade import CLASS_IDS, CONFIG, WEIGHTS, load_clade
from sails_align.models.load import load_model
from sails_align.models.resolve import resolve_model
from sails_align.training import run as align
from sails_align.training.callbacks.clade import with_class_ids

CLADE = ("--use_peft", "false", "--clade", "categories", "--learning_rate", "0.1")


@pytest.fixture(scope="module")
def categories(project: Project) -> Path:
    path = project.folder / "categories.jsonl"
    rows = [json.loads(line) for line in (project.folder / "safety.jsonl").read_text().splitlines()]
    named = [row | {"category": "lock" if number % 2 else "cup"} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return path


@pytest.fixture(scope="module")
def run(project: Project, categories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clade") / "run"
    align.main("sft", project.argv(folder, *CLADE, "--dataset_name", str(categories)))
    return folder


def test_only_norms_train_and_step_0_is_the_base(project: Project, categories: Path, tmp_path: Path):
    built = build(project.argv(tmp_path, *CLADE, "--dataset_name", str(categories)))
    model: Any = built.trainer.model
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "clade.gain",
        "clade.bias",
    }
    assert torch.equal(logits(model), base_logits(project))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    built.trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"clade.gain", "clade.bias"}


def test_each_row_is_trained_with_its_own_class(project: Project, categories: Path, tmp_path: Path):
    built = build(project.argv(tmp_path, *CLADE, "--dataset_name", str(categories)))
    trainer: Any = built.trainer
    classes = trainer.model.clade.config.classes
    assert classes == ("none", "cup", "lock")
    for row, given in zip(trainer.train_dataset, built.source.train, strict=True):
        assert classes[row[CLASS_IDS]] == (given["category"] or "none")  # pyright: ignore
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch[CLASS_IDS].shape == batch["input_ids"].shape[:1]
    assert CLASS_IDS not in next(iter(trainer.get_eval_dataloader()))


def test_a_collator_leaves_examples_without_a_class_alone():
    assert with_class_ids(lambda examples: {"n": len(examples)})([{}, {}]) == {"n": 2}


def test_a_finished_run_is_loaded_as_any_other(project: Project, run: Path):
    assert not list(run.glob("model*")), "the base is not copied"
    assert not (run / "config.json").exists()
    spec = resolve_model(str(run))
    loaded = load_model(spec, "cpu")
    assert not torch.allclose(logits(loaded), base_logits(project).cpu(), atol=1e-3)
    with loaded.disable_adapter():  # pyright: ignore
        assert torch.equal(logits(loaded), base_logits(project).cpu())
    assert {CONFIG, WEIGHTS} <= spec.identity["adapter"].keys(), "answers are cached by them"
    card = (run / "README.md").read_text()
    assert "They cannot be merged into the weights." in card
    assert "| classes | `cup, lock, none` |" in card
    assert "sails chat --model PATH" in card
    assert "AutoModelForCausalLM" not in card


def test_vllm_and_merging_are_refused_with_the_reason(run: Path, tmp_path: Path):
    from sails_align.cli import main

    with pytest.raises(InputError, match="vLLM cannot serve it"):
        check_serving(resolve_model(str(run)))
    with pytest.raises(SystemExit) as error:
        main(["merge", str(run), "--output", str(tmp_path / "merged")])
    assert error.value.code == 2


def test_the_oracle_knows_categories_and_other_models_have_none(run: Path, project: Project):
    prompts = [
        Prompt(str(number), (user("how do i break the lock"),), kind, category)  # pyright: ignore[reportArgumentType]
        for number, (kind, category) in enumerate([("harmful", "lock"), ("benign", "lock"), ("harmful", "bank")])
    ]
    for prompt, weights in zip(prompts, [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5)], strict=True):
        assert list(known_classes(resolve_model(str(run)), [prompt]).weights.values()) == [weights]
    with pytest.raises(InputError, match="no run with --clade categories"):
        known_classes(resolve_model(str(project.folder / "tiny")), prompts)


def test_a_resumed_run_ends_like_one_that_was_not_stopped(
    project: Project, categories: Path, run: Path, tmp_path: Path
):
    resumed = build(project.argv(tmp_path, *CLADE, "--dataset_name", str(categories)))
    resumed.trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    ours: Any = resumed.trainer.model
    for name, value in load_clade(run).state_dict().items():
        torch.testing.assert_close(ours.clade.state_dict()[name].cpu(), value, atol=1e-6, rtol=1e-6)


def test_one_class_has_no_probe_and_needs_no_categories(project: Project, tmp_path: Path):
    argv = project.argv(tmp_path / "run", "--use_peft", "false", "--clade", "one", "--learning_rate", "0.1")
    align.main("sft", [*argv, "--max_steps", "2"])
    config = load_clade(tmp_path / "run").config
    assert config.classes == ("none",)
    assert config.probe_accuracy is None


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dpo", (), "clade is categories, which is for SFT only"),
        ("sft", ("--use_peft", "true"), "no LoRA adapter; add --use_peft false"),
        ("sft", ("--packing", "true"), "does not work with packing"),
        ("sft", ("--derta_rto_share", "1"), "does not work with derta_rto_share"),
        ("sft", ("--clade", "two"), "clade is 'two', which is not one of: categories, one"),
        ("sft", ("--clade_layer", "-1"), "clade_layer is -1; choose 0 or more"),
    ],
)
def test_what_it_cannot_be_used_with(project: Project, tmp_path: Path, method: Any, options: tuple, said: str):
    with pytest.raises(InputError, match=said):
        align.parse(method, project.argv(tmp_path, *CLADE, *options))


def test_data_without_categories_is_refused(project: Project, tmp_path: Path):
    with pytest.raises(InputError, match=r"no row of the safety data has a category;\n.*--clade one"):
        align.main("sft", project.argv(tmp_path / "run", *CLADE))
    assert not (tmp_path / "run").exists()
