"""The same comparison in other worlds."""

from collections.abc import Iterator

from sails_align.core.text import counted
from sails_align.experiments.summary import CORE, with_numbers
from sails_align.reporting import figures
from sails_align.reporting.findings import as_measured, counts, merit_of
from sails_align.reporting.page import Section
from sails_align.reporting.report import ReportData
from sails_align.reporting.sections import REFERENCES
from sails_align.reporting.tables import differences_grid, headline, levels_grid


def make(data: ReportData) -> Iterator[Section]:
    """Show SAILS minus each other method, by world, and what each reaches."""
    outcomes = data.outcomes.get("worlds", {})
    if not outcomes:
        return
    first = next(iter(outcomes.values()))
    found = with_numbers(CORE, [row.means for outcome in outcomes.values() for row in outcome.rows])
    metrics = as_measured(found, first)
    grids, pictures, findings = [], [], []
    for baseline, label in first.labels.items():
        if baseline == "sft-sails":
            continue
        found = {world: outcome.difference("sft-sails", baseline) for world, outcome in outcomes.items()}
        names, title = {world: world for world in found}, f"{first.labels['sft-sails']} minus {label}"
        if not findings and baseline in REFERENCES:
            metric = merit_of(first)
            of_merit = {world: (means[metric.name], metric) for world, means in found.items()}
            ours = first.labels["sft-sails"]
            better = f"better for {ours} than for {label} by the {metric.label}"
            findings.append(counts(of_merit, "other world", better))
        grids.append(differences_grid(found, names, metrics, title))
        title, metrics_shown = f"{title}, by world, paired by seed", headline(found.values())
        pictures.append(figures.forest(found, names, f"worlds_{baseline}", title, metrics_shown, of=baseline))
    grids += [levels_grid(outcome.rows, metrics, world) for world, outcome in outcomes.items()]
    text = [
        "testbed:N is the world of seed N; else the world, or its alignment data, differs from the default one in the "
        "parameter; another world has its own model and SAEs. "
        f"{counted(first.plan.n_seeds, 'seed')} (from {first.plan.first_seed}); nothing but the learning rates was "
        "chosen in them. Differences are paired by seed, in points; then what each method reaches."
    ]
    yield Section("Other worlds", text, grids, pictures, findings=findings)
