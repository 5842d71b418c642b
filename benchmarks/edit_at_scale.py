"""Edits of models of Gemma-2-2B's shape with random weights: time and memory, on a machine without a GPU.

    python benchmarks/edit_at_scale.py [--edits lox irr] [--blocks 4] [--all_weights] [--output FILE.json]

`sails edit` is a process of its own each time, on models in bfloat16 whose linear layers all differ. Their embeddings
are the same, as after LoRA; with --all_weights they differ, too, as after a training of all weights. Target: 8 GB (10^9
bytes) of memory without the pages of files, which the system takes back when it needs them. With all 26 blocks the
three models take 16 GB of disk, and the result 5 GB.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from discovery_at_scale import measured
from train_step import words_of

from sails_align.core.files import write_json

TARGET_GB = 8.0
MODELS = ("aligned", "unaligned", "tuned")
N_ROWS, LENGTH = 32, 20
"""Rows of each kind that edits look at, and words of a response."""
IRR = {
    **{"aligned_model": "{aligned}", "unaligned_model": "{unaligned}"},
    **{"dataset_name": "{harmful}", "task_dataset_name": "{harmless}"},
}
EDITS: dict[str, dict[str, Any]] = {
    "lox": {"base_model": "{unaligned}", "k": 6},
    "wise_ft": {"aligned_model": "{aligned}"},
    "task_arithmetic": {"aligned_model": "{aligned}", "unaligned_model": "{unaligned}"},
    "safe_lora": {"aligned_model": "{aligned}", "unaligned_model": "{unaligned}", "threshold": 1.0},
    "rosi": {"dataset_name": "{harmful}", "helpful_dataset_name": "{harmless}"},
    "ablate": {"dataset_name": "{harmful}", "helpful_dataset_name": "{harmless}"},
    "lssf": {"aligned_model": "{aligned}", "unaligned_model": "{unaligned}", "dataset_name": "{harmful}"},
    "irr": IRR,
    "irr, some entries kept": {**IRR, "sparsity": 0.25},
}
"""The edits, with their options; a name goes as far as a comma."""


def prepare(folder: Path, shape: str, blocks: int | None, *, all_weights: bool) -> None:
    """Write three models, and rows of random words."""
    import torch
    from random_models import SHAPES, write_model, write_pairs

    if blocks is not None:
        SHAPES[shape]["num_hidden_layers"] = blocks
    write_model(folder / MODELS[0], shape)
    for seed, name in enumerate(MODELS[1:]):
        torch.manual_seed(seed)
        _write_other(folder / MODELS[0], folder / name, all_weights=all_weights)
    for seed, (name, asks) in enumerate({"harmful": "break the", "harmless": "how"}.items()):
        write_pairs(folder / f"{name}.jsonl", N_ROWS, LENGTH, seed, asks)


def _write_other(model: Path, other: Path, *, all_weights: bool) -> None:
    """Write a model whose linear layers, or all weights, differ a little from another's."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, other, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(model.glob("*.safetensors")):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if all_weights or name.endswith("_proj.weight"):
                tensors[name] = weight + 1e-3 * torch.randn_like(weight)
        save_file(tensors, other / file.name, metadata={"format": "pt"})


def benchmark(
    folder: Path, shape: str, blocks: int | None, edits: list[str], *, all_weights: bool
) -> Iterator[dict[str, Any]]:
    """Measure one edit after the other, and yield the figures of all so far."""
    # In a process of its own, so that what it takes is not there when edits are measured.
    prepared = ["--prepare", str(folder), shape, str(blocks or ""), "all" * all_weights]
    subprocess.run([sys.executable, __file__, *prepared], check=True)
    paths = {name: str(folder / name) for name in MODELS}
    paths |= {name: str(folder / f"{name}.jsonl") for name in ("harmful", "harmless")}
    rows = []
    for name in edits:
        options = {option: str(value).format(**paths) for option, value in EDITS[name].items()}
        command = [sys.executable, "-m", "sails_align", "edit", name.partition(",")[0], paths["tuned"]]
        row = measured([*command, *words_of(options), "--device", "cpu", "--output", str(folder / "edited")])
        rows.append({"edit": name, **row, "met": row["anonymous_gb"] <= TARGET_GB})
        shutil.rmtree(folder / "edited")
        setting = {"shape": shape, "blocks": blocks, "all_weights": all_weights, "rows": N_ROWS}
        yield {**setting, "edits": rows, "target_gb": TARGET_GB}


def main() -> None:
    if sys.argv[1:2] == ["--prepare"]:
        blocks = int(sys.argv[4]) if sys.argv[4] else None
        prepare(Path(sys.argv[2]), sys.argv[3], blocks, all_weights=bool(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gemma-2-2b", choices=["tiny", "gemma-2-2b", "gemma-2-9b"])
    parser.add_argument("--blocks", type=int, help="of the model; default: all that the shape has")
    parser.add_argument("--all_weights", action="store_true", help="embeddings differ, too")
    parser.add_argument("--edits", nargs="+", default=list(EDITS), choices=list(EDITS))
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for found in benchmark(Path(temporary), args.shape, args.blocks, args.edits, all_weights=args.all_weights):
            row = found["edits"][-1]
            print(
                f"{row['edit']:23} {row['anonymous_gb']:.2f} GB (target {TARGET_GB:g}), with pages of files "
                f"{row['resident_gb']:.2f} GB, {row['seconds']:.0f} s",
                flush=True,
            )
            if args.output:
                write_json(args.output, found)


if __name__ == "__main__":
    main()
