"""Compare one CPU thread with all of them, by the size of the model: forward and backward passes, and generation.

python benchmarks/threads.py

Each pair runs one after the other in one process, in turn first. A ratio above 1 means that one thread is faster. The
machine's other work decides much of it: the load is printed, too.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sails_align.core.files import write_json

SHAPES = {"0.8M": (128, 4), "5M": (256, 6), "13M": (384, 7), "25M": (512, 8), "85M": (768, 12)}
"""Size -> width and blocks, with a vocabulary of 512."""
BATCH, LENGTH, N_NEW = 8, 64, 24


def make_model(width: int, n_blocks: int) -> LlamaForCausalLM:
    """Make a model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=n_blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def seconds(model: LlamaForCausalLM, work: str, n_threads: int) -> float:
    """Return the time of a piece of work with some threads."""
    torch.set_num_threads(n_threads)
    ids_BS = torch.randint(1, 512, (BATCH, LENGTH))
    started = time.perf_counter()
    if work == "train":
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
    else:
        model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), max_new_tokens=N_NEW, do_sample=False)
    return time.perf_counter() - started


def ratios(model: LlamaForCausalLM, work: str, n_threads: int, n_pairs: int) -> list[float]:
    """Return, for each pair, the time with all threads divided by that with one."""
    found = []
    for pair in range(n_pairs + 1):
        order = (1, n_threads) if pair % 2 else (n_threads, 1)
        took = {n: seconds(model, work, n) for n in order}
        found.append(took[n_threads] / took[1])
    return found[1:]  # the first warms up


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="compared with one; default: all cores")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    result: dict[str, Any] = {"threads": args.threads, "load": [os.getloadavg()[0]], "sizes": {}}
    for size in args.sizes:
        model = make_model(*SHAPES[size])
        rows = {work: ratios(model, work, args.threads, args.pairs) for work in ("train", "generate")}
        n = model.num_parameters()
        result["sizes"][size] = {"n_parameters": n, **rows}
        told = ", ".join(
            f"{work} {statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})" for work, of in rows.items()
        )
        print(f"{size:>5} ({n:,} parameters): {args.threads} threads / 1 thread: {told}", flush=True)
    result["load"].append(os.getloadavg()[0])
    print(f"load of the machine (1 minute): {result['load'][0]:.1f} before, {result['load'][1]:.1f} after")
    if args.output is not None:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
