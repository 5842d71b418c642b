"""Methods that align a model: what each reaches, and its differences from LoRA and from its control."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf

from sails_align.core.text import counted
from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, SAFETY_RATES, Metric
from sails_align.experiments.methods.entries import METHODS
from sails_align.experiments.summary import Mean, Outcome, with_numbers
from sails_align.reporting import figures
from sails_align.reporting.findings import as_measured, counts, in_doubt, judged, merit_of
from sails_align.reporting.page import Grid, Section, entries, interval
from sails_align.reporting.report import ReportData
from sails_align.reporting.tables import LEFT, RATES, differences_grid, headline

REFERENCES = ("sft-lora", "sft-sails")
"""What all methods are compared with."""
SHOWN = tuple(
    METRICS[name]
    for name in (
        *(rate + of for rate in SAFETY_RATES for of in ("_in_distribution", "_out_of_distribution", "")),
        *("harmfulness", "garbled_rate", "over_refusal_rate", *HELPFULNESS_RATES, "merit"),
        *("left_after_benign", "left_after_harmful"),
        "trainable_share",
    )
)
HEADLINE = (*RATES, ("merit",), LEFT, ("trainable_share",))
"""Metrics of the first table: of each group, the first one that has numbers."""
LEVELS_ONLY = ("trainable_share", "harmfulness", "garbled_rate")
"""Metrics without differences."""


def make(data: ReportData) -> Iterator[Section]:
    """Show a table of all methods, and their differences from the references and from their controls."""
    for outcome in data.outcomes.get("methods", {}).values():
        metrics = as_measured(with_numbers(SHOWN, (row.means for row in outcome.rows)), outcome)
        compared = [metric for metric in metrics if metric.name not in LEVELS_ONLY]
        means = [row.means for row in outcome.rows]
        grids = [
            _levels(outcome, as_measured(headline(means, HEADLINE), outcome), title="", with_knob=False),
            _levels(outcome, metrics, title="All metrics", with_knob=True),
        ]
        pictures = []
        for reference in REFERENCES:
            if reference in outcome.labels:
                found = outcome.minus(reference)
                grids.append(differences_grid(found, outcome.labels, compared, f"minus {outcome.labels[reference]}"))
                title = f"Each method minus {outcome.labels[reference]}, paired by seed"
                shown = as_measured(headline(found.values()), outcome)
                pictures.append(figures.forest(found, outcome.labels, f"methods-{reference}", title, shown))
        controlled = _minus_controls(outcome)
        if found := {pair: means for pairs in controlled.values() for pair, means in pairs.items()}:
            grids.append(differences_grid(found, {pair: pair for pair in found}, compared, "method minus control"))
        findings = list(_findings(outcome, controlled))
        yield Section("All methods", [_setting(outcome)], grids, pictures, findings=findings)
        yield from in_doubt("All methods", outcome)


def _setting(outcome: Outcome) -> str:
    plan = outcome.plan
    left = (
        f"What is left of {judged(outcome)} is measured after further training of all weights: on answered harmless "
        "requests, and on a few answered harmful ones. It is missing where there is no plain model that could be "
        "trained. "
    )
    is_left = with_numbers([METRICS[name] for name in LEFT], (row.means for row in outcome.rows))
    return (
        f"All methods have the same data ({plan.measures.n_examples} harmful requests, and harmless ones) and the same "
        f"number of passes over it, unless their page says otherwise; {counted(plan.n_seeds, 'seed')} (from "
        f"{plan.first_seed}). The hyperparameter of each was chosen by the {merit_of(outcome).label} on validation "
        f"prompts ({counted(plan.n_tuning_seeds, 'other seed')}). {left if is_left else ''}"
        "A control is the same method with its choice made at random, or left out: a method that does not beat its "
        "control has not been shown to work."
    )


def _minus_controls(outcome: Outcome) -> dict[str, dict[str, Mapping[str, Mean]]]:
    """Return for each method that has controls its differences from them, as `METHOD minus CONTROL`."""
    labels = outcome.labels
    found: dict[str, dict[str, Mapping[str, Mean]]] = {}
    for control in labels:
        for name in METHODS.get(control).control_of:
            if name in labels:
                pair = f"{labels[name]} minus {labels[control]}"
                found.setdefault(name, {})[pair] = outcome.difference(name, control)
    return found


def _findings(outcome: Outcome, controlled: Mapping[str, Mapping[str, Mapping[str, Mean]]]) -> Iterator[str]:
    """Yield how many methods are better than each reference, and than their own controls."""
    metric, labels = merit_of(outcome), outcome.labels

    def told(found: Mapping[str, Mapping[str, Mean]], what: str, reference: str) -> str:
        differences = {labels[name]: (means[metric.name], metric) for name, means in found.items()}
        return counts(differences, what, f"better than {reference} by the {metric.label}")

    def size(means: Mapping[str, Mean]) -> float:
        value = means[metric.name].value
        return -inf if value is None else value

    for reference in REFERENCES:
        if reference in labels:
            found = {name: of for name, of in outcome.minus(reference).items() if not METHODS.get(name).control_of}
            yield told(found, "method", labels[reference])
    if controlled:
        of_best = {name: min(pairs.values(), key=size) for name, pairs in controlled.items()}
        yield told(of_best, "controlled method", "their control (of several, the best)")


def _levels(outcome: Outcome, metrics: Sequence[Metric], *, title: str, with_knob: bool) -> Grid:
    """Return what each method reaches, with its hyperparameter if `with_knob`."""
    lines = []
    for row in outcome.rows:
        method = METHODS.get(row.run.name)
        knob = "–" if row.learning_rate is None else f"{method.knob} {row.learning_rate:g}"
        label = f"{row.label}, control" if method.control_of else row.label
        numbers = [interval(row.means[metric.name], metric) for metric in metrics]
        lines.append(entries(label, *([knob] if with_knob else []), *numbers))
    knob_heading = ["hyperparameter"] if with_knob else []
    return Grid(["method", *knob_heading, *(metric.heading for metric in metrics)], lines, title)
