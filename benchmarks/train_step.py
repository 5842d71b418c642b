"""What the SAILS start costs in training: against TRL's plain LoRA, by turns in one run, in SFT and DPO.

    python benchmarks/train_step.py [--pairs 9] [--output FILE.json]

Every run is a process of its own, through the recipe. Reported are ratios (SAILS / LoRA), pair by pair: seconds of an
optimizer step (from the second one on, drift logging included), peak memory, and seconds from the launch to the first
step (the subspace is cached). Then the efficiency of two processes (DDP) at the same global batch:
seconds of one / (2 x seconds of two). Real shapes on a GPU: benchmarks/gpu.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from sails_align.core.files import write_json

STARTS = {"SAILS": "sails", "LoRA": "default"}
ROOT = Path(__file__).resolve().parents[1]
QUIET = ["--save_strategy", "no", "--disable_tqdm", "true"]
# Two passes at most: on what is learnt by heart a step of SAILS was measured to take 7% longer (docs/cost.md).
TESTBED = ["--max_train_examples", "512", "--max_steps", "120", "--eval_examples", "8"]


def words_of(options: dict[str, Any]) -> list[str]:
    """Options as on a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def child(method: str, options: list[str]) -> None:
    """Train once, in this process, and print what was measured as the last line."""
    import resource

    import torch
    from transformers import TrainerCallback

    from sails_align.training import run as align

    class Clock(TrainerCallback):
        """When each step began, and when the last one ended."""

        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began.append(time.time())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ended = time.time()

    clock = Clock()
    align.build_trainer = partial(align.build_trainer, callbacks=[clock])
    metrics = align.main(method, options)  # pyright: ignore[reportArgumentType]
    n_steps = len(clock.began)
    measured = {
        "first_step": clock.began[0],
        "seconds_per_step": (clock.ended - clock.began[1]) / (n_steps - 1),
        "peak_memory_mb": metrics["cost"]["peak_memory_mb"]
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if int(os.environ.get("RANK", "0")) == 0:
        print("\nMEASURED " + json.dumps(measured))


def launch(method: str, options: list[str], n_processes: int = 1) -> dict[str, float]:
    """Run a child; its `first_step` becomes the seconds since the launch."""
    words = [__file__, "--child", method, *options]
    start = [sys.executable]
    if n_processes > 1:
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        config = str(ROOT / "accelerate_configs" / "multi_gpu.yaml")
        start = [accelerate, "launch", "--config_file", config, "--num_processes", str(n_processes)]
    launched = time.time()
    done = subprocess.run([*start, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("MEASURED "))
    measured = json.loads(line.removeprefix("MEASURED "))
    return {**measured, "first_step": measured["first_step"] - launched}


def compare(method: str, n_pairs: int, options: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Ratios SAILS / LoRA of each measure over pairs of runs; a first pair warms the caches and is not counted."""
    pairs = []
    for turn in range(n_pairs + 1):
        order = list(STARTS) if turn % 2 else list(STARTS)[::-1]  # the order changes from pair to pair
        runs = {
            start: launch(
                method, [*options, "--init", STARTS[start], "--output_dir", str(folder / f"{method}-{start}")]
            )
            for start in order
        }
        pairs.append(runs)
        print(f"{method}, pair {turn} of {n_pairs}", file=sys.stderr)
    return {name: ratios([(run["SAILS"][name], run["LoRA"][name]) for run in pairs[1:]]) for name in pairs[0]["LoRA"]}


def ratios(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    values = [ours / theirs for ours, theirs in pairs]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "pairs": pairs}


def two_processes(method: str, n_pairs: int, options: list[str], folder: Path) -> dict[str, Any]:
    """Efficiency of two processes, by turns with one at the same global batch."""
    values = []
    for turn in range(n_pairs):
        alone = [*options, "--output_dir", str(folder / f"{method}-one"), "--per_device_train_batch_size", "16"]
        shared = [*options, "--output_dir", str(folder / f"{method}-two"), "--per_device_train_batch_size", "8"]
        one = launch(method, alone)["seconds_per_step"]
        two = launch(method, shared, 2)["seconds_per_step"]
        values.append((one, 2 * two))
        print(f"{method}, two processes, pair {turn + 1} of {n_pairs}", file=sys.stderr)
    return ratios(values)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="of SAILS and LoRA; 0 leaves that out")
    parser.add_argument("--double_pairs", type=int, default=3, help="of one and two processes; 0 leaves that out")
    parser.add_argument("--output", type=Path, help="JSON file for the figures; what is left out stays in it")
    args, extra = parser.parse_known_args()
    result: dict[str, Any] = {"sft": {}, "dpo": {}}
    if args.output and args.output.is_file():
        result = json.loads(args.output.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in ("sft", "dpo") if args.pairs else ():
            result[method] |= compare(method, args.pairs, [*QUIET, *TESTBED, *extra], folder)
        for method in ("sft", "dpo") if args.double_pairs else ():
            options = [*QUIET, *TESTBED, *extra]
            result[method]["two_process_efficiency"] = two_processes(method, args.double_pairs, options, folder)
    for method in ("sft", "dpo"):
        for measure, row in result[method].items():
            print(
                f"{method} {measure}: {row['median']:.3f} ({row['min']:.3f} to {row['max']:.3f}, n={len(row['pairs'])})"
            )
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
