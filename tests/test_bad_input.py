"""Input that cannot be used ends with a short message and exit code 2, and leaves nothing half-written behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import RECIPES

from sails_align.cli import main as sails
from sails_align.core.errors import exit_on_input_error
from sails_align.testbed.build import ASSETS, D_SAE
from sails_align.training import run as align

TESTBED = ASSETS
SHORT = ["--max_steps", "2", "--save_steps", "1", "--eval_examples", "4", "--disable_tqdm", "true"]
"""A whole run of the testbed, in a few seconds."""
CONFIG = json.loads((TESTBED / "model" / "config.json").read_text())
D_MODEL, LAST = CONFIG["hidden_size"], CONFIG["num_hidden_layers"] - 1
ROWS = [{"prompt": f"how do i mend {i}", "chosen": f"fine {i}", "rejected": f"bad {i}"} for i in range(10)]


@pytest.fixture(scope="module", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def train_sft(argv: list[str]) -> None:
    align.main("sft", argv)


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command (`sails train sft` unless it is another), which must fail; returns its message."""

    def run(*argv: object, main: Callable[[list[str]], Any] = train_sft) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, exit_on_input_error():
            main([str(word) for word in argv])
        assert ended.value.code == 2
        written = capfd.readouterr().err
        assert "Traceback" not in written
        message = "error: " + re.split(r"^error: ", written, flags=re.MULTILINE)[-1].strip()
        assert 1 <= len(message.splitlines()) <= 3, message
        return message

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    align.main("sft", [*SHORT, "--model_name_or_path", str(TESTBED), "--output_dir", str(folder)])
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def unfinished(copy: Path) -> Path:
    """The same before its last step was recorded: a finished run is not trained again."""
    (copy / "metrics.json").unlink()
    return copy


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tau", "0"], ["tau is 0.0", "(0, 1]"]),
        (["--tau", "1.5"], ["tau is 1.5", "(0, 1]"]),
        (["--tau", "half"], ["--tau", "'half'"]),
        (["--top_k", "0"], ["top_k is 0", "1 or more"]),
        (["--tua", "0.5"], ["'--tua'", "did you mean --tau?"]),
        (["--contrast", "words"], ["contrast is 'words'", "response, prompt, both"]),
        (["--subspace_path", "x", "--init", "default"], ["--subspace_path", "leave one of them out"]),
        (["stray"], ["'stray'"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file", "check the path"]),
        (["--model_name_or_path", "testbed:x"], ["testbed:x", "after the colon comes the seed", "testbed:1"]),
    ],
)
def test_options(fails, tmp_path, options, said):
    output_dir = tmp_path / "run"
    message = fails(*options, "--output_dir", output_dir)
    assert all(part in message for part in said), message
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tua: 0.5", ["'tua'", "did you mean --tau?"]),
        ("no_such_thing: 1", ["'no_such_thing'", "remove it"]),
        ("tau: 2.0", ["tau is 2.0", "(0, 1]"]),
        ("top_k: 2.5", ["top_k is 2.5", "a whole number"]),
        ("weighting: [1]", ["weighting is [1]", "true or false"]),
        ("helpful_ratio:", ["helpful_ratio is None", "a number"]),
        ("init: sals", ["init is 'sals'", "sails, random_basis", "did you mean 'sails'?"]),
        ("lr_scheduler_type: lineer", ["lr_scheduler_type is 'lineer'", "did you mean 'linear'?"]),
        ("save_strategy: epochs", ["save_strategy is 'epochs'", "did you mean 'epoch'?"]),
        ("dtype: bfloat", ["dtype is 'bfloat'", "did you mean 'bfloat16'?"]),
        ("- tau", ["not a YAML mapping", "learning_rate: 0.001"]),
        ("tau: [", ["is not YAML", "line 1"]),
    ],
)
def test_yaml(fails, tmp_path, text, said):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    message = fails("--config", path, "--output_dir", tmp_path / "run")
    assert all(part in message for part in said), message
    assert not (tmp_path / "run").exists()


# Data


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ["is empty", "give a data set that has rows"]),
        ([{"question": "a", "reply": "b"}], ["question, reply", "without responses", "--chosen_column"]),
        ([*ROWS, {**ROWS[0], "chosen": " "}], ["1 of 11 rows", "chosen is empty: 1 (row 10)", "--on_bad_rows skip"]),
        (
            [{**ROWS[0], "rejected": None}, *ROWS, {**ROWS[0], "rejected": None}],
            ["2 of 12 rows", "rejected is empty: 2 (row 0, 11)", "--on_bad_rows skip"],
        ),
        ([{**row, "prompt": 3} for row in ROWS], ["10 of 10 rows", "prompt is not a string: 10", "give other data"]),
        ([*ROWS, {**ROWS[0], "rejected": "fine 0"}], ["1 of 11 rows", "chosen and rejected are equal", "(row 10)"]),
        (ROWS[:3], ["3 usable rows", "at least 5"]),
    ],
)
def test_data(fails, tmp_path, rows, said):
    data = write_rows(tmp_path / "data.jsonl", rows)
    message = fails("--model_name_or_path", TESTBED, "--dataset_name", data, "--output_dir", tmp_path / "runs" / "one")
    assert all(part in message for part in [*said, "data.jsonl"]), message
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_missing_data(fails, tmp_path):
    options = ["--model_name_or_path", TESTBED, "--output_dir", tmp_path / "run"]
    message = fails(*options, "--dataset_name", tmp_path / "nothing.jsonl")
    assert "there is no file or folder" in message
    assert "nothing.jsonl" in message
    assert not (tmp_path / "run").exists()


