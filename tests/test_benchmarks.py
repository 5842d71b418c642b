"""The benchmarks of real shapes: the one for GPUs on a tiny model, and the memory of discovery as it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

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


def test_discovery_in_a_model_of_2_6_billion_parameters_takes_less_than_12_gb(tmp_path: Path) -> None:
    """Gemma-2-2B's shape and Gemma Scope's, random weights, bfloat16, on the CPU; 16 examples a side."""
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("less than 8 GB of disk are free")
    options = ["--examples", 4, 16, "--placements", "all"]
    few, more = result_of(tmp_path / "scale.json", "benchmarks/discovery_at_scale.py", *options)["runs"]
    assert more["resident_gb"] < 12
    assert more["anonymous_gb"] < few["anonymous_gb"] + 0.3  # it does not grow with the examples


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["gpu.py", "--shapes", "gemma-9"], "invalid choice: 'gemma-9'"),
        (["gpu.py", "--shapes", "tiny", "--pairs", "0"], "--pairs is 0; choose 1 or more"),
        (["discovery_at_scale.py", "--shape", "gemma-9"], "invalid choice: 'gemma-9'"),
    ],
)
def test_bad_options_are_refused(options: list[str], said: str) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / options[0]), *options[1:]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
