"""How far the weights have moved from the aligned model's, and what a lower learning rate keeps that moves them as far.

Whatever moves the weights less keeps more of the safety. A defence is worth something if it keeps more than a smaller
learning rate does at the same distance.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sails_align.edits.weights import open_weights, relative_change
from sails_align.evaluation.intervals import span_of_difference
from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.merits import kept_of, kept_parts
from sails_align.experiments.summary import Mean, Outcome, Result, mean_of, value_of

BETWEEN = ("aligned", "lower-rate", "none")
"""Runs whose results are interpolated: no further training, with a lower learning rate, with the full one."""


def moved(model: Path, aligned: Path) -> float:
    """Return the norm of the difference of all weights, as a share of the norm of the aligned model's.

    Raises `InputError` as `open_weights` and `relative_change`.
    """
    return relative_change(open_weights(model), open_weights(aligned))


def minus_lower_rate(outcome: Outcome) -> dict[str, Mean | None]:
    """Return what each defence keeps minus what a lower learning rate keeps at the same distance, paired by seed.

    Safety, helpfulness and over-refusal of the lower rate are interpolated linearly between no further training, the
    lower rate that was chosen, and the full rate; what it keeps follows from them. None for a defence that on some seed
    moves the weights further than the full rate does: nothing is known there. Empty if cells have no distances, or
    there was no lower rate.
    """
    by_run = outcome.by_run
    if not all(value_of(result, "moved") is not None for name in BETWEEN for result in by_run.get(name, {}).values()):
        return {}
    if not all(by_run.get(name) for name in BETWEEN):
        return {}
    span = span_of_difference(METRICS["kept"].span)
    found: dict[str, Mean | None] = {}
    for run in outcome.plan.runs:
        if run.name not in BETWEEN:
            values = [_difference(result, seed, by_run) for seed, result in by_run[run.name].items()]
            found[run.name] = None if None in values else mean_of(values, span)
    return found


def _difference(result: Result, seed: int, by_run: Mapping[str, Mapping[int, Result]]) -> float | None:
    """Return the difference of a seed; None if its weights moved further than at the full rate, or nobody knows."""
    others = [by_run[name][seed] for name in BETWEEN if seed in by_run[name]]
    others.sort(key=_distance)
    distance, distances = _distance(result), [_distance(other) for other in others]
    if value_of(result, "moved") is None or len(others) < len(BETWEEN) or distance > distances[-1]:
        return None
    safety, helpful, over_refusal = zip(*map(kept_parts, others), strict=True)

    def at_distance(rates: Sequence[float]) -> float:
        return float(np.interp(distance, distances, rates))

    return kept_of(*kept_parts(result)) - kept_of(
        at_distance(safety), None if None in helpful else at_distance(helpful), at_distance(over_refusal)
    )


def _distance(result: Result) -> float:
    return value_of(result, "moved") or 0.0
