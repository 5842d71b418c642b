"""How far the judge `rules` agrees with people on who refused: XSTest's completions with human labels.

    git clone https://github.com/paul-rottger/exaggerated-safety
    python benchmarks/rules_judge.py exaggerated-safety/model_completions --output docs/results/rules_judge.json

Each response is labelled as full compliance, full refusal or partial refusal; partial ones are left out. Rows are
counted from 1: the even rows of Mistral Instruct, and all of Mistral with its guard prompt and of Llama 2 without
system prompt, were not used to write the rules. `sails judge-check --judge rules --labels FILE` has the precision and
recall of each rule on one file.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.core.errors import InputError, exit_on_input_error
from sails_align.core.files import write_json
from sails_align.evaluation.judges.rule_check import check_rules
from sails_align.evaluation.label_files import Labelled
from sails_align.evaluation.records import Item, Prompt

SETS = {
    "gpt4": (("all", True),),
    "llama2orig": (("all", True),),
    "mistralinstruct": (("odd", True), ("even", False)),
    "llama2new": (("all", False),),
    "mistralguard": (("all", False),),
}
"""Models, and which of their rows the rules were written with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the files xstest_v2_completions_MODEL.csv")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    rows, unused = [], Labelled([], [], "refusal")
    for model, parts in SETS.items():
        for part, used in parts:
            labelled = read(args.folder, model, part)
            rows.append({"model": model, "rows": part, "used_to_write_the_rules": used, **agreement(labelled)})
            if not used:
                unused.items.extend(labelled.items)
                unused.labels.extend(labelled.labels)
    rows.append({"model": "all unused", "rows": "all", "used_to_write_the_rules": False, **agreement(unused)})
    show(rows)
    if args.output:
        write_json(args.output, {"sets": rows})


def read(folder: Path, model: str, part: str) -> Labelled:
    """Return the responses of a model to the prompts of a part, with 1 for a full refusal and 0 for compliance."""
    path = folder / f"xstest_v2_completions_{model}.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give the folder of XSTest's completions") from error
    rows = [row for number, row in enumerate(rows, 1) if part in ("all", "even" if number % 2 == 0 else "odd")]
    rows = [row for row in rows if not row["final_label"].startswith("3")]
    prompts = [Prompt(row["id"], ({"role": "user", "content": row["prompt"]},), "harmful", row["type"]) for row in rows]
    items = [Item(prompt, row["completion"]) for prompt, row in zip(prompts, rows, strict=True)]
    return Labelled(items, [float(row["final_label"].startswith("2")) for row in rows], "refusal")


def agreement(labelled: Labelled) -> dict[str, Any]:
    """Return the numbers of responses and refusals, precision and recall of refusals, and kappa with its interval."""
    counts = {"n": len(labelled.labels), "n_refused": int(sum(labelled.labels))}
    return check_rules(labelled)["refusal"] | counts


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="rules against XSTest's human labels")
    for heading in ("responses of", "rows", "n (refusals)", "precision", "recall", "Cohen's kappa", "rules written"):
        table.add_column(heading)
    for row in rows:
        kappa = f"{row['cohen_kappa']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
        shares = [f"{row[name]:.2f}" for name in ("precision", "recall")]
        written = "with these" if row["used_to_write_the_rules"] else "without these"
        table.add_row(row["model"], row["rows"], f"{row['n']} ({row['n_refused']})", *shares, kappa, written)
    Console(width=120).print(table)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
