"""Two processes on the CPU (gloo): the same run as one process's, under every engine, killed or not."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from paths import ROOT
from peft import PeftModel
from processes import PATIENCE
from safetensors.torch import load_file, save_file
from tiny import Project, base_logits, distance, logits
from transformers import AutoModelForCausalLM
from warm import Warm

from sails_align.subspace.basis import Subspace
from sails_align.subspace.options import Method
from sails_align.training import run as align

ACCELERATE = Path(sys.executable).with_name("accelerate")
ENGINES = {
    "ddp": "multi_gpu.yaml",
    "zero1": "zero1.yaml",
    "zero2": "zero2.yaml",
    "zero3": "zero3.yaml",
    "fsdp": "fsdp2.yaml",
}
# Sums over two halves of a batch round differently from one over the whole; ZeRO-3 also adds up in other buffers.
LOSS_TOLERANCE = {"ddp": 1e-5, "zero1": 1e-5, "zero2": 1e-5, "zero3": 1e-4, "fsdp": 1e-5}
WEIGHT_TOLERANCE = {"ddp": 1e-4, "zero1": 1e-4, "zero2": 1e-4, "zero3": 1e-3, "fsdp": 1e-4}
# Logits move ten times as far as weights do; how sums are rounded, and so how far, depends on the processor.
LOGIT_TOLERANCE = {"ddp": 3e-4, "zero1": 3e-4, "zero2": 3e-4, "zero3": 1e-3, "fsdp": 3e-4}
MODES = {"sft": ["--subspace_mode", "freeze"], "dpo": ["--gradient_checkpointing", "true"]}
N_STEPS = 8

pytestmark = pytest.mark.distributed


def command(engine: str, *words: object) -> list[str]:
    config = ROOT / "accelerate_configs" / ENGINES[engine]
    launch = [ACCELERATE, "launch", "--config_file", config, "--num_processes", 2, "--main_process_port", 0]
    return [str(word) for word in (*launch, *words)]


def options(project: Project, folder: Path, method: str, batch: int) -> list[str]:
    """A short run in which every step is logged, on batches of four examples in all."""
    more = ["--max_steps", str(N_STEPS), "--logging_steps", "1", "--save_steps", "3", "--save_total_limit", "9"]
    more += ["--per_device_train_batch_size", str(batch), "--lora_dropout", "0", *MODES[method]]
    return project.dpo_argv(folder, *more)


def caches(project: Project) -> dict[str, str]:
    return {"HF_DATASETS_CACHE": str(project.folder / "cache")}


def environment(project: Project) -> dict[str, str]:
    return {**os.environ, **caches(project)}


@pytest.fixture(scope="module")
def single(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run in one process."""

    @cache
    def run(method: str) -> Path:
        folder = tmp_path_factory.mktemp("single") / method
        align.main(method, options(project, folder, method, 4))  # pyright: ignore[reportArgumentType]
        return folder

    return run


