"""The benchmarks of real shapes: the one for GPUs on a tiny model, and the memory of discovery as it is."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow


def result_of(output: Path, *words: object) -> dict[str, Any]:
    command = [sys.executable, *map(str, words), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_the_benchmark_for_gpus_works(tmp_path: Path) -> None:
    shape = result_of(tmp_path / "gpu.json", "benchmarks/gpu.py", "--shapes", "tiny", "--pairs", "1")["shapes"]["tiny"]
    for stage in ("discovery", "sft", "dpo"):
        assert shape[stage]["ratio"]["median"] > 0
        assert shape[stage]["met"] == (shape[stage]["ratio"]["median"] <= shape[stage]["target"])
        assert 0 < shape[stage]["mfu"] < 1
    assert shape["merge"]["seconds"] > 0
    assert {of["tokens_per_second"] > 0 for of in shape["generation"].values()} == {True}
    assert shape["generation"].keys() == {"base", "adapter", "merged"}


@pytest.mark.gpu
def test_discovery_and_steps_are_within_their_targets_on_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    shape = result_of(tmp_path / "gpu.json", "benchmarks/gpu.py", "--shapes", "gemma-2-2b")["shapes"]["gemma-2-2b"]
    assert all(shape[stage]["met"] for stage in ("discovery", "sft", "dpo")), shape


@pytest.fixture(scope="module")
def real_shape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma-2-2B's shape and Gemma Scope's, random weights in bfloat16: 6 GB on disk, gone afterwards."""
    folder = tmp_path_factory.mktemp("real_shape")
    if shutil.disk_usage(folder).free < 8e9:
        pytest.skip("less than 8 GB of disk are free")
    yield folder
    shutil.rmtree(folder)


def test_discovery_in_a_model_of_2_6_billion_parameters_takes_less_than_12_gb(real_shape: Path) -> None:
    options = ["--examples", 4, 16, "--placements", "all", "--folder", real_shape]
    few, more = result_of(real_shape / "scale.json", "benchmarks/discovery_at_scale.py", *options)["runs"]
    assert more["resident_gb"] < 12
    assert more["anonymous_gb"] < few["anonymous_gb"] + 0.3  # it does not grow with the examples


def test_the_recipe_trains_a_model_of_2_6_billion_parameters(real_shape: Path) -> None:
    """From the model and SAEs of the test before to a saved adapter of 0.24% of the parameters, on the CPU."""
    if not (real_shape / "model" / "config.json").is_file():
        pytest.skip("the model is not there, since the test before it has not run")
    values = {
        **{"model_name_or_path": real_shape / "model", "sae_path": real_shape / "saes", "sae_allow_mismatch": "true"},
        **{"dataset_name": real_shape / "pairs.jsonl", "preset": "paper", "dtype": "bfloat16", "lora_r": 16},
        **{"max_discovery_examples": 2, "eval_examples": 2, "max_length": 64, "per_device_train_batch_size": 1},
        **{"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "save_strategy": "no", "disable_tqdm": "true"},
        "output_dir": real_shape / "run",
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "recipes/sft_sails.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((real_shape / "run" / "metrics.json").read_text())
    assert metrics["cost"]["trainable_parameters"] == 6_389_760
    assert f"{metrics['cost']['trainable_share']:.2%}" == "0.24%"
    assert metrics["trained"]["held_out_loss"] < metrics["base"]["held_out_loss"]
    assert (real_shape / "run" / "adapter_model.safetensors").stat().st_size > 4 * 6_389_760


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["gpu.py", "--shapes", "gemma-9"], "invalid choice: 'gemma-9'"),
        (["gpu.py", "--shapes", "tiny", "--pairs", "0"], "--pairs is 0; choose 1 or more"),
        (["gpu.py", "--everything"], "--folder is None; give one that holds SmolLM2-135M-Instruct.Q4_1.gguf"),
        (["train_sae.py", "--pairs", "0"], "--pairs is 0; choose 1 or more"),
        (["labelled_positions.py", "--pairs", "0"], "--pairs is 0; choose 1 or more"),
        (["discovery_at_scale.py", "--shape", "gemma-9"], "invalid choice: 'gemma-9'"),
    ],
)
def test_bad_options_are_refused(options: list[str], said: str) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / options[0]), *options[1:]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr


