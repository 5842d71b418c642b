"""Going on from checkpoints: which ones are taken, which refused, and that nothing is lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import RECIPES, TESTS
from peft import get_peft_model_state_dict
from processes import PATIENCE
from safetensors.torch import load_file, save_file
from tiny import Project, adapter_weights, build, distance
from transformers import TrainerCallback

from sails_align.core.errors import InputError
from sails_align.training import run as align
from sails_align.training.checkpoints import find_checkpoint, train


@pytest.fixture(scope="module")
def finished(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    align.main("sft", project.argv(folder))
    return folder


# What is resumed


class AtStart(TrainerCallback):
    """The adapter as it is when training begins, after a checkpoint has been loaded."""

    weights: dict[str, torch.Tensor] | None = None
    step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.weights, self.step = dict(get_peft_model_state_dict(model)), state.global_step
        self.weights = {name: value.cpu().clone() for name, value in self.weights.items()}


@pytest.mark.parametrize("mode", ["init", "freeze"])
def test_a_checkpoint_is_not_initialized_again(project: Project, tmp_path: Path, mode: str) -> None:
    argv = project.argv(tmp_path / "run", "--subspace_mode", mode, "--lora_dropout", "0.1", "--save_total_limit", "9")
    align.main("sft", argv)
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    at_start = AtStart()
    resumed = build([*argv, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")], [at_start])
    initial = adapter_weights(resumed.trainer)
    train(resumed.trainer, find_checkpoint(resumed.args.training, resumed.identity()))
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors")
    assert at_start.step == 4
    assert at_start.weights is not None
    assert distance(at_start.weights, saved) == 0
    assert distance(saved, initial) > 1e-3
    assert distance(adapter_weights(resumed.trainer), whole) < 1e-6


@pytest.mark.parametrize("start", ["adapter", "pissa", "orthogonal", "freeze", "full"])
def test_dpo_goes_on_with_the_same_reference(project: Project, finished: Path, tmp_path: Path, start: str) -> None:
    more = {
        "adapter": ["--adapter_path", str(finished)],
        "freeze": ["--subspace_mode", "freeze"],
        "full": ["--use_peft", "false", "--learning_rate", "0.001"],
    }
    options = [*more.get(start, ["--init", start]), "--max_steps", "6", "--save_steps", "2", "--logging_steps", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    align.main("dpo", project.dpo_argv(whole, *options))
    shutil.copytree(whole / "checkpoint-4", broken / "checkpoint-4")
    assert not (broken / "checkpoint-4" / "ref").exists()
    align.main("dpo", project.dpo_argv(broken, *options, "--resume_from_checkpoint", "true"))
    name = "model.safetensors" if start == "full" else "adapter_model.safetensors"
    assert distance(load_file(broken / name), load_file(whole / name)) < 1e-6
    rewards = []
    for run in (whole, broken):
        history = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        rewards.append([row["rewards/chosen"] for row in history if "loss" in row])
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)
    assert abs(rewards[0][-1]) > 1e-3


def test_an_adapter_that_changed_is_another_start(project: Project, finished: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(finished, tmp_path / "copied"))
    options = ["--adapter_path", str(copied), "--output_dir", str(tmp_path / "run")]
    before = build(project.dpo_argv(tmp_path / "run", *options), method="dpo").identity()
    weights = load_file(copied / "adapter_model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, copied / "adapter_model.safetensors")
    after = build(project.dpo_argv(tmp_path / "run", *options), method="dpo").identity()
    assert [name for name in before if before[name] != after[name]] == ["adapter"]


def test_a_fresh_start_among_checkpoints(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the same run go, since transformers would keep the highest numbers; those of another run stay."""
    argv = project.argv(tmp_path / "run", "--init", "random_basis", "--max_steps", "8")
    align.main("sft", argv)
    (tmp_path / "run" / "adapter_model.safetensors").unlink()  # so that the run is not finished
    align.main("sft", [*argv, "--max_steps", "4"])
    assert "of the same run are deleted" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    subspace = (tmp_path / "run" / "subspace" / "subspace.safetensors").read_bytes()
    another = [*argv, "--learning_rate", "0.02", "--seed", "5"]
    with pytest.raises(
        InputError, match=r"holds another run \(different: data, held_out, learning_rate \(0.01, now 0.02\), seed"
    ):
        align.main("sft", another)
    for name in ("run.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(InputError, match="has checkpoints of another run, such as checkpoint-"):
        align.main("sft", [*argv, "--learning_rate", "0.02"])
    assert (tmp_path / "run" / "checkpoint-4" / "run.json").exists()
    assert (tmp_path / "run" / "subspace" / "subspace.safetensors").read_bytes() == subspace
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(InputError, match="which is not finished, such as checkpoint-4"):
        align.main("sft", argv)


def test_a_run_that_has_all_its_steps_is_not_trained_further(project: Project, tmp_path: Path) -> None:
    argv = project.argv(tmp_path / "run", "--init", "default", "--lr_scheduler_type", "constant")
    align.main("sft", argv)
    before = load_file(tmp_path / "run" / "adapter_model.safetensors")
    align.main("sft", [*argv, "--resume_from_checkpoint", "true"])
    assert distance(load_file(tmp_path / "run" / "adapter_model.safetensors"), before) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_that_is_not_there(project: Project, finished: Path) -> None:
    """Also of a finished run, of which nothing would be done."""
    argv = project.argv(finished, "--resume_from_checkpoint", str(finished / "checkpoint-9"))
    with pytest.raises(InputError, match=r"cannot resume from .*checkpoint-9: there is no such folder.*\ngive a check"):
        align.main("sft", argv)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "run.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "zeros"])
def test_a_damaged_checkpoint_is_passed_over(
    project: Project, tmp_path: Path, finished: Path, name: str, damage: str
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = run / "checkpoint-6" / name
    size = path.stat().st_size
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else bytes(size))
    built = build([*project.argv(run), "--resume_from_checkpoint", "true"])
    assert find_checkpoint(built.args.training, built.identity()) == str(run / "checkpoint-4")
    built = build([*project.argv(run), "--resume_from_checkpoint", str(run / "checkpoint-6")])
    with pytest.raises(InputError, match="it is not a complete checkpoint"):
        find_checkpoint(built.args.training, built.identity())


def kill(argv: list[str], ready: Callable[[], bool]) -> None:
    """Start the recipe in a process of its own, and kill it when something has happened."""
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "sft_sails.py"), *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + PATIENCE
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between checkpoints", "while one is written"])
def test_killed_and_resumed_is_as_uninterrupted(project: Project, finished: Path, tmp_path: Path, moment: str) -> None:
    common = ["--subspace_path", str(finished / "subspace"), "--lora_dropout", "0.1"]
    common += ["--max_steps", "60", "--save_steps", "7", "--logging_steps", "5"]
    align.main("sft", project.argv(tmp_path / "whole", *common))
    run = tmp_path / "killed"
    argv = project.argv(run, *common)
    third = run / "checkpoint-21"
    if moment == "between checkpoints":
        kill(argv, (third / "run.json").exists)
    else:
        kill(argv, third.exists)
        (third / "run.json").unlink(missing_ok=True)  # had it been quicker than we
        (third / "adapter_model.safetensors").write_bytes(b"half")
    assert not (run / "adapter_model.safetensors").exists()
    align.main("sft", [*argv, "--resume_from_checkpoint", "true"])
    files = [load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "whole")]
    assert distance(*files) < 1e-6
    losses = [json.loads((folder / "metrics.json").read_text())["trained"] for folder in (run, tmp_path / "whole")]
    assert losses[0]["held_out_loss"] == pytest.approx(losses[1]["held_out_loss"], abs=1e-6)
    history = json.loads((run / "checkpoint-56" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == list(range(5, 56, 5))  # none twice, none left out


@pytest.mark.slow
def test_killed_ten_times_and_resumed_is_as_uninterrupted(project: Project, finished: Path, tmp_path: Path) -> None:
    common = ["--subspace_path", str(finished / "subspace"), "--lora_dropout", "0.1", "--eval_examples", "1"]
    common += ["--max_steps", "60", "--save_steps", "3", "--logging_steps", "1"]
    align.main("sft", project.argv(tmp_path / "whole", *common))
    chance = random.Random(0)
    moments = [(step, chance.uniform(0, 0.03)) for step in sorted(chance.sample(range(1, 55), 10))]
    run = tmp_path / "killed"
    options = project.argv(run, *common, "--resume_from_checkpoint", "true")
    command = [sys.executable, str(TESTS / "kill_points.py"), str(tmp_path), json.dumps(moments), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed_at = json.loads(done.stdout.splitlines()[-1])
    assert len(resumed_at) == 11
    assert resumed_at == sorted(resumed_at)
    assert len(set(resumed_at)) > 5
    files = [load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "whole")]
    assert distance(*files) < 1e-6
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "whole")]
    assert metrics[0]["base"] == metrics[1]["base"]  # measured by a process that was killed
    history = json.loads((run / "checkpoint-60" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == list(range(1, 61))


def test_a_finished_run_stays_as_it_is(project: Project, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    metrics = align.main("sft", project.argv(run, "--resume_from_checkpoint", "true"))
    files = [load_file(folder / "adapter_model.safetensors") for folder in (run, finished)]
    assert distance(*files) == 0
    assert metrics["trained"] == json.loads((finished / "metrics.json").read_text())["trained"]


def test_nothing_to_resume_is_a_fresh_start(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = project.argv(tmp_path / "run", "--init", "random_basis")
    resumed = build([*argv, "--resume_from_checkpoint", "true"])
    assert find_checkpoint(resumed.args.training, resumed.identity()) is None
    assert "no complete checkpoint" in capsys.readouterr().err
    assert find_checkpoint(build(argv).args.training, resumed.identity()) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--learning_rate", "0.02"], "learning_rate"),
        (["--lora_r", "2", "--seed", "3"], "subspace, lora_r, seed"),
        (["--helpful_ratio", "0.5"], "data"),
        (["--subspace_mode", "freeze"], "subspace_mode"),
    ],
)
def test_a_checkpoint_of_another_run(
    project: Project, finished: Path, tmp_path: Path, change: list[str], named: str
) -> None:
    other = build(project.argv(tmp_path, *change, "--resume_from_checkpoint", str(finished / "checkpoint-6")))
    with pytest.raises(InputError, match="is of another run") as refused:
        find_checkpoint(other.args.training, other.identity())
    differing = str(refused.value).partition("(different: ")[2]
    assert all(name in differing for name in named.split(", "))
    assert not any(name in differing for name in ("model", "init", "lora_target_modules", "max_length"))
    same = build(project.argv(tmp_path / "same", "--resume_from_checkpoint", str(finished / "checkpoint-6")))
    assert find_checkpoint(same.args.training, same.identity()) == str(finished / "checkpoint-6")
