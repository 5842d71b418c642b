"""Time by stage."""

from collections import Counter
from collections.abc import Iterator

from sails_align.reporting.page import Grid, Section, entries
from sails_align.reporting.report import ReportData

MODEL_WORK = (
    *("subspace", "train", "probe", "evaluate", "attack", "capability", "explain", "relearn"),
    *("safety", "helpfulness", "divergence", "harness"),
)
"""Stages that run the model."""


def make(data: ReportData) -> Iterator[Section]:
    """Show the seconds of each stage."""
    outcome = data.main
    results = [*outcome.tuned.values(), *outcome.tested.values()]
    n_untrained = sum(len(outcome.by_run[run.name]) for run in outcome.plan.runs if run.trainer == "none")
    stages: Counter[str] = Counter()
    for result in results:
        stages.update(result["cost"]["seconds"])
    total = sum(stages.values()) or 1.0
    grid = Grid(
        ["stage", "seconds", "share (%)"],
        [entries(stage, f"{seconds:,.0f}", f"{100 * seconds / total:.1f}") for stage, seconds in stages.most_common()],
    )
    of_model = sum(stages[stage] for stage in MODEL_WORK)
    text = [
        f"{len(results) - n_untrained} trainings, {total:,.0f} seconds in all; {of_model / total:.0%} in stages that "
        "run the model (benchmarks/comparison_profile.py says how much of them is forward and backward passes)."
    ]
    yield Section("What it cost", text, [grid])
