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

from sails_align.core.files import write_json
from sails_align.evaluation.intervals import LEAST_SEEDS, over_seeds
from sails_align.experiments.merits import merit
from sails_align.experiments.plan import FIRST_TUNING_SEED

DEFAULT = "sft-sails"
CANDIDATES = ("sft-sails-paper", "layers-sae", "mode-init", "not-whitened", "tokens-all", "score-attribution")
LATER = ("score-read-write", "k-16", "k-256", "rank-4")
"""Variants that were tried after the rule had been applied to the candidates, by the same rule."""
NAMES = (DEFAULT, *CANDIDATES, *LATER)

Merits = dict[str, dict[float, dict[int, float]]]
"""By run, learning rate and seed."""


def read(folders: list[Path]) -> Merits:
    """Read the merits of tuning cells."""
    found: Merits = defaultdict(lambda: defaultdict(dict))
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        result = json.loads(path.read_text(encoding="utf-8"))
        cell = result["cell"]
        if cell["part"] == "validation" and cell["run"] in NAMES:
            found[cell["run"]][cell["learning_rate"]][cell["seed"]] = merit(result)
    return found


def judged(candidate: dict[int, float], default: dict[int, float]) -> dict[str, Any] | None:
    """Return a candidate's difference from the default, by the merits of seeds; None if the rule drops it."""
    seeds = sorted(default.keys() & candidate.keys())
    if candidate[FIRST_TUNING_SEED] <= default[FIRST_TUNING_SEED] or len(seeds) < LEAST_SEEDS:
        return None
    mean, low, high = over_seeds([candidate[seed] - default[seed] for seed in seeds])
    return {"value": mean, "ci_low": low, "ci_high": high, "seeds": seeds}


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
    if lacking := [name for name in NAMES if name not in merits]:
        sys.exit(f"error: there are no tuning cells of {', '.join(lacking)}; give the folders that have them")
    found: dict[str, dict[str, Any]] = {}
    default = merits[DEFAULT][best_rate(merits[DEFAULT])]
    for name in NAMES:
        rate = best_rate(merits[name])
        by_seed = merits[name][rate]
        found[name] = {"learning_rate": rate, "merit": by_seed[FIRST_TUNING_SEED]}
        if name != DEFAULT:
            found[name]["minus_default"] = judged(by_seed, default)
    for name, of in found.items():
        more = ""
        if difference := of.get("minus_default"):
            low, high = (f"{100 * difference[end]:+.1f}" for end in ("ci_low", "ci_high"))
            more = (
                f", minus default {100 * difference['value']:+.1f} ({low} to {high}), {len(difference['seeds'])} seeds"
            )
        print(f"{name}: {100 * of['merit']:.1f} at {of['learning_rate']:g}{more}")
    if args.output:
        write_json(args.output, found)


if __name__ == "__main__":
    main()
