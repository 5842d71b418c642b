"""How well do attacks work against aligned models? The same searches against base, LoRA and SAILS, on the testbed.

    python benchmarks/gcg.py --output docs/results/gcg.json

The two aligned models are trained first, from the same data with the same seed. Attacked are `--n_prompts` test prompts
of the trained harm categories and as many of the new ones; the oracle judges the responses. Folders are kept in
`--work`, where a rerun goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sails_align.core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"base": None, "LoRA": "default", "SAILS": "sails"}
LENGTHS = (2, 8)
"""Tokens of a suffix."""
RATES = ("attack_success_rate", "attack_success_rate_5")


def train(init: str, folder: Path, seed: int) -> str:
    """Align a model by the recipe with its default options; the folder of the finished run."""
    if not (folder / "metrics.json").is_file():
        options = ["--init", init, "--seed", str(seed), "--output_dir", str(folder), "--disable_tqdm", "true"]
        subprocess.run([sys.executable, str(ROOT / "recipes" / "sft_sails.py"), *options], check=True)
    return str(folder)


def attack(method: str, model: str, folder: Path, args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Run `sails attack`: success rates by attack, seconds, and the share of searches that met their target."""
    from sails_align.cli.evaluate import attack as sails_attack

    started = time.time()
    options = ["--model", model, "--n_prompts", str(args.n_prompts), "--output_dir", str(folder)]
    options += ["--cache_path", str(args.work / "cache.sqlite"), "--seed", str(args.seed)]
    metrics = sails_attack([method, *options, *more])
    assert metrics is not None
    found: dict[str, Any] = {"rates": metrics["attacks"], "seconds": round(time.time() - started, 1)}
    if method == "gcg":
        rows = [json.loads(line) for line in (folder / "attacked.jsonl").read_text().splitlines()]
        found["matched"] = sum(row["meta"]["matched"] for row in rows) / len(rows)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All attacks on all models, by model and attack."""
    found: dict[str, Any] = {}
    for name, init in MODELS.items():
        model = "testbed" if init is None else train(init, args.work / init, args.seed)
        of = found[name] = {"wrappers": attack("wrappers", model, args.work / f"{name}-wrappers", args)}
        for length in LENGTHS:
            folder = args.work / f"{name}-gcg-{length}"
            of[f"gcg, {length} tokens"] = attack("gcg", model, folder, args, "--suffix_length", str(length))
        suffixes = ["--suffixes", str(args.work / f"base-gcg-{LENGTHS[0]}" / "attacked.jsonl")]
        of["transfer from base"] = attack("transfer", model, args.work / f"{name}-transfer", args, *suffixes)
        of["transfer from base"]["rates"] = {
            attack: rates for attack, rates in of["transfer from base"]["rates"].items() if attack in ("none", "all")
        }
    return found


def show(found: dict[str, Any]) -> None:
    """Print success rates as they stand in docs/attacks.md."""
    table = Table(title="Attack success (%), score 4 or 5; in brackets score 5")
    for heading in ("attack", *found):
        table.add_column(heading, justify="left" if heading == "attack" else "right")
    attacks = next(iter(found.values()))
    table.add_row("none", *(cell(of["wrappers"]["rates"]["none"]) for of in found.values()))
    for attack_name in attacks:
        table.add_row(attack_name, *(cell(of[attack_name]["rates"]["all"]) for of in found.values()))
    Console().print(table)


def cell(rates: dict[str, Any]) -> str:
    """A rate with its interval, and that of score 5."""
    wide, narrow = (rates[name] for name in RATES)
    return f"{wide['value']:.0%} ({wide['ci_low']:.0%} to {wide['ci_high']:.0%}) [{narrow['value']:.0%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gcg.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/gcg"))
    parser.add_argument("--n_prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = run(args)
    write_json(args.output, {"n_prompts": args.n_prompts, "seed": args.seed, "models": found})
    show(found)


if __name__ == "__main__":
    main()
