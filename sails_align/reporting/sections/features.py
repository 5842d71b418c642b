"""What the features of the first run with SAE features are, and what training did to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sails_align.experiments.summary import Outcome, mean_of
from sails_align.reporting.page import Grid, Section, entries, interval
from sails_align.reporting.report import Comparison
from sails_align.reporting.tables import PLAIN, WHOLE_PERCENT, counted

N_SHOWN = 4
"""Features of a layer whose texts are shown."""
PRECISIONS = {
    "precision": "precision of the features",
    "precision_of_random": "of random features",
    "precision_of_pca": "of PCA directions",
    "harm_share_of_mean_difference": "mean difference: activation on harm",
}
"""Of a layer, as cells have them, with their headings."""
CHANGES = ("harmful_before", "harmful_after", "harmless_before", "harmless_after")
"""Of a feature's mean activation on requests, as cells have it."""
Explained = Mapping[str, Any]
"""What a cell tells of features (`subspace.concepts`, `subspace.meaning`)."""


def make(comparison: Comparison) -> Iterator[Section]:
    """Concepts of harm by layer, changes by feature, and texts that the features are active on."""
    outcome = comparison.main
    with_features = (
        (run.label, found)
        for run in outcome.plan.runs
        if (found := [of["features"] for of in outcome.by_run[run.name].values() if "features" in of])
    )
    label, found = next(with_features, ("", []))
    if found:
        text = [*_text(outcome, label, found), _about_changes(outcome)]
        grids = [_layers(found), _changes(found[0])]
        yield Section("What the features mean, and what training did", text, grids, meanings=_meanings(found[0]))


def _text(outcome: Outcome, label: str, found: Sequence[Explained]) -> Iterator[str]:
    requests = "held out; harmless ones of the training data" if outcome.plan.protocol else "held out"
    yield (
        f"Of {label}, {counted(len(found), 'seed')}. A feature is taken as a concept of harm if at least "
        f"80% of its activation at the end of requests ({requests}) is on harmful ones; precision is the share of the "
        "chosen features that are (for PCA directions, of both signs, with their positive part as activation). "
        "Separation: distance between the means of harmful and harmless prompts, in standard deviations within them."
    )
    onsets = sorted({of["onset"] for of in found if of["onset"] is not None})
    drift = [of["drift"] for of in found if of["drift"]]
    inside, angle = (
        mean_of([values[name] for values in drift]) for name in ("adapter_energy_inside", "adapter_largest_angle")
    )
    yield (
        f"Adapters start at block {' or '.join(map(str, onsets)) or '0'}. Training left "
        f"{interval(inside, WHOLE_PERCENT)}% of the update's energy in the subspace; the largest angle of any module's "
        f"span from its start is {interval(angle, replace(PLAIN, digits=2))} rad."
    )


def _about_changes(outcome: Outcome) -> str:
    return (
        f"The features with the highest scores, of seed {outcome.plan.first_seed}: how often they are active at the "
        "end of training prompts, and their mean activation at the end of requests, before and after training."
    )


def _layers(found: Sequence[Explained]) -> Grid:
    """By layer, means over seeds."""

    def row(layer: str) -> Iterator[str]:
        yield interval(mean_of([(of["separation"] or {}).get(layer) for of in found]), PLAIN)
        for name in PRECISIONS:
            yield interval(mean_of([of["layers"][layer][name] for of in found]), WHOLE_PERCENT)

    head = ["layer", "separation", *PRECISIONS.values()]
    return Grid(head, [entries(layer, *row(layer)) for layer in found[0]["layers"]])


def _changes(of: Explained) -> Grid:
    """Of the highest features of each layer, for one seed."""

    def row(layer: str, feature: Mapping[str, Any]) -> Iterator[str]:
        yield f"{layer}, {feature['id']}"
        yield f"{feature['score']:.2f}"
        yield f"{feature['rate_aligned']:.0%}"
        yield f"{feature['rate_unaligned']:.0%}"
        yield "yes" if feature["is_safety"] else "no"
        yield from (f"{feature[name]:.2f}" for name in CHANGES)

    head = ["layer, feature", "score", "active: harmless", "active: harmful", "concept of harm"]
    head += ["on harmful, before", "after", "on harmless, before", "after"]
    features = ((layer, feature) for layer, found in of["layers"].items() for feature in found["features"][:N_SHOWN])
    return Grid(head, [entries(*row(layer, feature)) for layer, feature in features])


def _meanings(of: Explained) -> list[Mapping[str, Any]]:
    """Texts of the first features of each layer."""
    seen: dict[int, int] = {}
    shown = []
    for meaning in of["meanings"]:
        seen[meaning["layer"]] = seen.get(meaning["layer"], 0) + 1
        if seen[meaning["layer"]] <= N_SHOWN:
            shown.append(meaning)
    return shown
