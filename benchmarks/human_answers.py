"""Does alignment make answers written by people less likely to SmolLM2? Perplexity before and after.

    python benchmarks/human_answers.py --rows data/self_instruct/user_oriented_instructions.jsonl \
        --output docs/results/human_answers.json

From this repository's folder; about fifty minutes on one core. An interrupted run goes on where it was. The rows are
Self-Instruct's 252 instructions with answers, written by people (github.com/yizhongw/self-instruct, human_eval/). Each
method is trained with the learning rate that the comparison chose, and measured on the same answers, each cut at
--max_length tokens with its prompt.

A perplexity is exp(mean loss per token) over all tokens of all answers. Differences to the base model are ratios,
paired by seed, with 95% intervals over seeds (t distribution, of the logarithms).
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sails_align.core.artifacts import file_hash, package_versions
from sails_align.core.files import write_json
from sails_align.data.messages import user
from sails_align.data.tokens import TokenizedSide, tokenize_response
from sails_align.evaluation.divergence import divergences
from sails_align.evaluation.intervals import over_seeds
from sails_align.models.load import load_model, load_spec_tokenizer
from sails_align.models.resolve import resolve_model

BASE = "smollm2"
METHODS = {"sft-lora": "3.33e-3", "sft-sails": "3.33e-3", "sft-full": "9e-5"}
"""Recipes, with the learning rates that `compare.yaml` chose."""


def sides_of(rows: Path, n_rows: int, max_length: int) -> list[TokenizedSide]:
    """Tokenize the first answer to each of the first instructions."""
    tokenizer, sides = load_spec_tokenizer(resolve_model(BASE)), []
    for line in rows.read_text(encoding="utf-8").splitlines()[:n_rows]:
        row = json.loads(line)
        of = row["instances"][0]
        prompt = "\n\n".join(part for part in (row["instruction"], of["input"]) if part)
        sides.append(tokenize_response(tokenizer, [user(prompt)], of["output"], max_length))
    return sides


def losses_of(method: str, seed: int, n_examples: int, sides: list[TokenizedSide]) -> dict[str, Any]:
    """Train a model; return its mean loss per token of the answers, and the base model's, in nats."""
    config = f"recipes/configs/smollm2-135m/{method.replace('-', '_')}.yaml"
    with TemporaryDirectory(prefix="sails-human-answers-") as folder:
        options = {
            "config": config,
            "learning_rate": METHODS[method],
            "max_train_examples": n_examples,
            "seed": seed,
            "output_dir": folder,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "sails_align", "train", "sft", *words], check=True)
        model, base = (load_model(resolve_model(name)) for name in (folder, BASE))
        found = [of for of in divergences(model, base, sides, batch_size=8, progress=True) if of is not None]
    n_tokens = sum(of.n_tokens for of in found)
    loss, base_loss = (
        sum(getattr(of, name) * of.n_tokens for of in found) / n_tokens for name in ("answer_loss", "base_answer_loss")
    )
    return {"n_answers": len(found), "n_tokens": n_tokens, "loss": loss, "base_loss": base_loss}


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return each method's perplexity (of the mean loss over seeds), and its ratio to the base model's."""
    found: dict[str, Any] = {}
    for method in METHODS:
        of = [run for name, run in runs.items() if name.rpartition("/")[0] == method]
        if of:
            changes = over_seeds([run["loss"] - run["base_loss"] for run in of])
            ratio = [None if value is None else math.exp(value) for value in changes]
            base = math.exp(of[0]["base_loss"])
            row = {"base_perplexity": base, "perplexity": base * math.exp(changes[0]), "n_seeds": len(of)}
            found[method] = {**row, "ratio": dict(zip(("value", "ci_low", "ci_high"), ratio, strict=True))}
    return found


def main() -> None:
    """Print the measurements, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="Self-Instruct's user_oriented_instructions.jsonl")
    parser.add_argument("--n_rows", type=int, default=96, help="instructions, from the first")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of an instruction with its answer")
    parser.add_argument("--n_examples", type=int, default=32, help="harmful requests to train on")
    parser.add_argument("--n_seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("n_rows", "max_length", "n_examples")}
    sizes |= {"learning_rates": METHODS, "rows": file_hash(args.rows), "versions": package_versions()}
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    runs: dict[str, Any] = known["runs"] if sizes.items() <= known.items() else {}
    sides = sides_of(args.rows, args.n_rows, args.max_length)
    for seed in range(args.n_seeds):
        for method in METHODS:
            if f"{method}/{seed}" not in runs:
                runs[f"{method}/{seed}"] = losses_of(method, seed, args.n_examples, sides)
                write_json(args.output, {**sizes, "runs": runs, "methods": summary(runs)})
    for method, of in summary(runs).items():
        print(f"{method}: perplexity {of['perplexity']:.1f}, base {of['base_perplexity']:.1f}, ratio {of['ratio']}")


if __name__ == "__main__":
    main()
