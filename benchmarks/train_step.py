"""What a training step costs: SAILS against plain LoRA, by turns in one run, in TRL's trainer with all callbacks.

    python benchmarks/train_step.py [--pairs 9] [--output FILE.json] [any option of the recipe]

Prints the ratio of the seconds `trainer.train()` takes (SAILS / LoRA), pair by pair: median, minimum and maximum.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars
from rich.console import Console

from sails_align.align import discovery_options, load_source, parse
from sails_align.training.run import build_sft_trainer
from sails_align.training.subspaces import find_subspace


def seconds(init: str, folder: Path, extra: list[str]) -> float:
    """Train once and time it; loading and discovery are not counted."""
    options = ["--init", init, "--output_dir", str(folder / init), "--save_strategy", "no", "--disable_tqdm", "true"]
    options += ["--max_train_examples", "128"]
    args = parse("sft", [*options, *extra])
    source, _ = load_source(args)
    subspace = None
    if args.sails.uses_subspace:
        subspace = find_subspace(args.sails, source, discovery_options(args), folder / "subspace")
    trainer, _ = build_sft_trainer(args.sails, args.training, args.model, source, subspace)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args, extra = parser.parse_known_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.pairs + 1):  # the order changes from pair to pair
            inits = ("default", "sails") if turn % 2 else ("sails", "default")
            times = {init: seconds(init, Path(folder), extra) for init in inits}
            pairs.append((times["sails"], times["default"]))
    pairs = pairs[1:]  # the first warms up
    ratios = [sails / lora for sails, lora in pairs]
    result = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "pairs": pairs}
    Console().print(
        f"SAILS / LoRA, training time: median {result['median']:.3f} ({result['min']:.3f} to {result['max']:.3f}, "
        f"{len(ratios)} pairs)"
    )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
