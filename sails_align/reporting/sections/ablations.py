"""Ablations: one setting of SAILS changed in each run."""

from collections.abc import Iterator

from sails_align.core.text import counted
from sails_align.experiments.summary import CORE, with_numbers
from sails_align.reporting import figures
from sails_align.reporting.findings import as_measured, counts, merit_of, of_learning_rates
from sails_align.reporting.page import Section
from sails_align.reporting.report import ReportData
from sails_align.reporting.tables import differences_grid, headline, levels_grid


def make(data: ReportData) -> Iterator[Section]:
    """Show what each change reaches, and its difference from SAILS."""
    for outcome in data.outcomes.get("ablations", {}).values():
        metrics = as_measured(with_numbers(CORE, (row.means for row in outcome.rows)), outcome)
        text = [
            "SAILS with one thing changed in each, and other adapters, on "
            f"{counted(outcome.plan.n_seeds, 'seed')} (from {outcome.plan.first_seed}). "
            f"{of_learning_rates(outcome)} Differences from SAILS are paired by seed, in points; better means that the "
            "change helped."
        ]
        found = outcome.minus("sft-sails")
        title = f"Each ablation minus {outcome.labels['sft-sails']}, paired by seed"
        picture = figures.forest(found, outcome.labels, "ablations", title, headline(found.values()))
        grids = [levels_grid(outcome.rows, metrics, ""), differences_grid(found, outcome.labels, metrics, "method")]
        metric = merit_of(outcome)
        changes = {outcome.labels[name]: (means[metric.name], metric) for name, means in found.items()}
        finding = counts(changes, "ablation", f"better than {outcome.labels['sft-sails']} by the {metric.label}")
        yield Section("Ablations", text, grids, [picture], findings=[finding])
