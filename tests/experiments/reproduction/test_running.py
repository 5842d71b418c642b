"""The driver itself, from the first step to the table, on the testbed's model: its steps are real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from paths import ROOT
from processes import PATIENCE, is_at_work
from small_comparison import write_comparison

from sails_align.cli.reproduce import main
from sails_align.core.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With compare.yaml: the base and an adapter, few prompts."""
    folder = write_comparison(tmp_path_factory.mktemp("reproduction"))
    values = yaml.safe_load((folder / "compare.yaml").read_text())
    values["evaluate"]["test"] = {"safety": {**values["evaluate"]["test"]["safety"], "n_prompts": 2}}
    values["runs"]["sft-sails"]["options"] = {"learning_rate": 0.01}
    values["runs"]["sft-sails"]["tuned"] = False
    (folder / "compare.yaml").write_text(yaml.safe_dump(values))
    return folder


def command(folder: Path, *options: str) -> list[str]:
    words = [sys.executable, "recipes/reproduce.py", "--model", str(folder / "compare.yaml"), "--num_gpus", "0"]
    return [*words, "--output_dir", str(folder / "run"), *options]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *options), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_the_dry_run_runs_nothing(folder: Path) -> None:
    done = run(folder, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# train/sft-sails\nsails train sft --config" in done.stdout
    assert "0 failed" in done.stdout
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_from_the_first_step_to_the_table(folder: Path) -> None:
    """Killed while it trains; started again it goes on, and a third time does nothing."""
    log, done = folder / "run" / "logs" / "train.sft-sails.log", folder / "run" / "done"
    process = subprocess.Popen(command(folder, "--skip_checks"), cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + PATIENCE
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in done.iterdir()] == ["discover.sails.json"]
    second = run(folder, "--skip_checks")
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-2000:]
    assert "discover/sails: done before" in second.stdout
    table = (folder / "run" / "table.md").read_text()
    assert table in second.stdout
    safety = json.loads((folder / "run" / "evaluated" / "sft-sails" / "safety" / "metrics.json").read_text())
    gcg = json.loads((folder / "run" / "evaluated" / "sft-sails" / "gcg" / "metrics.json").read_text())
    row = next(line for line in table.splitlines() if line.startswith("| SFT-SAILS |"))
    assert f"| {100 * safety['by_split']['harmful']['safety_rate']['value']:.1f} (" in row
    assert f"| {100 * gcg['attacks']['gcg']['attack_success_rate']['value']:.1f} (" in row
    third = run(folder, "--skip_checks")
    assert third.stdout.count("done before") == len(list(done.iterdir()))
    assert "finished" not in third.stdout


@pytest.mark.slow
def test_a_step_that_fails_stops_the_rest_and_says_why(folder: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((folder / "compare.yaml").read_text())
    values["runs"]["gone"] = {"model": str(tmp_path / "gone")}
    (tmp_path / "gone").mkdir()  # which holds no model
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    done = run(tmp_path, "--skip_checks", "--steps", "evaluate/gone", "attack/gone")
    assert done.returncode == 1
    assert "evaluate/gone/safety: FAILED with exit code 2" in done.stdout
    assert "attack/gone" not in done.stdout.partition("FAILED")[2]
    assert not (tmp_path / "run" / "done").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--model", "gemma-2-90b"],
            "model is 'gemma-2-90b'; did you mean 'gemma-2-9b'?\ngive one of gemma-2-2b, gemma-2-9b",
        ),
        (["--model", "gemma-2-9b", "--num_gpus", "-1"], "num_gpus is -1; choose 0 or more"),
        (["--model", "gemma-2-9b", "--steps", "trian"], "no step is named trian"),
        (["--model", "gemma-2-9b", "--dry"], "unknown option '--dry' on the command line; did you mean --dry_run?"),
        (["--model", "x" * 500], "give one of gemma-2-2b"),
    ],
)
def test_bad_options(options: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as refused:
        main([*options, "--skip_checks"])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value"), [("HF_ENDPOINT", "http://user:s3cret@[::1"), ("HTTPS_PROXY", "foo://user:s3cret@there")]
)
def test_an_endpoint_or_proxy_that_is_none(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="correct HF_ENDPOINT, or the proxy") as refused:
        main(["--model", "gemma-2-9b"])
    assert "s3cret" not in str(refused.value)


@pytest.mark.slow
def test_a_terminated_run_ends_its_commands(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([*command(folder, "--skip_checks"), "--output_dir", str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + PATIENCE
    while not (started := psutil.Process(process.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert started
    assert not any(map(is_at_work, started))
    assert not (tmp_path / ".lock").exists()


@pytest.mark.slow
def test_what_was_measured_on_another_training_is_measured_again(folder: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((folder / "compare.yaml").read_text())
    only = ("--skip_checks", "--steps", "discover", "train", "evaluate/sft-sails")
    values["runs"]["sft-sails"]["options"]["max_steps"] = 1
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    assert run(tmp_path, *only).returncode == 0
    values["runs"]["sft-sails"]["options"]["max_steps"] = 2
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    refused = run(tmp_path, *only)
    assert refused.returncode == 2
    assert "holds other results (different: discover/sails, train/sft-sails);" in refused.stderr
    again = run(tmp_path, *only, "--overwrite_output_dir", "true").stdout
    assert "discover/sails: finished" in again or "discover/sails: done before" in again
    assert "evaluate/sft-sails/safety: finished" in again
