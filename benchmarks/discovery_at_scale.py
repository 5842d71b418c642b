"""Discovery on a model of Gemma-2-2B's shape with random weights: how much memory it takes, on a machine without a GPU.

    python benchmarks/discovery_at_scale.py [--examples 8 32] [--placements all by_layer] [--output FILE.json]

`sails discover` is a process of its own each time, in bfloat16, with files of SAEs as Gemma Scope has them (16k
latents, layers 5, 10, 15, 20). Its peak memory is that of weights, SAEs and activations (anonymous), and that with the
pages of files that it reads (resident), which the system takes back when it needs them. Target: 12 GB resident, and no
growth with the number of examples. The checkpoint (5 GB) and the SAEs (1.2 GB) are written to a temporary folder, or to
`--folder`, where they stay for another time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from train_step import words_of

from sails_align.core.files import write_json

TARGET_GB = 12.0
POLL = 0.02
"""Seconds between looks at the process."""


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; seconds, and peaks of its memory in GB (10^9 bytes)."""
    started, anonymous, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                break
            sizes = dict(line.split(":", 1) for line in status.splitlines())
            if "RssAnon" in sizes:  # else it is ending
                anonymous = max(anonymous, int(sizes["RssAnon"].split()[0]) * 1024)
                resident = max(resident, int(sizes["VmHWM"].split()[0]) * 1024)
            time.sleep(POLL)
        if process.wait():
            log.seek(0)
            raise SystemExit(log.read()[-3000:])
    return {
        "seconds": time.perf_counter() - started,
        "anonymous_gb": anonymous / 1e9,
        "resident_gb": resident / 1e9,
    }


def discovery(folder: Path, output_dir: Path, placement: str, n_examples: int) -> list[str]:
    """The command that is measured, on what `random_models` has written to a folder."""
    options = {
        **{"model_name_or_path": folder / "model", "sae_path": folder / "saes", "dataset_name": folder / "pairs.jsonl"},
        **{"sae_allow_mismatch": "true", "sae_placement": placement, "max_discovery_examples": n_examples},
        **{"preset": "paper", "dtype": "bfloat16", "max_length": 128, "eval_examples": 4, "disable_tqdm": "true"},
        "output_dir": output_dir,
    }
    return [sys.executable, "-m", "sails_align", "discover", *words_of(options)]


def prepare(folder: Path, shape: str, n_examples: int) -> None:
    """Write what is not there yet."""
    from random_models import write_model, write_pairs, write_saes

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").is_file():
        write_model(folder / "model", shape)
    if not (folder / "saes").is_dir():
        write_saes(folder / "saes", shape)
    write_pairs(folder / "pairs.jsonl", n_examples + 5, 60)


def benchmark(folder: Path, shape: str, placements: list[str], examples: list[int]) -> dict[str, Any]:
    # In a process of its own, so that what it takes is not there when discovery is measured.
    subprocess.run([sys.executable, __file__, "--prepare", str(folder), shape, str(max(examples))], check=True)
    rows = []
    for placement in placements:
        for n_examples in examples:
            output_dir = folder / f"run-{shape}-{placement}-{n_examples}"
            row = measured(discovery(folder, output_dir, placement, n_examples))
            rows.append({"placement": placement, "examples": n_examples, **row})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {"shape": shape, "runs": rows, "target_gb": TARGET_GB}


def main() -> None:
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gemma-2-2b", choices=["tiny", "gemma-2-2b", "gemma-2-9b"])
    parser.add_argument("--examples", type=int, nargs="+", default=[8, 32], help="a side")
    parser.add_argument("--placements", nargs="+", default=["all", "by_layer"], help="of --sae_placement")
    parser.add_argument("--folder", type=Path, help="where model and SAEs are kept for another time")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = benchmark(args.folder or Path(temporary), args.shape, args.placements, args.examples)
    for row in result["runs"]:
        print(
            f"{row['placement']:9} {row['examples']:5} examples a side: {row['anonymous_gb']:.2f} GB, with pages of "
            f"files {row['resident_gb']:.2f} GB (target {TARGET_GB:g}), {row['seconds']:.0f} s"
        )
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
