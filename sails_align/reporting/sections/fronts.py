"""Safety (or refusals) against helpfulness, over learning rates: whole fronts, not single points."""

from collections.abc import Iterator, Sequence

from sails_align.evaluation.metrics import METRICS
from sails_align.experiments.fronts import Front, fronts_of, hypervolume_difference
from sails_align.reporting import figures, trade_offs
from sails_align.reporting.findings import judged, merit_of, tuning_seeds
from sails_align.reporting.page import Grid, Section, TableCell, difference, entries, interval, number
from sails_align.reporting.report import ReportData
from sails_align.reporting.tables import PERCENT

BASELINES = ("sft-lora", "sft-full")
"""Runs that hypervolumes are compared with."""
AT_SAFETY = (0.8, 0.9)


def make(data: ReportData) -> Iterator[Section]:
    """Show the fronts of all runs with a grid of learning rates."""
    outcome = data.main
    fronts = fronts_of(outcome)
    if not fronts:
        return
    word = judged(outcome)
    text = [
        "A learning rate puts a method somewhere between harmless and helpful, so whole fronts are compared: all rates "
        f"of the grid, on the validation part, means over {tuning_seeds(outcome)}. The front is of {word} over the "
        "helpfulness that is lost: harmless requests that are not answered rightly, or what the judge's mean score "
        "lacks (a model that training has broken refuses nothing and complies with nothing). The hypervolume is the "
        "area under it, a mean over each seed's own front, with 95% intervals (none below three seeds), and "
        f"differences paired by seed. At equal {word}: on the front of the means; –: none of its rates reaches that."
    ]
    pictures = []
    safety = METRICS["refusal_rate" if word == "refusals" else "safety_rate"]
    for trainer, names in trade_offs.by_trainer(outcome.plan.runs):
        of_trainer = [front for front in fronts if front.run.name in names]
        merits = {run: tuning.merits for run, tuning in outcome.tuning.items() if run in names}
        chosen_by = merit_of(outcome)
        pictures.append(trade_offs.fronts(of_trainer, safety, f"fronts_{trainer}"))
        pictures.append(figures.learning_rates(merits, outcome.rows, f"learning_rates_{trainer}", chosen_by))
    title = f"{word.capitalize()} against helpfulness, over learning rates"
    yield Section(title, text, [_grid(fronts, word)], pictures)


def _grid(fronts: Sequence[Front], word: str) -> Grid:
    """Return the hypervolume of each front, and what it loses at equal safety (or refusals: `word`)."""
    baselines = [front for front in fronts if front.run.name in BASELINES]
    head = [
        "method",
        "hypervolume (%)",
        *(f"minus {front.run.label}" for front in baselines),
        *(f"{name} at {at:.0%} {word} (%)" for at in AT_SAFETY for name in ("helpfulness lost", "over-refusal")),
    ]
    return Grid(head, [_row(front, baselines) for front in fronts])


def _row(front: Front, baselines: Sequence[Front]) -> list[TableCell]:
    points = [front.at(safety) for safety in AT_SAFETY]
    values = [value for point in points for value in ((point.lost, point.over_refusal) if point else (None, None))]
    compared = [
        TableCell("") if other is front else difference(hypervolume_difference(front, other), PERCENT)
        for other in baselines
    ]
    shares = entries(*(number(value, METRICS["over_refusal_rate"]) for value in values))
    return [
        TableCell(front.run.label),
        TableCell(interval(front.mean_hypervolume, PERCENT)),
        *compared,
        *shares,
    ]