@pytest.fixture(scope="module")
def double(
    project: Project, warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, dict]]:
    """The folder of the run in two processes, and what was watched."""

    @cache
    def run(engine: str, method: str) -> tuple[Path, dict]:
        watched = tmp_path_factory.mktemp(f"{engine}-{method}")
        words = ["tests/watched_run.py", method, watched, *options(project, watched / "run", method, 2)]
        done = warm.run(command(engine, *words), variables=caches(project))
        assert done.returncode == 0, done.stderr[-3000:]
        return watched / "run", json.loads((watched / "watched.json").read_text())

    return run


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def losses_of(folder: Path) -> dict[int, float]:
    history = read(folder / "checkpoint-6", "trainer_state.json")["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_as_one(
    project: Project, single: Callable[[str], Path], double: Callable[[str, str], tuple[Path, dict]],
    engine: str, method: str,
) -> None:  # fmt: skip
    alone, (run, watched) = single(method), double(engine, method)
    identity = read(run, "run.json")["identity"]
    assert (identity["engine"], identity["n_processes"]) == (engine, 2)
    assert watched["in_parts"] == (engine == "fsdp")
    start = load_file(run.parent / "start.safetensors")
    assert torch.equal(start["own"], start["base"])
    torch.testing.assert_close(start["base"], base_logits(project), atol=1e-6, rtol=1e-6)
    expected = losses_of(alone)
    assert len(expected) == 6
    for step, loss in expected.items():
        assert watched["losses"][str(step)]["loss"] == pytest.approx(loss, abs=LOSS_TOLERANCE[engine])
    assert max(expected.values()) - min(expected.values()) > 0.01  # there is something to tell apart
    for part in ("", "checkpoint-6"):
        ours, theirs = (load_file(folder / part / "adapter_model.safetensors") for folder in (run, alone))
        assert all(value.numel() for value in ours.values())
        assert distance(ours, theirs) < WEIGHT_TOLERANCE[engine]
    reloaded = []
    for folder in (run, alone):
        base = AutoModelForCausalLM.from_pretrained(project.folder / "tiny")
        reloaded.append(logits(PeftModel.from_pretrained(base, str(folder))))
    torch.testing.assert_close(*reloaded, atol=LOGIT_TOLERANCE[engine], rtol=LOGIT_TOLERANCE[engine])
    assert not torch.allclose(reloaded[0], start["base"], atol=1e-3)
    for name in ("base", "trained"):
        ours, theirs = (read(folder, "metrics.json")[name]["held_out_loss"] for folder in (run, alone))
        assert ours == pytest.approx(theirs, abs=LOSS_TOLERANCE[engine])
    for name in ("adapter_energy_inside", "adapter_update_norm"):
        last = read(alone / "checkpoint-6", "trainer_state.json")["log_history"][-1][name]
        assert watched["losses"]["6"][name] == pytest.approx(last, abs=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_discovery_is_shared_and_its_result_is_that_of_one_process(
    single: Callable[[str], Path], double: Callable[[str, str], tuple[Path, dict]], engine: str
) -> None:
    alone, (run, watched) = single("sft"), double(engine, "sft")
    assert watched["discovery_is_whole"]
    ours, theirs = (Subspace.load(folder / "subspace") for folder in (run, alone))
    features = [subspace.provenance["features"]["layers"] for subspace in (ours, theirs)]
    assert ours.bases.keys() == theirs.bases.keys()
    for layer, basis_DR in theirs.bases.items():
        assert features[0][str(layer)]["ids"] == features[1][str(layer)]["ids"]
        torch.testing.assert_close(ours.bases[layer], basis_DR, atol=1e-4, rtol=1e-4)
    assert {path.name for path in (run / "subspace").iterdir()} == {"subspace.safetensors", "subspace.json"}
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def kill_at(step: int, words: list[str], watched: Path, environment: dict[str, str]) -> None:
    """Start a launch and kill all of it, with SIGKILL, once the step has begun."""
    (watched / "step").unlink(missing_ok=True)
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if (watched / "step").exists() and int((watched / "step").read_text() or -1) >= step:
            break
        time.sleep(0.002)
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for worker in workers:  # which would outlive it
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr.decode()[-3000:]


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("ddp", "zero3"))]
)
def test_killed_twice_and_resumed_is_as_uninterrupted(
    project: Project, warm: Warm, double: Callable[[str, str], tuple[Path, dict]], tmp_path: Path, engine: str
) -> None:
    whole, _ = double(engine, "sft")
    run = tmp_path / "run"
    words = ["tests/watched_run.py", "sft", tmp_path, *options(project, run, "sft", 2)]
    words = command(engine, *words, "--resume_from_checkpoint", "true", "--subspace_path", whole / "subspace")
    steps = sorted(random.Random(engine).sample(range(3, N_STEPS), 2))  # there is a checkpoint by then
    for step in steps:
        kill_at(step, words, tmp_path, {**environment(project), "PAUSE": "0.3"})
    assert not (run / "adapter_model.safetensors").exists()
    done = warm.run(words, variables=caches(project))
    assert done.returncode == 0, done.stderr[-3000:]
    watched = read(tmp_path, "watched.json")
    assert watched["start_step"] == 3 * (steps[-1] // 3)
    # What was trained by then is there, and not what the initialization wrote.
    saved = load_file(run / f"checkpoint-{watched['start_step']}" / "adapter_model.safetensors")
    total = sum(value.double().abs().sum().item() for value in saved.values())
    assert sum(watched["adapter_at_start"]) == pytest.approx(total, rel=1e-5)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (run, whole)]
    assert distance(*adapters) < WEIGHT_TOLERANCE[engine]


