"""How far the weights have moved from the aligned model's, and what a lower learning rate keeps that moves them as far.

Whatever moves the weights less keeps more of the safety. A defence is worth something if it keeps more than a smaller
learning rate does at the same distance.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sails_align.edits.weights import open_weights
from sails_align.experiments.summary import Mean, Outcome, Result, mean_of, value_of

BETWEEN = ("aligned", "lower-rate", "none")
"""Runs whose results are interpolated: no further training, with a lower learning rate, with the full one."""


def moved(model: Path, aligned: Path) -> float:
    """Return the norm of the difference of all weights, as a share of the norm of the aligned model's.

    One tensor of each model is in memory at a time.
    """
    changed, original = open_weights(model), open_weights(aligned)
    squares, of_all = 0.0, 0.0
    for name in original.names:
        before = original.get(name)
        squares += (changed.get(name) - before).square().sum().item()
        of_all += before.square().sum().item()
    return math.sqrt(squares / of_all)


def minus_lower_rate(outcome: Outcome) -> dict[str, Mean]:
    """Return what each defence keeps minus what a lower learning rate keeps at the same distance, paired by seed.

    That of the lower rate is interpolated linearly between no further training, the lower rate that was chosen, and the
    full rate. Seeds that moved further than the full rate are compared with the full rate. Empty if cells have no
    distances, or there was no lower rate.
    """
    by_run = outcome.by_run
    if not all(by_run.get(name) for name in BETWEEN):
        return {}
    found = {}
    for run in outcome.plan.runs:
        values = [_difference(result, seed, by_run) for seed, result in by_run[run.name].items()]
        if run.name not in BETWEEN and all(value is not None for value in values):
            found[run.name] = mean_of(values)
    return found


def _difference(result: Result, seed: int, by_run: Mapping[str, Mapping[int, Result]]) -> float | None:
    results = [result, *(by_run[name].get(seed) for name in BETWEEN)]
    pairs = [(value_of(of, "moved"), value_of(of, "kept")) for of in results if of is not None]
    known = [(distance, kept) for distance, kept in pairs if distance is not None and kept is not None]
    if len(known) <= len(BETWEEN):
        return None
    (distance, kept), *others = known
    others.sort()
    return kept - float(np.interp(distance, [of[0] for of in others], [of[1] for of in others]))
