"""Apply the rule of docs/smollm2.md that decides whether the preset `default` is replaced.

    python benchmarks/preset_rule.py --cells runs/ablations-smollm2/cells runs/preset-smollm2/cells \
        [--output docs/results/preset_rule.json]

Reads the results of tuning cells of `sails compare`: each candidate at its own best learning rate on the first seed,
by the mean of refusal rate and likeness on validation prompts (from 0 to 1). One whose mean is not above the present
default's is dropped. For others, the paired difference over all seeds is printed, with a 95% t interval.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from sails_align.core.files import write_text
from sails_align.evaluation.intervals import LEAST_SEEDS, over_seeds
from sails_align.experiments.plan import FIRST_TUNING_SEED, merit

DEFAULT = "sft-sails"
CANDIDATES = ("sft-sails-paper", "layers-sae", "mode-init", "not-whitened", "tokens-all", "score-attribution")

Merits = dict[str, dict[float, dict[int, float]]]
"""By run, learning rate and seed."""


def read(folders: list[Path]) -> Merits:
    """Read the merits of tuning cells."""
    found: Merits = defaultdict(lambda: defaultdict(dict))
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        result = json.loads(path.read_text(encoding="utf-8"))
        cell = result["cell"]
        if cell["part"] == "validation" and cell["run"] in (DEFAULT, *CANDIDATES):
            found[cell["run"]][cell["learning_rate"]][cell["seed"]] = merit(result)
    return found


def judged(name: str, merits: Merits) -> dict[str, Any]:
    """Return what the rule says of a candidate."""
    rates = {run: best_rate(merits[run]) for run in (DEFAULT, name)}
    default, candidate = (merits[run][rate] for run, rate in rates.items())
    first = {run: merits[run][rate][FIRST_TUNING_SEED] for run, rate in rates.items()}
    found: dict[str, Any] = {"learning_rate": rates[name], "merit": first[name], "minus_default": None}
    seeds = sorted(default.keys() & candidate.keys())
    if first[name] > first[DEFAULT] and len(seeds) >= LEAST_SEEDS:
        mean, low, high = over_seeds([candidate[seed] - default[seed] for seed in seeds])
        found["minus_default"] = {"value": mean, "ci_low": low, "ci_high": high, "seeds": seeds}
    return found


def best_rate(of_run: dict[float, dict[int, float]]) -> float:
    """Return the learning rate with the highest merit on the first seed."""
    return max(of_run, key=lambda rate: of_run[rate].get(FIRST_TUNING_SEED, 0.0))


def main() -> None:
    """Print what the rule says, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, nargs="+", required=True, help="folders of cells")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    merits = read(args.cells)
    if lacking := [name for name in (DEFAULT, *CANDIDATES) if name not in merits]:
        sys.exit(f"error: there are no tuning cells of {', '.join(lacking)}; give the folders that have them")
    rate = best_rate(merits[DEFAULT])
    found: dict[str, dict[str, Any]] = {
        DEFAULT: {"learning_rate": rate, "merit": merits[DEFAULT][rate][FIRST_TUNING_SEED]}
    }
    found |= {name: judged(name, merits) for name in CANDIDATES}
    for name, of in found.items():
        more = ""
        if difference := of.get("minus_default"):
            low, high = (f"{100 * difference[end]:+.1f}" for end in ("ci_low", "ci_high"))
            more = (
                f", minus default {100 * difference['value']:+.1f} ({low} to {high}), {len(difference['seeds'])} seeds"
            )
        print(f"{name}: {100 * of['merit']:.1f} at {of['learning_rate']:g}{more}")
    if args.output:
        write_text(args.output, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
