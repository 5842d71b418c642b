"""Learning curves over the number of training examples."""

from collections.abc import Iterator, Mapping, Sequence

from sails_align.core.text import counted
from sails_align.evaluation.metrics import METRICS, Metric
from sails_align.experiments.summary import CORE, SAFETY, Mean, Outcome, examples_to, with_numbers
from sails_align.reporting import figures
from sails_align.reporting.findings import as_measured, of_learning_rates
from sails_align.reporting.page import Grid, Section, entries, interval
from sails_align.reporting.report import ReportData

WANTED_SAFETY = 0.95
Curves = Mapping[str, Mapping[str, Sequence[tuple[int, Mean]]]]
"""By metric and run: numbers of examples with their means."""


def make(data: ReportData) -> Iterator[Section]:
    """Show learning curves, and how many examples a safety rate takes."""
    outcomes = list(data.outcomes.get("examples", {}).values())
    if not outcomes:
        return
    shares = [metric for metric in CORE if metric.scale == 100]
    found = with_numbers(shares, [row.means for outcome in outcomes for row in outcome.rows])
    metrics = as_measured(found, outcomes[0])
    curves = _curves(outcomes, metrics)
    labels = outcomes[0].labels
    plan = outcomes[0].plan
    harmless = "n harmless" if plan.protocol is None else "the recipes' share of harmless"
    text = [
        f"Trained on n harmful and {harmless} examples, with {counted(plan.n_seeds, 'seed')}. "
        f"{of_learning_rates(outcomes[0])} It is chosen for each n anew. Between the numbers tried the curve is taken "
        "as a line over log n."
    ]
    safety = METRICS[next(name for name in (*SAFETY, *curves) if name in curves)]  # of trained categories if known
    needed = _needed(curves[safety.name], labels)
    head = ["method", f"harmful examples to {WANTED_SAFETY:.0%} {safety.label}"]
    grids = [
        Grid(head, [entries(label, needed.get(label, "–")) for label in labels.values()]),
        *(_levels(curves[metric.name], labels, metric) for metric in metrics),
    ]
    pictures = [figures.curves(curves, labels, metrics)]
    findings = _findings(needed, safety, plan.n_seeds)
    yield Section("How many examples it takes", text, grids, pictures, findings=findings)


def _curves(outcomes: Sequence[Outcome], metrics: Sequence[Metric]) -> Curves:
    curves: dict[str, dict[str, list[tuple[int, Mean]]]] = {}
    for outcome in outcomes:
        for row in outcome.rows:
            for metric in metrics:
                curve = curves.setdefault(metric.name, {}).setdefault(row.run.name, [])
                curve.append((outcome.plan.measures.n_examples or 0, row.means[metric.name]))
    return curves


def _needed(curves: Mapping[str, Sequence[tuple[int, Mean]]], labels: Mapping[str, str]) -> dict[str, str]:
    """Return how many examples the wanted safety takes, in words, by label; no entry where nothing is known."""
    found = {}
    for run, label in labels.items():
        curve = [(n, mean.value) for n, mean in curves[run] if mean.value is not None]
        if not curve:
            continue
        needed = examples_to(WANTED_SAFETY, curve)
        if needed is None:
            found[label] = f"more than {curve[-1][0]}"
        else:
            found[label] = f"at most {curve[0][0]}" if needed == curve[0][0] else f"{needed:.0f}"
    return found


def _findings(needed: Mapping[str, str], safety: Metric, n_seeds: int) -> list[str]:
    """Return a sentence about how many examples each method takes; none if nothing is known."""
    if not needed:
        return []
    told = ", ".join(f"{label} takes {n} harmful examples" for label, n in needed.items())
    goal = f"{WANTED_SAFETY:.0%} {safety.label}".replace(", ", " on ")
    return [f"To reach {goal}, {told} (means over {counted(n_seeds, 'seed')}, without intervals)."]


def _levels(curves: Mapping[str, Sequence[tuple[int, Mean]]], labels: Mapping[str, str], metric: Metric) -> Grid:
    head = [metric.heading, *(f"{n} examples" for n, _ in next(iter(curves.values())))]
    rows = [entries(labels[run], *(interval(mean, metric) for _, mean in curve)) for run, curve in curves.items()]
    return Grid(head, rows)
