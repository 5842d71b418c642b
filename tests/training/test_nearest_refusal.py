"""Nearest refusals in trainings: whose hidden states they are, what a run says, and what cannot be used with stages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import N_LAYERS, Project, build
from transformers import AutoModelForCausalLM

from sails_align.core.errors import InputError
from sails_align.data.messages import user
from sails_align.data.transforms.nearest_refusal import SIMILARITY
from sails_align.training import run as align
from sails_align.training.dataset import load_source
from sails_align.training.reader import FrozenBase

QUICK = ("--init", "default", "--max_steps", "2")
NEAREST = ("--nearest_refusal", "true")
STAGES = (*NEAREST, "--refusal_stages", "2", "--train_sampling_strategy", "sequential")
PROMPTS = ["how do i break the lock", "you can with glue", "how do i mend the cup 5"]


@pytest.fixture
def refusals(project: Project) -> str:
    path = project.folder / "refusals.jsonl"
    endings = ("", " that would hurt someone", " the lock", " the cup", " with glue 7")
    path.write_text("".join(json.dumps({"response": f"sorry, i can not help you{end}"}) + "\n" for end in endings))
    return str(path)


def reader_of(project: Project, folder: Path, *more: str) -> tuple[FrozenBase, Any]:
    args, testbed = align.resolved(align.parse("sft", project.argv(folder, *QUICK, *more)))
    source = load_source(args, testbed)
    return FrozenBase(args, source.tokenizer, source.model_config), source.tokenizer


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_hidden_states_are_those_of_the_whole_model_one_text_at_a_time(project: Project, tmp_path: Path, tokens: Any):
    reader, tokenizer = reader_of(project, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(project.folder / "tiny")
    found_ND = reader.embed([[user(text)] for text in PROMPTS], tokens)
    for text, found_D in zip(PROMPTS, found_ND, strict=True):
        ids = tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            hidden_SD = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[N_LAYERS // 2 + 1][0]
        own = hidden_SD[2:-1].mean(0) if tokens == "all" else hidden_SD[-1]  # without <s> <user> and <assistant>
        torch.testing.assert_close(found_D, own.double(), atol=1e-5, rtol=1e-5)


def test_the_targets_are_those_of_the_frozen_model_before_and_after_training(
    project: Project, tmp_path: Path, refusals: str
):
    """And control: another base model chooses others."""
    argv = (*NEAREST, "--refusal_dataset_name", refusals, "--learning_rate", "0.1")
    built = build(project.argv(tmp_path / "run", "--max_steps", "2", *argv, "--use_peft", "false"))
    weights = [parameter.clone() for parameter in built.trainer.model.parameters()]  # pyright: ignore
    built.trainer.train()
    moved = built.trainer.model.parameters()  # pyright: ignore
    assert any(not torch.equal(before, after.cpu()) for before, after in zip(weights, moved, strict=True))
    again = build(project.argv(tmp_path / "again", *QUICK, *argv))
    assert again.source.data_hash() == built.source.data_hash()
    built.trainer.save_model(str(tmp_path / "moved"))
    other = build(project.argv(tmp_path / "other", *QUICK, *argv, "--model_name_or_path", str(tmp_path / "moved")))
    assert other.source.safety[SIMILARITY][:] != built.source.safety[SIMILARITY][:]


def test_a_run_learns_refusals_of_the_pool_and_says_so(project: Project, tmp_path: Path, refusals: str):
    argv = project.argv(tmp_path / "run", *QUICK, *STAGES, "--refusal_dataset_name", refusals)
    align.main("sft", argv)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| nearest_refusal | `True` |" in card
    assert "| refusal_dataset_name | `refusals.jsonl` |" in card
    assert "| refusal_stages | `2` |" in card
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    n_safety = record["data"]["safety"]["rows"]
    assert record["data"]["train"]["rows"] == 2 * (n_safety + round(n_safety / 2)), "half, then all, and helpful ones"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "nearest refusals: " in log


def test_the_order_of_stages_is_that_of_training(project: Project, tmp_path: Path, refusals: str):
    trainer: Any = build(project.argv(tmp_path, *QUICK, *STAGES, "--refusal_dataset_name", refusals)).trainer
    sampled = list(trainer._get_train_sampler(trainer.train_dataset))
    assert sampled == list(range(len(trainer.train_dataset)))


def test_for_dpo_it_is_the_chosen_response(project: Project, tmp_path: Path, refusals: str):
    argv = project.dpo_argv(tmp_path, *QUICK, *NEAREST, "--refusal_dataset_name", refusals)
    source = build(argv, method="dpo").source
    assert all(text.startswith("sorry, i can not help you") for text in source.safety["chosen"])
    assert all(text.startswith("you can") for text in source.safety["rejected"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--refusal_stages", "2"), "refusal_stages is 2 without nearest_refusal"),
        ((*NEAREST, "--refusal_stages", "2"), "train_sampling_strategy random changes the order"),
        ((*STAGES, "--packing", "true"), "packing changes the order"),
        ((*STAGES, "--max_steps", "-1"), "num_train_epochs is 3, but all stages together are one epoch"),
    ],
)
def test_what_stages_cannot_be_used_with(project: Project, tmp_path: Path, options: tuple, said: str):
    with pytest.raises(InputError, match=said):
        align.parse("sft", project.argv(tmp_path, *QUICK, *options))


def test_data_whose_responses_are_no_refusals_is_refused(project: Project, tmp_path: Path):
    argv = project.argv(tmp_path / "run", *QUICK, *NEAREST, "--dataset_name", str(project.folder / "helpful.jsonl"))
    with pytest.raises(InputError, match=r"none of the .* responses of the safety data is a refusal"):
        align.main("sft", argv)
    assert not (tmp_path / "run").exists()
