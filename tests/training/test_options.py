"""Options that contradict each other, or what the weights are held by."""

from pathlib import Path

import pytest
from tiny import Project

from sails_align.core.distributed import check_devices
from sails_align.core.errors import InputError
from sails_align.subspace.options import Method
from sails_align.training import run as align
from sails_align.training.losses import LOSSES
from sails_align.training.plan import TrainingPlan


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ([], "sails"),
        (["--init", "eva"], "eva"),
        (["--use_peft", "false"], "full"),
        (["--adapter_path", "runs/x"], "adapter"),
    ],
)
def test_start(project: Project, tmp_path: Path, options: list[str], start: str) -> None:
    args = align.parse("dpo", project.argv(tmp_path, *options))
    assert args.start == start
    assert args.engine == "single"
    assert args.sails.uses_subspace == (start == "sails")


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sft", ["--use_peft", "false", "--init", "sails"], "--use_peft false trains all weights"),
        ("dpo", ["--use_peft", "false", "--adapter_path", "x"], "--adapter_path is given"),
        ("sft", ["--adapter_path", "x", "--init", "default"], "--adapter_path and --init are both given"),
        ("sft", ["--subspace_path", "x", "--init", "pissa"], "--subspace_path is given, but pissa uses no subspace"),
        ("dpo", ["--sync_ref_model", "true"], "cannot be resumed without loss"),
        ("sft", ["--save_only_model"], "cannot be resumed without loss"),
        ("sft", ["--init", "lora"], "init is 'lora', which is not one of: sails, random_basis"),
        ("sft", ["--ref_model_name_or_path", "x"], "unknown option '--ref_model_name_or_path'"),
        ("sft", ["--ema_half_life", "0"], "ema_half_life is 0.0; choose a value above 0"),
        (
            "dpo",
            [
                "--ema_half_life",
                "4",
                "--load_best_model_at_end",
                "true",
                "--eval_strategy",
                "steps",
                "--eval_steps",
                "2",
            ],
            "with ema_half_life the result is the average",
        ),
        ("dpo", ["--save_total_limit", "1"], "choose 2 or more"),
        ("sft", ["--max_steps", "0"], "which trains nothing"),
        ("sft", ["--num_train_epochs", "-1"], "num_train_epochs is -1.0, but must be a positive number"),
        ("sft", ["--learning_rate", "nan"], "learning_rate is nan"),
        ("sft", ["--lora_r", "0"], "lora_r is 0, but must be 1 or more"),
        ("sft", ["--max_length", "-5"], "max_length is -5"),
        ("dpo", ["--beta", "0"], "beta is 0.0"),
        ("dpo", ["--seed", "-1"], "seed is -1"),
        ("sft", ["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
    ],
)
def test_contradictions(project: Project, tmp_path: Path, method: Method, options: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        align.parse(method, project.argv(tmp_path, *options))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (["--init", "default", "--subspace_mode", "freeze"], "with default: top_k, subspace_mode"),
        (["--use_peft", "false"], "with full: top_k, lora_r"),
        (["--adapter_path", "x", "--lora_dropout", "0.1"], "with adapter: top_k, lora_r, lora_dropout"),
        (["--use_peft"], ""),
    ],
)
def test_options_of_no_effect_are_told(
    project: Project, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: list[str], ignored: str
) -> None:
    align.parse("sft", project.argv(tmp_path, *options))
    assert ignored in caplog.text
    assert ("of no effect" in caplog.text) == bool(ignored)


DIVIDED = ("zero1", "zero2", "zero3", "fsdp")
"""Engines in which a process has a part of what is trained."""


@pytest.mark.parametrize(
    ("options", "engines", "said"),
    [
        (["--init", "pissa"], ("zero3", "fsdp"), "computed from whole weights"),
        (["--init", "eva"], ("zero3", "fsdp"), "use ZeRO-2 or DDP"),
        (["--init", "olora"], ("zero3", "fsdp"), "computed from whole weights"),
        (["--init", "guardspace"], ("zero3", "fsdp"), "but .* splits them"),
        (["--init", "sc_lora"], ("zero3", "fsdp"), "computed from whole weights"),
        (["--subspace_mode", "decay"], DIVIDED, "decay does not work with"),
        (["--ema_half_life", "9"], DIVIDED, "ema_half_life does not work with"),
        (["--measure_steps", "2"], DIVIDED, "cannot be measured before it is saved"),
        (["--freeze_units", "x"], DIVIDED, "freeze_units does not work with"),
        (["--sift_rate", "0.1", "--use_peft", "false"], DIVIDED, "sift_rate does not work with"),
        (["--clade", "categories", "--use_peft", "false"], DIVIDED, "clade does not work with"),
        *(
            (["--loss", name, "--init", "default"], DIVIDED, f"loss {name} does not work with")
            for name, loss in LOSSES.items()
            if loss.needs_whole_weights
        ),
    ],
)
def test_what_an_engine_cannot_do(
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    engines: tuple[str, ...],
    said: str,
) -> None:
    for engine in ("single", "ddp", "zero1", "zero2", "zero3", "fsdp"):
        monkeypatch.setattr(TrainingPlan, "engine", engine)
        if engine in engines:
            with pytest.raises(InputError, match=said):
                align.parse("sft", project.argv(tmp_path, *options))
        else:
            align.parse("sft", project.argv(tmp_path, *options))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_devices(use_cpu=False)  # no GPU at all: on the CPU any number will do
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_devices(use_cpu=True)
    with pytest.raises(InputError, match=r"8 processes are asked for.*has 2 GPU\(s\);\nlaunch with --num_processes 2"):
        check_devices(use_cpu=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    check_devices(use_cpu=False)