def test_precomputed_references_are_those_of_this_run(project: Project, warm: Warm, tmp_path: Path) -> None:
    """ZeRO-3 with DPO's reference computed beforehand: a second run in the folder has another base."""
    other = Path(shutil.copytree(project.folder / "tiny", tmp_path / "tiny"))
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(0)
    changed = {name: value + 0.05 * torch.randn_like(value) for name, value in weights.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    for model in (project.folder / "tiny", other):
        run = tmp_path / "run"
        argv = [*options(project, run, "dpo", 2), "--precompute_ref_log_probs", "true", "--max_steps", "2"]
        argv += ["--model_name_or_path", str(model), "--subspace_mode", "freeze", "--save_strategy", "no"]
        argv += ["--overwrite_output_dir", "true"]  # else the second run would be refused as another one
        done = warm.run(command("zero3", "tests/watched_run.py", "dpo", tmp_path, *argv), variables=caches(project))
        assert done.returncode == 0, done.stderr[-3000:]
        row = read(tmp_path, "watched.json")["losses"]["1"]
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(row["rewards/chosen"]) < 1e-4
        assert not (run / ".pairs").exists()


@pytest.mark.parametrize(
    ("engine", "method", "more"),
    [
        ("zero2", "dpo", ["--use_peft", "false"]),
        ("zero3", "sft", ["--use_peft", "false"]),
        ("zero3", "dpo", ["--adapter_path"]),
        ("ddp", "dpo", ["--init", "pissa"]),
        ("ddp", "dpo", ["--init", "guardspace"]),
        ("zero2", "sft", ["--init", "sc_lora"]),
    ],
)
def test_other_starts_are_as_in_one_process(
    project: Project,
    single: Callable[[str], Path],
    warm: Warm,
    tmp_path: Path,
    engine: str,
    method: Method,
    more: list[str],
) -> None:
    more = [*more, str(single("sft"))] if more == ["--adapter_path"] else more
    more = [*more, "--learning_rate", "0.002", "--save_strategy", "no"]
    align.main(method, [*options(project, tmp_path / "alone", method, 4), *more])
    words = ["tests/watched_run.py", method, tmp_path, *options(project, tmp_path / "run", method, 2), *more]
    done = warm.run(command(engine, *words), variables=caches(project))
    assert done.returncode == 0, done.stderr[-3000:]
    name = "model.safetensors" if "--use_peft" in more else "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / folder / name) for folder in ("run", "alone"))
    common = ours.keys() & theirs.keys()  # DeepSpeed writes a tied head as well
    assert common == theirs.keys()
    assert distance({key: ours[key] for key in common}, theirs) < WEIGHT_TOLERANCE[engine]
    if method == "dpo":
        first = read(tmp_path, "watched.json")["losses"]["1"]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


FIRST_TOKENS = ("--loss", "first_tokens", "--first_tokens", "2", "--first_tokens_weight", "4")
REDIRECTION = ("--loss", "redirection", "--redirection_weight", "5")
REDUNDANCY = ("--loss", "redundancy", "--redundancy_form", "weights", "--redundancy_weight", "1")
CONSTRAINED = ("--loss", "constrained", "--constrained_first_betas", "40", "40")


@pytest.mark.parametrize(
    ("engine", "batch", "accumulation", "loss"),
    [
        ("ddp", 2, 1, FIRST_TOKENS),
        ("ddp", 1, 2, FIRST_TOKENS),
        ("zero2", 2, 1, FIRST_TOKENS),
        ("ddp", 1, 2, CONSTRAINED),
        ("ddp", 1, 2, REDIRECTION),
        ("ddp", 2, 1, REDUNDANCY),
    ],
)
def test_composed_losses_have_the_loss_and_gradients_of_one_process(
    project: Project, warm: Warm, tmp_path: Path, engine: str, batch: int, accumulation: int, loss: tuple[str, ...]
) -> None:
    """On the same global batch. Responses differ in length, so that a mean of the processes' means would be another.

    A step of plain SGD is the gradient: weights that agree after two steps have had the same gradients.
    """
    sgd = ["--optim", "sgd", "--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
    sgd += ["--max_grad_norm", "0", "--max_steps", "2", "--save_steps", "2", "--init", "default"]
    alone: dict[str, Any] = {}
    for name, more in {"weighted": loss, "plain": ()}.items():
        align.main("sft", [*options(project, tmp_path / name, "sft", 4), *sgd, *more])
        history = read(tmp_path / name / "checkpoint-2", "trainer_state.json")["log_history"]
        rows = [row for row in history if "loss" in row]
        alone[name] = rows, load_file(tmp_path / name / "adapter_model.safetensors")
    words = ["tests/watched_run.py", "sft", tmp_path, *options(project, tmp_path / "run", "sft", batch), *sgd, *loss]
    done = warm.run(command(engine, *words, "--gradient_accumulation_steps", accumulation), variables=caches(project))
    assert done.returncode == 0, done.stderr[-3000:]
    watched, weights = read(tmp_path, "watched.json")["losses"], load_file(tmp_path / "run/adapter_model.safetensors")
    rows, expected = alone["weighted"]
    for row in rows:
        of_both = watched[str(row["step"])]
        assert of_both["loss"] == pytest.approx(row["loss"], abs=LOSS_TOLERANCE[engine])
        assert of_both["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert distance(weights, expected) < WEIGHT_TOLERANCE[engine]
    assert distance(weights, alone["plain"][1]) > 100 * WEIGHT_TOLERANCE[engine]  # there is something to tell apart


# Failures


def launched(project: Project, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("ddp", *words), cwd=ROOT, env=environment(project), capture_output=True, text=True, timeout=PATIENCE
    )


def test_what_no_process_can_use_is_said_once(project: Project, tmp_path: Path) -> None:
    done = launched(project, "recipes/sft_sails.py", *project.argv(tmp_path / "run", "--lora_r", "999"))
    assert done.returncode != 0
    assert done.stderr.count("error: lora_r is 999, but") == 1
    assert not (tmp_path / "run").exists()


def test_a_failing_process_ends_the_others(project: Project, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import os, time\n"
        "from sails_align.core.errors import InputError, exit_on_input_error\n"
        "with exit_on_input_error():\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise InputError('the disk of this machine is full')\n"
        "    time.sleep(3600)\n"
    )
    done = launched(project, tmp_path / "fails.py")
    assert done.returncode != 0
    assert done.stderr.count("error: the disk of this machine is full") == 1
    assert re.search(r"exitcode\s*: 2\b", done.stderr)


def test_a_killed_process_ends_the_others(project: Project, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(3600)\n"
    )
    done = launched(project, tmp_path / "dies.py")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr


@pytest.mark.slow
def test_two_launches_do_not_share_a_folder(project: Project, tmp_path: Path) -> None:
    """Workers outlive a launcher that is killed; a second launch must not write where they still do."""
    run = tmp_path / "run"
    words = command(
        "ddp", "tests/watched_run.py", "sft", tmp_path, *options(project, run, "sft", 2), "--max_steps", 100_000
    )
    process = subprocess.Popen(words, cwd=ROOT, env=environment(project), stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "step").exists():
            assert time.monotonic() < deadline, "the run does not start"
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        done = launched(project, "recipes/sft_sails.py", *options(project, run, "sft", 2))
        assert done.stderr.count("another process is at work in") == 1
        assert all(worker.is_running() for worker in workers)
    finally:
        for worker in workers:
            worker.kill()
        process.wait()


def test_checkpoints_of_another_engine_are_refused(
    project: Project, warm: Warm, double: Callable[[str, str], tuple[Path, dict]], tmp_path: Path
) -> None:
    run, _ = double("zero2", "sft")
    copied = Path(shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3"))
    argv = [*options(project, tmp_path / "run", "sft", 2), "--resume_from_checkpoint", str(copied)]
    done = warm.run(
        command("ddp", "recipes/sft_sails.py", *argv, "--subspace_path", run / "subspace"), variables=caches(project)
    )
    assert done.stderr.count("is of another run (different: engine)") == 1