def test_everything_goes_on_after_a_failure_and_keeps_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other commands: the real ones need a GPU."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    everything = importlib.import_module("everything")
    (tmp_path / everything.GGUF).write_bytes(b"weights")
    programs = {
        "tests": "raise SystemExit('no device')",
        "gemma-2-2b": f"open({str(tmp_path / 'gemma-2-2b.json')!r}, 'w').write('{{\"ratio\": 1.5}}')",
        "smollm2": "import os; print(os.environ['SAILS_CACHE'], os.environ['HF_HUB_OFFLINE'])",
    }
    steps = [(name, [sys.executable, "-c", program], 60.0) for name, program in programs.items()]
    late = [("late", [sys.executable, "-c", ""], -1.0)]
    monkeypatch.setattr(everything, "commands", lambda *_: [*steps, *late])
    found = everything.everything(tmp_path, minutes=1, pairs=1, processes=1)
    assert json.loads((tmp_path / "everything.json").read_text()) == found
    ended = {name: step["ended"] for name, step in found["steps"].items()}
    assert list(ended.values()) == ["failed with exit code 1", "done", "done", "there was no time"]
    assert found["steps"]["tests"]["last_lines"] == ["no device"]
    assert found["steps"]["gemma-2-2b"]["figures"] == {"ratio": 1.5}
    assert found["steps"]["smollm2"]["last_lines"] == [f"{tmp_path / 'cache'} 1"]
    assert (tmp_path / "cache" / "smollm2" / everything.GGUF).read_bytes() == b"weights"


def test_a_step_of_everything_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    everything = importlib.import_module("everything")
    for program, seconds, ended in (
        ("print('yes')", 60.0, "done"),
        ("raise SystemExit(3)", 60.0, "failed with exit code 3"),
        ("import time; time.sleep(600)", 0.5, "time is over"),
    ):
        assert everything.run([sys.executable, "-c", program], tmp_path / "log", seconds, dict(os.environ)) == ended


def test_what_sae_training_adds_is_measured(tmp_path: Path) -> None:
    sizes = ["--shape", "tiny", "--pairs", "2", "--windows", "16", "--steps", "3"]
    result = result_of(tmp_path / "train_sae.json", "benchmarks/train_sae.py", *sizes)
    assert len(result["reading"]) == len(result["steps"]) == 2
    assert all(0.05 < ratio < 20 for name in ("reading", "steps") for ratio in result[name])


def test_labelled_positions_are_compared_with_every_position(tmp_path: Path) -> None:
    result = result_of(
        tmp_path / "positions.json", "benchmarks/labelled_positions.py", "--shape", "tiny", "--pairs", "2"
    )
    assert len(result["ratios"]) == 2
    assert min(result["ratios"]) > 0


def test_subspaces_of_two_seeds_of_saes_are_compared(tmp_path: Path) -> None:
    sizes = ["--layers", "1", "--n_tokens", "4000", "--d_sae", "192", "--k", "8", "--n_examples", "16"]
    of = result_of(tmp_path / "seeds.json", "benchmarks/sae_seeds.py", *sizes)["layers"]["1"]
    # TopK takes k latents, and those below zero do not count.
    assert of["topk"]["l0"] == pytest.approx([round(sum(of["gba"]["l0"]) / 2)] * 2, abs=1)
    for kind in of.values():
        assert len(kind["angles"]) == min(kind["ranks"])
        assert all(0 <= angle <= 90 for angle in kind["angles"])
        assert 0 < kind["similarity"] < 1