def test_no_data(fails, tmp_path):
    assert "give --dataset_name" in fails("--model_name_or_path", TESTBED / "model", "--output_dir", tmp_path / "run")


# Models and SAEs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", ROWS)


def change_sae(folder: Path, **metadata: str) -> Path:
    """One of the testbed's SAEs that says something else of itself."""
    shutil.copytree(TESTBED / "saes" / "layer_1", folder)
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "metadata": {**config["metadata"], **metadata}}))
    return folder


def test_no_chat_template(fails, tmp_path, data):
    model = Path(shutil.copytree(TESTBED / "model", tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    output_dir = tmp_path / "run"
    message = fails("--model_name_or_path", model, "--dataset_name", data, "--output_dir", output_dir)
    assert "has no chat template" in message
    assert "--chat_template_path" in message
    assert not output_dir.exists()


def test_sae_of_another_model(fails, tmp_path, data):
    model = Path(shutil.copytree(TESTBED / "model", tmp_path / "little-1b"))
    sae = change_sae(tmp_path / "sae", model_name="gemma-2-2b")
    options = ["--dataset_name", data, "--output_dir", tmp_path / "run"]
    message = fails("--model_name_or_path", model, "--sae_path", sae, *options)
    assert all(part in message for part in ("gemma-2-2b", "little-1b", "--sae_allow_mismatch")), message
    assert not (tmp_path / "run").exists()


def test_sae_of_another_width(fails, tmp_path):
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(model_name="testbed", hook_name="blocks.1.hook_resid_post")
    StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, metadata=metadata)).save_model(tmp_path / "sae")
    options = ["--model_name_or_path", TESTBED, "--output_dir", tmp_path / "run"]
    message = fails(*options, "--sae_path", tmp_path / "sae")
    assert all(part in message for part in ("width is 32", f"d_model {D_MODEL}", "use an SAE of this model")), message
    assert not (tmp_path / "run").exists()


def test_sae_of_a_layer_out_of_range(fails, tmp_path):
    sae = change_sae(tmp_path / "sae", hook_name="blocks.9.hook_resid_post")
    message = fails("--model_name_or_path", TESTBED, "--sae_path", sae, "--output_dir", tmp_path / "run")
    assert all(part in message for part in ("layer 9", f"layers 0 to {LAST}", "use an SAE")), message
    assert not (tmp_path / "run").exists()


def test_train_sae_layer_out_of_range(fails, tmp_path):
    options = ["--model_name_or_path", TESTBED, "--output_dir", tmp_path / "saes"]
    message = fails("train-sae", "--layers", "9", *options, main=sails)
    assert f"layer 9 is out of range; choose 0 to {LAST}" in message
    assert not (tmp_path / "saes").exists()


def test_damaged_sae(fails, tmp_path):
    sae = Path(shutil.copytree(TESTBED / "saes" / "layer_1", tmp_path / "sae"))
    (sae / "sae_weights.safetensors").write_bytes(b"nothing")
    message = fails("--model_name_or_path", TESTBED, "--sae_path", sae, "--output_dir", tmp_path / "run")
    assert str(sae) in message


def test_rank_above_d_model(fails, tmp_path, finished):
    options = ["--model_name_or_path", TESTBED, "--lora_r", D_MODEL + 1, "--output_dir", tmp_path / "run"]
    for more in ([], ["--subspace_path", finished / "subspace"]):
        message = fails(*options, *more)
        assert all(part in message for part in (str(D_MODEL + 1), str(D_MODEL))), message
        assert not (tmp_path / "run").exists()


