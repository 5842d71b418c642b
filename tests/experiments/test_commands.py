"""A comparison of models that are no testbed, end to end: cells are jobs of their own, and what they give is gathered.

The model is the testbed's, but named as any other is: by its folder, its SAEs' and files of preference pairs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import PATIENCE
from small_comparison import evaluation, write_comparison

from sails_align.cli import compare as comparing
from sails_align.core.errors import InputError
from sails_align.core.files import write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("models"))


def compare(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sails_align", "compare", "--config", str(folder / "compare.yaml"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """Both cells of the adapter as jobs of their own, the rest by the gathering command."""
    names = compare(folder, "--list_cells", "true").stdout.split()
    assert names == ["validation/sft-sails/0.01/1000", "test/base/0", "test/sft-sails/0"]
    early = compare(folder, "--cell", "test/sft-sails/0")
    assert early.returncode == 2
    assert "1 of 1 results are missing, such as of validation/sft-sails/0.01/1000" in early.stderr
    for name in (names[0], names[2]):
        done = compare(folder, "--cell", name)
        assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "run" / "report.md").exists()
    with pytest.raises(InputError, match=r"1 of 2 results are missing, such as of test/base/0"):
        comparing.report_main(["--output_dir", str(folder / "run")])
    before = sorted((folder / "run" / "cells").iterdir())
    done = compare(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(sorted((folder / "run" / "cells").iterdir())) == len(before) + 1
    return folder / "run"


@pytest.mark.slow
def test_models_of_the_test_part_are_kept_and_were_measured(finished: Path) -> None:
    (kept,) = finished.glob("models/*/train/adapter_model.safetensors")
    (evaluated,) = kept.parents[1].glob("sft-sails-*")
    safety = json.loads((evaluated / "safety" / "metrics.json").read_text())
    values = json.loads((finished / "results.json").read_text())
    base, sails = values["rows"]
    assert (
        sails["means"]["safety_rate_out_of_distribution"]["value"] == safety["by_split"]["ood"]["safety_rate"]["value"]
    )
    assert (
        sails["means"]["safety_rate_in_distribution"]["value"] > base["means"]["safety_rate_in_distribution"]["value"]
    )
    assert base["means"]["correct_answer_rate"]["value"] == 1.0
    assert sails["means"]["capability"]["value"] is not None
    assert sails["means"]["trainable_share"]["value"] > 0
    assert values["command"] == f"sails compare --config {finished.parent / 'compare.yaml'}"


@pytest.mark.slow
def test_the_report_tells_what_was_measured_and_nothing_else(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    assert text.startswith("# Comparison of alignment methods on my/model\n")
    for words in ("What the features mean", "sails eval safety (test): --prompts testbed --part test", "By category"):
        assert words in text
    for words in ("GCG", "after benign training", "None", "the world"):
        assert words not in text
    again = comparing.report_main(["--output_dir", str(finished)])
    assert again["rows"] == json.loads((finished / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_a_command_that_fails_is_told_with_what_it_printed(folder: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((folder / "compare.yaml").read_text())
    (tmp_path / "gone").mkdir()  # which holds no model
    values["runs"] = {"gone": {"model": str(tmp_path / "gone")}}
    values |= {"learning_rates": [0.1], "output_dir": str(tmp_path / "run")}
    write_text(tmp_path / "compare.yaml", yaml.safe_dump(values))
    done = compare(tmp_path)
    assert done.returncode == 1
    assert "1 trainings failed; the results of the others are kept" in done.stderr
    assert str(tmp_path / "gone") in done.stderr
    assert "failed with exit code 2" in done.stderr


@pytest.mark.slow
def test_a_killed_cell_goes_on_with_its_training(folder: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((folder / "compare.yaml").read_text())
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 20, "num_train_epochs": 8}
    recipe = {"train": "sft", "config": str(folder / "sails.yaml"), "options": {**saving, "learning_rate": 0.01}}
    values["runs"] = {"sft-sails": {**recipe, "tuned": False}}
    values["evaluate"]["test"] = evaluation("test")
    write_text(tmp_path / "compare.yaml", yaml.safe_dump({**values, "output_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "sails_align", "compare", "--config", str(tmp_path / "compare.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end, checkpoint = time.monotonic() + 200, "run/models/*/train/checkpoint-4/run.json"
    while not (written := list(tmp_path.glob(checkpoint))):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("run/models/*/train/metrics.json"))
    seen = {written[0].stat().st_mtime_ns}
    again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while again.poll() is None:
        seen |= {path.stat().st_mtime_ns for path in written if path.exists()}
        time.sleep(0.05)
    assert again.returncode == 0, again.stderr and again.stderr.read()[-3000:]
    assert len(seen) == 1  # the first steps were not made again
    assert list(tmp_path.glob("run/models/*/train/metrics.json"))
    assert not written[0].exists()  # checkpoints of what has been measured go
