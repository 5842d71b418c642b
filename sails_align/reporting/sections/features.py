"""What the features of the first run with SAE features are, and what training did to them."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sails_align.core.text import counted
from sails_align.evaluation.intervals import SHARE
from sails_align.evaluation.metrics import NOT_NEGATIVE
from sails_align.experiments.summary import mean_of
from sails_align.reporting.page import Grid, Section, entries, interval
from sails_align.reporting.report import ReportData
from sails_align.reporting.tables import PLAIN, WHOLE_PERCENT

N_SHOWN = 4
"""Features of a layer that are shown."""
PRECISIONS = {
    "precision": "precision of the features",
    "precision_of_random": "of random features",
    "precision_of_pca": "of PCA directions",
    "harm_share_of_mean_difference": "mean difference: activation on harm",
}
"""Headings of the numbers of a layer."""
CHANGES = ("harmful_before", "harmful_after", "harmless_before", "harmless_after")
"""A feature's mean activations on requests."""
Explained = Mapping[str, Any]
"""What a cell says of features (`subspace.concepts`, `saes.explain`)."""


def make(data: ReportData) -> Iterator[Section]:
    """Show concepts of harm by layer, changes by feature, and texts that the features are active on."""
    plan = data.main.plan
    for run in plan.runs:
        found = [of["features"] for of in data.main.by_run[run.name].values() if "features" in of]
        if found:
            requests = "held out; harmless ones of the training data" if plan.protocol else "held out"
            text = [
                f"Of {run.label}, {counted(len(found), 'seed')}. A feature is taken as a concept of harm if at least "
                f"80% of its activation at the end of requests ({requests}) is on harmful ones; precision is the "
                "share of the chosen features that are (for PCA directions, of both signs, with their positive part "
                "as activation). Separation: distance between the means of harmful and harmless prompts, in standard "
                "deviations within them.",
                _about_adapters(found),
                f"The features with the highest scores, of seed {plan.first_seed}: how often they are active at the "
                "end of training prompts, and their mean activation at the end of requests, before and after training.",
            ]
            grids = [_layers(found), _changes(found[0])]
            yield Section("What the features mean, and what training did", text, grids, meanings=_meanings(found[0]))
            return


def _about_adapters(found: Sequence[Explained]) -> str:
    onsets = sorted({of["onset"] for of in found if of["onset"] is not None})
    drift = [of["drift"] for of in found if of["drift"]]
    inside = mean_of([values["adapter_energy_inside"] for values in drift], SHARE)
    angle = mean_of([values["adapter_largest_angle"] for values in drift], (0.0, math.pi / 2))
    return (
        f"Adapters start at block {' or '.join(map(str, onsets)) or '0'}. Training left "
        f"{interval(inside, WHOLE_PERCENT)}% of the update's energy in the subspace; the largest angle of any module's "
        f"span from its start is {interval(angle, replace(PLAIN, digits=2))} rad."
    )


def _layers(found: Sequence[Explained]) -> Grid:
    """Return means over seeds, by layer."""
    rows = []
    for layer in found[0]["layers"]:
        separation = interval(mean_of([(of["separation"] or {}).get(layer) for of in found], NOT_NEGATIVE), PLAIN)
        means = (mean_of([of["layers"][layer][name] for of in found], SHARE) for name in PRECISIONS)
        rows.append(entries(layer, separation, *(interval(mean, WHOLE_PERCENT) for mean in means)))
    return Grid(["layer", "separation", *PRECISIONS.values()], rows)


def _changes(of: Explained) -> Grid:
    """Return the highest features of each layer, for one seed."""
    head = ["layer, feature", "score", "active: harmless", "active: harmful", "concept of harm"]
    head += ["on harmful, before", "after", "on harmless, before", "after"]
    rows = [
        entries(
            f"{layer}, {feature['id']}",
            f"{feature['score']:.2f}",
            f"{feature['rate_aligned']:.0%}",
            f"{feature['rate_unaligned']:.0%}",
            "yes" if feature["is_safety"] else "no",
            *(f"{feature[name]:.2f}" for name in CHANGES),
        )
        for layer, found in of["layers"].items()
        for feature in found["features"][:N_SHOWN]
    ]
    return Grid(head, rows)


def _meanings(of: Explained) -> list[Mapping[str, Any]]:
    """Return the texts of the first features of each layer."""
    seen: Counter[int] = Counter()
    shown = []
    for meaning in of["meanings"]:
        seen[meaning["layer"]] += 1
        if seen[meaning["layer"]] <= N_SHOWN:
            shown.append(meaning)
    return shown
