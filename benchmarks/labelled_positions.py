"""What it saves on a CPU to compute logits of labelled positions only, at SmolLM2-135M's shape with random weights.

    python benchmarks/labelled_positions.py [--pairs 7] [--output FILE.json]

Each pair runs the forward and the backward pass of TRL's loss on one batch, with LoRA on every projection, in turn
first: with logits of every position, as TRL has it on a CPU, and of labelled ones. The losses must be the same.
Ratios of seconds (labelled / every), and the share of positions that have a label.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from discovery import measure
from peft import LoraConfig, get_peft_model
from train_sae import SHAPES, make_model
from trl.trainer import utils

from sails_align.core.files import write_json
from sails_align.training.head import score_labelled_positions_only

LENGTH, BATCH, LABELLED = 72, 8, 0.4
"""As of a batch of SmolLM2's recipes."""


def make_step(shape: str) -> Callable[[], float]:
    """Return a function that runs both passes of a batch, and returns the loss."""
    model = make_model(shape).train()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    ids_BS = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH))
    labels_BS = ids_BS.clone()
    labels_BS[:, : round(LENGTH * (1 - LABELLED))] = -100

    def step() -> float:
        adapted.zero_grad()
        loss = adapted(input_ids=ids_BS, labels=labels_BS, fused_lm_head=True).loss
        loss.backward()
        return loss.item()

    return step


def compared(shape: str, n_pairs: int) -> dict[str, Any]:
    """Time both ways by turns."""
    of_trl = utils._use_triton
    score_labelled_positions_only()
    step, losses = make_step(shape), set()

    def run(decides: Any) -> None:
        utils._use_triton = decides
        losses.add(round(step(), 4))

    turns = measure({"every": partial(run, of_trl), "labelled": partial(run, utils._use_triton)}, n_pairs + 1)
    assert len(losses) == 1, f"the losses differ: {losses}"
    seconds = {name: values[1:] for name, values in turns.items()}  # the first turn warms up
    ratios = [labelled / every for labelled, every in zip(seconds["labelled"], seconds["every"], strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds, "labelled_share": LABELLED}


def main() -> None:
    """Print the ratios, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}; choose 1 or more")
    found = compared(args.shape, args.pairs)
    print(f"labelled / every position: {found['ratio']:.3f} ({min(found['ratios']):.3f} to {max(found['ratios']):.3f})")
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
