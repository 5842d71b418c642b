"""What a run directory says of a run, and repeating the run from it."""

import json
import subprocess
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml
from processes import PATIENCE
from safetensors.torch import load_file
from tiny import Project, distance
from transformers import AutoTokenizer

import sails_align
from sails_align.core.log import Stages
from sails_align.subspace.options import Method
from sails_align.training import run as align
from sails_align.training.record import git_commit
from sails_align.training.stages import stages_of

OPTIONS = ["--seed", "3", "--sae_ids", "layer_0", "layer_1", "--weighting", "false", "--prompt_tokens", "last"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", [*OPTIONS, "--lora_dropout", "0.05"]),  # which is TRL's default, and not ours
        ("dpo", [*OPTIONS, "--gradient_checkpointing", "false"]),
        ("sft", ["--use_peft", "false"]),
    ],
)
def test_a_run_is_repeated_from_its_configuration(
    project: Project, tmp_path: Path, method: Method, options: list[str]
) -> None:
    argv = project.dpo_argv(tmp_path / "run", *options)
    align.main(method, argv)
    again = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    again["output_dir"] = str(tmp_path / "again")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(again))
    align.main(method, ["--config", str(tmp_path / "config.yaml")])
    name = "model.safetensors" if "--use_peft" in options else "adapter_model.safetensors"
    files = [load_file(tmp_path / folder / name) for folder in ("run", "again")]
    assert distance(*files) == 0
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "again")]
    assert records[0]["identity"] == records[1]["identity"]
    assert records[0]["versions"]["trl"]
    assert records[0]["data"]["train"]["sha256"] == records[0]["identity"]["data"]
    parts = [{**record["options"], "training": None} for record in records]
    assert parts[0] == parts[1]
    training = [record["options"]["training"] for record in records]
    assert {name for name in training[0] if training[0][name] != training[1][name]} <= {"output_dir", "logging_dir"}
    assert "--use_peft" in options or records[0]["saes"].keys() == {"0", "1"}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_what_was_decided_is_recorded_and_training_changes_no_option(
    project: Project, tmp_path: Path, method: Method
) -> None:
    """The chat template's path, the push, and the modules; TRL's trainer has a configuration of its own."""
    template = str(tmp_path / "template.jinja")
    Path(template).write_text(AutoTokenizer.from_pretrained(project.folder / "tiny").chat_template)
    argv = project.dpo_argv(tmp_path / "run", "--chat_template_path", template, "--max_steps", "1")
    plan = align.parse(method, argv)
    before = plan.to_json()
    align.run(plan, tmp_path / "run", Stages(stages_of(plan)))
    assert plan.to_json() == before
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    options = record["options"]
    assert options["training" if method == "sft" else "dpo"]["chat_template_path"] == template
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["chat_template_path"] == template
    assert options["model"]["lora_target_modules"] == record["identity"]["options"]["lora_target_modules"]
    with pytest.raises(FrozenInstanceError):
        plan.method = "sft"  # pyright: ignore[reportAttributeAccessIssue]


def test_no_token_is_written(project: Project, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path / "run", "--init", "default", "--hub_token", "hf_secret"))
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.name != "training_args.bin":
            assert b"hf_secret" not in path.read_bytes(), path


def test_the_commit() -> None:
    root = Path(sails_align.__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("the package is not installed from a checkout")
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = git_commit()
    assert found is not None
    assert found["commit"] == head


def test_reports_reach_wandb_with_the_drift(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    align.main("sft", project.argv(tmp_path / "run", "--report_to", "wandb", "--logging_steps", "1"))
    import wandb

    wandb.finish()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    end = time.monotonic() + PATIENCE  # a process of its own writes the file, at times after `finish` has returned
    while b"adapter_energy_inside" not in log.read_bytes():
        assert time.monotonic() < end, "the drift is not in wandb's file"
        time.sleep(0.2)