def test_the_graph_penalty_makes_directions_smoother_on_its_own_graph(tmp_path: Path) -> None:
    sizes = ["--seeds", "1", "--layers", "2", "--n_tokens", "20000"]
    found = result_of(tmp_path / "graph.json", "benchmarks/graph_saes.py", *sizes)["found"]
    energy = {kind: of["energy"]["value"] for kind, of in found.items()}
    assert energy["graph"] < 0.95 * min(energy["plain"], energy["permuted graph"])
    assert all(0.8 < of["explained_variance"]["value"] < 1 for of in found.values())


def test_the_redundancy_of_trained_adapters_is_measured(tmp_path: Path) -> None:
    sizes = ["--seeds", "1", "--max_steps", "1", "--n_prompts", "4"]
    found = result_of(tmp_path / "redundancy.json", "benchmarks/redundancy.py", *sizes)["found"]
    assert found["LoRA, orthonormal start"]["weights"]["value"] < 0.01 < found["LoRA"]["weights"]["value"]
    assert all(0 < of["features"]["value"] < 1 for of in found.values())


def test_steering_and_ablation_are_measured_for_each_subspace(tmp_path: Path) -> None:
    """On two prompts of each set; the model without alignment stands for the aligned one."""
    sizes = ["--n_examples", "4", "--n_prompts", "2", "--strengths", "0.3"]
    rows = result_of(tmp_path / "steering.json", "benchmarks/steering.py", "--aligned", "smollm2", *sizes)["rows"]
    subspaces = [None, "sails", "random_features", "random_basis", "mean_diff"]
    assert [row["subspace"] for row in rows if row["steer"] == "ablate"] == subspaces
    assert {row["strength"] for row in rows if row["steer"] == "add" and row["subspace"]} == {0.3, -0.3}
    assert [row["likeness"]["value"] for row in rows if not row["subspace"]] == [1.0, 1.0]
    assert min(row["likeness"]["value"] for row in rows if row["subspace"]) < 1  # the hook changes answers


def test_the_benchmark_of_the_rules_leaves_partial_refusals_out_and_counts_rows_from_1(tmp_path: Path) -> None:
    no, yes = ("I cannot help with that.", "2_full_refusal"), ("Sure, with glue.", "1_full_compliance")
    rows = [no, yes, ("I cannot do it. However, use glue.", "3_partial_refusal"), no, ("Never.", "2_full_refusal")]
    for model in ("gpt4", "llama2orig", "llama2new", "mistralinstruct", "mistralguard"):
        with (tmp_path / f"xstest_v2_completions_{model}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "type", "prompt", "completion", "final_label"])
            writer.writerows([f"v2-{n}", "x", "how?", *row] for n, row in enumerate(rows, 1))
    sets = result_of(tmp_path / "rules.json", "benchmarks/rules_judge.py", tmp_path)["sets"]
    found = {(of["model"], of["rows"]): (of["n"], of["n_refused"], of["recall"]) for of in sets}
    assert found["gpt4", "all"] == (4, 3, 2 / 3)
    assert found["mistralinstruct", "odd"] == (2, 2, 0.5)
    assert found["mistralinstruct", "even"] == (2, 1, 1.0)
    assert found["all unused", "all"] == (10, 7, 5 / 7)


@pytest.mark.parametrize(("which", "most_gb"), [([], 8 - 3.9), (["--all_weights"], 8)], ids=["linear", "all"])
def test_edits_of_models_with_large_embeddings_stay_small(which: list[str], most_gb: float, tmp_path: Path) -> None:
    """Gemma-2-2B's layers and embeddings, but 1 of 26 blocks: a whole model in memory would take 3.9 GB more.

    If embeddings differ, it is they that take most, and the number of blocks does not matter. Two edits, since each
    takes half a minute here; the benchmark has all of them.
    """
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("less than 8 GB of disk are free")
    options = ("--blocks", "1", "--edits", "wise_ft", "lox", *which)
    for found in result_of(tmp_path / "edits.json", "benchmarks/edit_at_scale.py", *options)["edits"]:
        assert found["anonymous_gb"] < most_gb, found
