"""What keeps a training from starting: weights that are not there, options only the first step looks at, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import pytest
from paths import RECIPES
from processes import PATIENCE
from safetensors.torch import load_file, save_file
from tiny import Project, build

from sails_align.cli import dispatch
from sails_align.core.errors import InputError
from sails_align.training import run as align

LACKING = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def damaged(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's model without one of its tensors, in a layer that discovery does not read."""
    folder = Path(copytree(project.folder / "tiny", tmp_path_factory.mktemp("damaged") / "tiny"))
    weights = load_file(folder / "model.safetensors")
    del weights[LACKING]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "options", [("--init", "sails"), ("--init", "default"), ("--init", "pissa"), ("--use_peft", "false")]
)
def test_a_model_that_lacks_weights_is_refused(
    project: Project, damaged: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    with pytest.raises(InputError, match=f"lacks weights of LlamaForCausalLM, such as {LACKING}"):
        build(project.argv(tmp_path, "--model_name_or_path", str(damaged), *options))


def test_a_reference_that_lacks_weights_is_refused(project: Project, damaged: Path, tmp_path: Path) -> None:
    options = ("--use_peft", "false", "--ref_model_name_or_path", str(damaged))
    with pytest.raises(InputError, match=f"tiny lacks weights of LlamaForCausalLM, such as {LACKING}"):
        build(project.dpo_argv(tmp_path, *options), method="dpo")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--loss_type", "nonsense"), "nonsense"),
        (("--f_divergence_type", "nonsense"), "nonsense"),
        (("--lr_scheduler_kwargs", '{"nonsense": 1}'), "nonsense"),
        (("--save_strategy", "best"), "metric_for_best_model"),
    ],
)
def test_options_that_training_cannot_start_with(
    project: Project, tmp_path: Path, option: tuple[str, str], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        align.main("dpo", project.dpo_argv(tmp_path, "--init", "default", *option))
    assert not list(tmp_path.glob("**/adapter_model.safetensors"))


def test_the_testbed_as_reference(project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has another vocabulary"):
        build(project.dpo_argv(tmp_path, "--init", "default", "--ref_model_name_or_path", "testbed"), method="dpo")


def test_a_run_is_no_checkpoint(project: Project, tmp_path: Path) -> None:
    align.main("sft", project.argv(tmp_path / "run", "--init", "default"))
    options = ("--init", "default", "--resume_from_checkpoint", str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"that is a whole run;\ngive one of its checkpoints, such as .*/checkpoint-6"):
        align.main("sft", project.argv(tmp_path / "other", *options))


@pytest.mark.slow
def test_interrupted(project: Project, tmp_path: Path) -> None:
    options = ("--init", "default", "--max_steps", "100000", "--disable_tqdm", "false")
    command = [sys.executable, RECIPES / "sft_sails.py", *project.argv(tmp_path / "run", *options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": ""})
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "run").glob("checkpoint-*/run.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "interrupted\n" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", ["merge RUN --output /proc/x", "merge RUN --output /proc/x/y"])
def test_where_nothing_can_be_written(project: Project, tmp_path: Path, command: str) -> None:
    align.main("sft", project.argv(tmp_path / "run", "--init", "default"))
    with pytest.raises(InputError, match="cannot write /proc/x"):
        dispatch(command.replace("RUN", str(tmp_path / "run")).split())
    with pytest.raises(InputError, match="device is 'meta', which cannot be used: it holds no values"):
        dispatch(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged"), "--device", "meta"])


def test_estimates_that_make_no_sense(project: Project) -> None:
    command = [
        "estimate",
        "--method",
        "sft",
        "--model_name_or_path",
        str(project.folder / "tiny"),
        "--max_length",
        "32",
    ]
    with pytest.raises(InputError, match=r"cannot write /proc/x\.json"):
        dispatch([*command, "--output", "/proc/x.json"])
    with pytest.raises(InputError, match=r"lora_r is 100000, but .* has d_model 32"):
        dispatch([*command, "--lora_r", "100000"])
    for option in ("--per_device_train_batch_size", "--max_length", "--num_gpus", "--gpu_memory_gib"):
        with pytest.raises(InputError, match=f"{option.removeprefix('--')} is -1"):
            dispatch([*command, option, "-1"])