def test_top_k_above_d_sae(fails, tmp_path):
    message = fails("--model_name_or_path", TESTBED, "--top_k", D_SAE + 1, "--output_dir", tmp_path / "run")
    assert all(part in message for part in (f"top_k is {D_SAE + 1}", f"{D_SAE} latents", "choose")), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model_name_or_path", "someone/no-such-model"], ["someone/no-such-model", "without network"]),
        (["--model_name_or_path", TESTBED, "--dataset_name", "someone/no-data"], ["someone/no-data", "in the cache"]),
        (
            ["--model_name_or_path", TESTBED, "--sae_release", "gemma-scope-2b-pt-res-canonical", "--sae_ids",
             "layer_12/width_16k/canonical"],
            ["gemma-scope-2b-pt-res-canonical", "network access"],
        ),
    ],
)  # fmt: skip
def test_nothing_cached_and_no_network(fails, tmp_path, data, monkeypatch, options, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if "--dataset_name" not in options:
        options = [*options, "--dataset_name", data]
    message = fails(*options, "--output_dir", tmp_path / "run")
    assert all(part in message for part in said), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", [None, b"", b"nothing of the kind"])
def test_model_without_whole_weights(fails, tmp_path, data, weights):
    model = Path(shutil.copytree(TESTBED / "model", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    if weights is not None:
        (model / "model.safetensors").write_bytes(weights)
    for init in ("default", "mean_diff"):
        options = ["--init", init, "--dataset_name", data, "--output_dir", tmp_path / "run"]
        assert str(model) in fails("--model_name_or_path", model, *options)
        assert not (tmp_path / "run").exists()


# Checkpoints and artifacts


def test_checkpoint_of_another_run(fails, copy):
    before = files_in(copy)
    options = ["--model_name_or_path", TESTBED, *SHORT, "--output_dir", copy]
    message = fails(*options, "--seed", "7", "--resume_from_checkpoint", "true")
    assert all(part in message for part in ("another run", "data", "seed (42, now 7)", "--output_dir")), message
    assert files_in(copy) == before


def test_no_checkpoint(fails, unfinished):
    options = ["--model_name_or_path", TESTBED, *SHORT, "--output_dir", unfinished]
    message = fails(*options, "--resume_from_checkpoint", unfinished / "checkpoint-9")
    assert all(part in message for part in ("checkpoint-9", "no such folder", "checkpoint true")), message
    (unfinished / "checkpoint-9").mkdir()
    message = fails(*options, "--resume_from_checkpoint", unfinished / "checkpoint-9")
    assert all(part in message for part in ("checkpoint-9", "run.json", "complete checkpoint")), message


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def test_corrupted_subspace_given(fails, copy, tmp_path):
    flip(copy / "subspace" / "subspace.safetensors")
    options = ["--model_name_or_path", TESTBED, "--output_dir", tmp_path / "run"]
    message = fails(*options, "--subspace_path", copy / "subspace")
    assert all(part in message for part in ("subspace.safetensors", "corrupted", "delete the folder")), message
    assert not (tmp_path / "run").exists()


def test_corrupted_subspace_of_the_run(fails, unfinished):
    flip(unfinished / "subspace" / "subspace.safetensors")
    message = fails(*SHORT, "--model_name_or_path", TESTBED, "--output_dir", unfinished)
    assert all(part in message for part in ("subspace.safetensors", "corrupted", "delete the folder")), message


def test_damaged_header(fails, unfinished):
    (unfinished / "subspace" / "subspace.json").write_text("{")
    message = fails(*SHORT, "--model_name_or_path", TESTBED, "--output_dir", unfinished)
    assert all(part in message for part in ("subspace.json", "damaged", "delete the folder")), message


# Disks


@pytest.mark.parametrize("where", ["/proc/sails/run", "/sys/sails/run"])
def test_folder_that_cannot_be_made(fails, where):
    if not Path(where).parents[1].is_dir():
        pytest.skip(f"no {Path(where).parents[1]}")
    assert all(part in fails("--output_dir", where) for part in (where, "--output_dir"))


def test_file_in_the_way(fails, tmp_path):
    (tmp_path / "file").touch()
    for where in (tmp_path / "file", tmp_path / "file" / "run"):
        message = fails("--output_dir", where)
        assert all(part in message for part in (str(where), "a part of the path is a file", "--output_dir")), message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_disk_error_while_training(fails, tmp_path, monkeypatch, code):
    """The checkpoint that was being written goes; the one before stays, and so does the subspace."""
    save = torch.save

    def full(value: Any, path: str, *args: Any, **options: Any) -> None:
        save(value, path, *args, **options)
        if "checkpoint-2" in str(path):
            raise OSError(code, "it is full or so")

    monkeypatch.setattr(torch, "save", full)
    message = fails(*SHORT, "--model_name_or_path", TESTBED, "--output_dir", tmp_path / "run")
    assert all(part in message for part in (str(tmp_path / "run"), os.strerror(code), "--output_dir")), message
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint-1", "subspace"} <= left
    assert not left & {"checkpoint-2", "adapter_model.safetensors", "metrics.json"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of some KiB. Only root can."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("cannot mount a small disk here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.mark.parametrize("kib", [16, 80, 240])
def test_full_disk(fails, disk, kib):
    """It ends in the subspace, in a checkpoint's adapter, and in its optimizer state, which torch.save writes."""
    folder = disk(kib)
    message = fails(*SHORT, "--model_name_or_path", TESTBED, "--output_dir", folder / "run")
    assert all(part in message for part in (f"cannot write {folder}", "free some space")), message
    assert not list(folder.rglob("checkpoint-*"))
    assert not list(folder.rglob(".*"))


# As a user runs it


def test_recipe_as_a_process(tmp_path):
    command = [sys.executable, RECIPES / "sft_sails.py", "--tau", "2", "--output_dir", tmp_path / "run"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("error: tau is 2.0")
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


def test_recipe_under_accelerate(tmp_path):
    """accelerate starts the recipe as a child, and ends with a traceback of its own after the recipe's message."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command = [*accelerate, "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", RECIPES / "sft_sails.py", "--tau", "2",
               "--output_dir", tmp_path / "run"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode != 0
    assert "error: tau is 2.0" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())
