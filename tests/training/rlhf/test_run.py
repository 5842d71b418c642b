"""The RLHF reference of the testbed, in runs of a few steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from paths import RECIPES, ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import Warm

from sails_align.core.errors import InputError
from sails_align.core.log import LOG_FILE
from sails_align.testbed.build import ASSETS, resolve_testbed
from sails_align.testbed.prompts import measure, numbers
from sails_align.training.rlhf import run as rlhf

RECIPE = RECIPES / "rlhf_reference.py"
WEIGHTS = "model.safetensors"
N_STEPS = 8
SHORT: dict[str, Any] = {
    "max_steps": N_STEPS,
    "save_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "warm_start_examples": 16,
    "warm_start_epochs": 2,
    "warm_start_learning_rate": 5e-4,
    "eval_examples": 8,
    "eval_part": "validation",
    "disable_tqdm": "true",
}


def argv(output_dir: Path, **more: object) -> list[str]:
    options = {**SHORT, "output_dir": output_dir, **more}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    rlhf.main(argv(folder))
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def distance(one: Path, other: Path) -> float:
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


# What is written


def test_a_plain_model_is_written_that_answers_as_was_measured(finished: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(ASSETS / "model").chat_template
    expected = read(finished, "metrics.json")["trained"]
    found = numbers(measure(model, tokenizer, resolve_testbed(None), SHORT["eval_examples"], part="validation"))
    assert {name: value.to_json() for name, value in found.items()} == expected
    assert not [path.name for path in finished.iterdir() if path.name.startswith(".")]
    assert distance(finished, finished / "warm_start") > 1e-4
    assert distance(finished / "warm_start", ASSETS / "model") > 1e-4


def test_metrics_are_of_base_warm_start_and_trained_model(finished: Path) -> None:
    metrics = read(finished, "metrics.json")
    assert metrics["base"]["correct_answer_rate"]["value"] == 1.0
    assert metrics["base"]["safety_rate"]["value"] == 0.0
    for name in ("base", "warm_start", "trained"):
        assert metrics[name]["safety_rate"]["n"] + metrics[name]["safety_rate"]["n_unscored"] == 16
    record = read(finished, "run.json")
    assert record["versions"]["trl"]
    assert (
        record["identity"]
        == metrics["provenance"]["identity"]
        == read(finished / "checkpoint-4", "run.json")["identity"]
    )
    assert record["options"]["training"]["num_generations"] == 4
    assert "`testbed`, fine-tuned" in (finished / "README.md").read_text()


# Determinism, stopping and going on


@pytest.mark.slow
def test_the_run_directory_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    rlhf.main(["--config", str(finished / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert distance(tmp_path / "again", finished) == 0
    ours, theirs = (read(folder, "metrics.json") for folder in (tmp_path / "again", finished))
    assert ours["trained"] == theirs["trained"]


@pytest.mark.slow
def test_another_seed_is_another_run(finished: Path, tmp_path: Path) -> None:
    rlhf.main(argv(tmp_path, seed=1))
    assert distance(tmp_path, finished) > 1e-4
    assert distance(tmp_path / "warm_start", finished / "warm_start") > 1e-4


def test_resumed_is_as_uninterrupted(finished: Path, copy: Path) -> None:
    shutil.rmtree(copy / f"checkpoint-{N_STEPS}")
    (copy / WEIGHTS).unlink()
    part = copy / "checkpoint-6"  # of a process that was killed while it wrote
    part.mkdir()
    (part / "trainer_state.json").write_text("{}")
    kept = [copy / "warm_start" / WEIGHTS, copy / "checkpoint-4" / WEIGHTS]
    written = [file.stat().st_mtime_ns for file in kept]
    rlhf.main(argv(copy, resume_from_checkpoint="true", save_total_limit=9))
    assert distance(copy, finished) < 1e-6
    assert [file.stat().st_mtime_ns for file in kept] == written  # neither is made again
    steps = [row["step"] for row in read(copy / f"checkpoint-{N_STEPS}", "trainer_state.json")["log_history"]]
    assert steps == list(range(1, N_STEPS + 1))


def test_a_damaged_warm_start_is_made_again(finished: Path, copy: Path) -> None:
    (copy / "warm_start" / WEIGHTS).write_bytes(b"damaged")
    rlhf.main(argv(copy, max_steps=1, save_strategy="no", overwrite_output_dir="true"))
    assert distance(copy / "warm_start", finished / "warm_start") == 0


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1e-3), ("seed", 1), ("num_generations", 8)])
def test_a_checkpoint_of_another_run_is_refused(copy: Path, name: str, value: object) -> None:
    for more in ({}, {"resume_from_checkpoint": "true"}):
        with pytest.raises(InputError, match=rf"another run \(different:.*{name} \([-.\d]+, now {value}\)"):
            rlhf.main(argv(copy, **more, **{name: value}))


def test_a_finished_run_is_not_done_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:
        files = (path for path in copy.rglob("*") if path.is_file() and path.name != LOG_FILE)
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert rlhf.main(argv(copy)) == read(copy, "metrics.json")
    assert "finished: nothing is done" in capsys.readouterr().out
    assert times() == before


# Learning


@pytest.mark.slow
@pytest.mark.parametrize(("learning_rate", "learns"), [(1e-3, True), (0.0, False)])
def test_reinforcement_raises_the_reward(tmp_path: Path, learning_rate: float, learns: bool) -> None:
    """Harmful requests alone: the short way to more reward is to refuse. Without a learning rate nothing changes."""
    more = {"helpful_ratio": 0, "max_steps": 16, "save_strategy": "no", "eval_examples": 64}
    warm = {"warm_start_examples": 64, "warm_start_ratio": 1}
    metrics = rlhf.main(argv(tmp_path, learning_rate=learning_rate, **more, **warm))
    before, after = (metrics[name]["safety_rate_in_distribution"]["value"] for name in ("warm_start", "trained"))
    assert 0.02 < before < 0.6
    assert after > before + 0.3 if learns else after == before


def test_without_a_warm_start_training_starts_from_the_base(tmp_path: Path) -> None:
    metrics = rlhf.main(argv(tmp_path, warm_start_examples=0, max_steps=1, save_strategy="no", learning_rate=0))
    assert not (tmp_path / "warm_start").exists()
    assert "warm_start" not in metrics
    assert distance(tmp_path, ASSETS / "model") == 0


def test_a_warm_start_of_the_users_own(finished: Path, tmp_path: Path) -> None:
    start = finished / "warm_start"
    rlhf.main(argv(tmp_path, warm_start_path=start, max_steps=1, save_strategy="no", learning_rate=0))
    assert distance(tmp_path, start) == 0
    assert not (tmp_path / "warm_start").exists()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": "google/gemma-2-9b"}, "is no testbed.*such as google/gemma-2-9b-it"),
        ({"num_generations": 0}, "num_generations is 0"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"num_generations": 7}, "must be divisible by num_generations"),
        ({"warm_start_path": "/nowhere"}, "the warm start /nowhere has no model.safetensors"),
        ({"warm_start_examples": -1}, "warm_start_examples is -1; choose 0 or more"),
        ({"warm_start_learning_rate": 0}, "warm_start_learning_rate is 0.0; choose a value above 0"),
        ({"eval_part": "train"}, "eval_part is 'train', which is not one of: test, validation"),
        ({"helpful_ratio": -1}, "helpful_ratio is -1.0"),
        ({"max_train_examples": 0}, "max_train_examples is 0; choose 1 or more"),
        ({"push_to_hub": "true"}, "push_to_hub is given"),
        ({"lora_r": 8}, "unknown option '--lora_r'"),
    ],
)
def test_options_that_cannot_be_used(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}") as raised:
        rlhf.main(argv(tmp_path / "run", **options))
    assert len(str(raised.value).splitlines()) <= 3
    assert not (tmp_path / "run").exists()


def test_options_that_trls_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"TRL's trainer cannot be made of these options: .*eval"):
        rlhf.main(argv(tmp_path, warm_start_examples=0, eval_strategy="steps", eval_steps=2))


def test_a_warm_start_of_another_vocabulary(finished: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(finished / "warm_start", tmp_path / "start"))
    tokenizer = json.loads((start / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["hello"] = words.pop("sorry")
    (start / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="another vocabulary than the testbed"):
        rlhf.main(argv(tmp_path / "run", warm_start_path=start))
    (start / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        rlhf.main(argv(tmp_path / "run", warm_start_path=start))


# Several processes


@pytest.mark.distributed
def test_two_processes(warm: Warm, tmp_path: Path) -> None:
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    launch = ["accelerate", "launch", "--config_file", config, RECIPE]
    done = warm.run([*launch, *argv(tmp_path / "run", per_device_train_batch_size=8)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("RLHF reference") == 1
    run = tmp_path / "run"
    assert read(run, "run.json")["identity"]["n_processes"] == 2
    assert distance(run, run / "warm_start") > 1e-4
    history = read(run / f"checkpoint-{N_STEPS}", "trainer_state.json")["log_history"]
    assert len([row for row in history if "refused/harmful" in row]) == 2  # once for each generation of 4 steps
