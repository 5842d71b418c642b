"""Safety left after further training: with no defence, with controls, and with each method."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from sails_align.core.text import counted
from sails_align.evaluation.intervals import LEAST_SEEDS
from sails_align.evaluation.metrics import METRICS, SAFETY_RATES, Metric
from sails_align.experiments.fronts import Front, fronts_of, hypervolume_difference
from sails_align.experiments.merits import OVER_REFUSAL_BUDGET
from sails_align.experiments.plan import RUNS, Run
from sails_align.experiments.summary import Mean, Outcome, paired, with_numbers
from sails_align.experiments.tampering.attacks import ATTACKS
from sails_align.experiments.tampering.defences import DEFENCES, OWN_CONTROLS
from sails_align.experiments.tampering.distance import minus_lower_rate
from sails_align.reporting import figures, trade_offs
from sails_align.reporting.findings import as_measured, in_doubt, in_metrics, judged, mean_of_rates, of_metrics
from sails_align.reporting.page import Grid, Section, TableCell, difference, entries, interval, number
from sails_align.reporting.report import ReportData
from sails_align.reporting.tables import PERCENT, RATES, differences_grid, headline

SHOWN = tuple(
    METRICS[name]
    for name in (
        *(rate + of for rate in SAFETY_RATES for of in ("_in_distribution", "_out_of_distribution", "")),
        *("over_refusal_rate", "task_score", "correct_answer_rate", "kept"),
    )
)
HEADLINE = (*RATES, ("kept",))
"""Metrics of the first table: of each group, the first one that has numbers."""
KEPT = METRICS["kept"]
FURTHER = "not compared: larger distance"
N_BEST = 5
"""Methods in the figure of safety against the task's score."""


def make(data: ReportData) -> Iterator[Section]:
    """Show, for each attack, what each defence keeps, and which controls it beats; then compare the attacked models."""
    outcomes = data.outcomes.get("tampering", {})
    for name, outcome in outcomes.items():
        yield _section(name, outcome)
        yield from in_doubt(f"Tampering: {name}", outcome)
    for attack, items in groupby(outcomes.items(), lambda item: _attack(item[1])):
        of_models = {_label_of_run(name.rpartition(", ")[2]): outcome for name, outcome in items}
        if len(of_models) > 1:
            yield _models(attack, of_models)


def _attack(outcome: Outcome) -> str:
    tampering = outcome.plan.runs[0].tampering
    assert tampering is not None, "this study tampers with all models"
    return tampering.attack


def _section(name: str, outcome: Outcome) -> Section:
    plan, attack = outcome.plan, ATTACKS.get(_attack(outcome))
    text = [
        f"An aligned model ({_aligned(outcome)}) is {'trained further on' if attack.trains else 'attacked'}: "
        f"{attack.label}. What is left of its {judged(outcome)} is measured after that, with "
        f"{counted(plan.n_seeds, 'seed')} (from {plan.first_seed}). "
        "The hyperparameter of each defence is the one that keeps most on validation prompts "
        f"({counted(plan.n_tuning_seeds, 'other seed')}): the {mean_of_rates(outcome, 'harmonic mean')}, minus "
        f"over-refusal beyond {OVER_REFUSAL_BUDGET:.0%}. "
        "Controls are simple baselines, and for many methods one of their own, which lacks nothing but what the "
        "method chooses. A method that does not beat them has not been shown to work.",
    ]
    at_distance = minus_lower_rate(outcome)
    if at_distance:
        text.append(
            "Whatever changes the weights less keeps more. So a lower learning rate is also compared at the same "
            "change of the weights, interpolated between no further training, the lower rate and the full one. Nothing "
            "is said there of methods that change the weights more than the full rate does."
        )
    means = [row.means for row in outcome.rows]
    metrics = as_measured(with_numbers(SHOWN, means), outcome)
    levels = [*metrics, *with_numbers([METRICS["moved"]], means)]
    grids = [
        _levels(outcome, as_measured(headline(means, HEADLINE), outcome), title="", with_knob=False),
        _levels(outcome, levels, title="All metrics", with_knob=True),
    ]
    pictures, findings = [], []
    slug = name.replace(", ", "-")
    if found := {name: of for name, of in outcome.minus("none").items() if name != "aligned"}:
        grids.append(differences_grid(found, outcome.labels, metrics, "minus no defence"))
        title = f"{attack.label.capitalize()}: each defence minus none, paired by seed"
        pictures = [figures.forest(found, outcome.labels, f"tampering-{slug}", title, metrics)]
        pictures.append(trade_offs.trade_off(outcome.rows, _best(outcome), f"tampering-{slug}-trade_off"))
        findings = [_finding(name, outcome)]
    if _controls(outcome):
        grids.append(_minus(outcome, at_distance))
    if fronts := fronts_of(outcome):
        grids.append(_hypervolumes(fronts))
    return Section(f"Tampering: {name}", text, grids, pictures, findings=findings)


def _label_of_run(name: str) -> str:
    return RUNS[name].label if name in RUNS else name


def _models(attack: str, outcomes: Mapping[str, Outcome]) -> Section:
    """Compare what is left of several aligned models without a defence: the first one minus each other."""
    results = {label: outcome.by_run["none"] for label, outcome in outcomes.items()}
    ours, *theirs = results
    found = {name: paired(results[ours], results[name]) for name in theirs}
    metrics = as_measured(with_numbers(SHOWN, found.values()), outcomes[ours])
    text = [f"What is left of {ours} after the attack, without a defence, minus what is left of others; by seed."]
    labels = {name: f"minus {name}" for name in theirs}
    findings = [
        f"The attack {attack} ({ATTACKS.get(attack).label}) was tried on models without a defence. "
        f"{in_metrics(ours, name, of_metrics(means, metrics))}"
        for name, means in found.items()
    ]
    grid = differences_grid(found, labels, metrics, ours)
    return Section(f"Tampering: {attack}, of several models", text, [grid], findings=findings)


def _aligned(outcome: Outcome) -> str:
    run = outcome.plan.runs[0]
    return f"{run.trainer.upper()}, {' '.join(run.options) or 'the default'}"


def _controls(outcome: Outcome) -> list[str]:
    return [run.name for run in outcome.plan.runs if DEFENCES.get(run.name).is_control]


def _methods(outcome: Outcome) -> list[Run]:
    return [run for run in outcome.plan.runs if run.grid and not DEFENCES.get(run.name).is_control]


def _best(outcome: Outcome) -> list[str]:
    """Return what one figure can show: the common controls, no defence, and the methods that keep most."""
    methods = [run.name for run in _methods(outcome)]
    levels = {row.run.name: row.means[KEPT.name].value or 0.0 for row in outcome.rows}
    best = sorted(methods, key=lambda name: -levels[name])[:N_BEST]
    return ["none", *_common_controls(outcome), *best]


def _common_controls(outcome: Outcome) -> list[str]:
    """Return the controls that every defence is compared with."""
    return [name for name in _controls(outcome) if name not in OWN_CONTROLS.values()]


def controls_of(outcome: Outcome, name: str) -> list[str]:
    """Return the controls that a defence is compared with: those of all, and its own one."""
    own = OWN_CONTROLS.get(name)
    return [*_common_controls(outcome), *([own] if own in _controls(outcome) else [])]


def controls_beaten(outcome: Outcome, name: str, metric: str = KEPT.name) -> tuple[list[str], list[str]]:
    """Return the controls that a defence beats, paired by seed with the interval above 0, and all others."""
    controls = controls_of(outcome, name)
    beaten = [control for control in controls if outcome.difference(name, control)[metric].is_above_zero]
    return beaten, [control for control in controls if control not in beaten]


def _finding(name: str, outcome: Outcome) -> str:
    """Say which methods beat all controls; without controls or intervals nothing is claimed."""
    (kept,) = as_measured([KEPT], outcome)
    where = f"Against the attack {name}"
    methods = _methods(outcome)
    if not _controls(outcome):
        return f"{where}, no control was run, so there is no evidence that any defence works."
    if not methods:
        return f"{where}, no methods were run, only controls."
    if outcome.plan.n_seeds < LEAST_SEEDS:
        return f"{where}, {counted(outcome.plan.n_seeds, 'seed')} give no interval, and no claim is made."
    with_control = [run for run in methods if controls_of(outcome, run.name)]
    winners = [run for run in with_control if not controls_beaten(outcome, run.name)[1]]
    levels = {row.run.name: number(row.means[KEPT.name].value, KEPT) for row in outcome.rows}

    def named(runs: Sequence[Run]) -> str:
        return ", ".join(f"{run.label} ({levels[run.name]}%)" for run in runs)

    found = f"{len(winners) or 'none'} of {counted(len(with_control), 'method')} "
    found += f"{'beat' if len(winners) > 1 else 'beats'} every control by {kept.label}"
    found += f": {named(winners)}" if winners else ""
    if without := [run for run in methods if run not in with_control]:
        found += f"; there is no control for {named(without)}"
    return f"{where}, {found}. Without a defence, {levels['none']}% are kept."


def _levels(outcome: Outcome, metrics: Sequence[Metric], *, title: str, with_knob: bool) -> Grid:
    """Return what is left with each defence, with its hyperparameter if `with_knob`."""
    lines = []
    for row in outcome.rows:
        defence = DEFENCES.get(row.run.name)
        knob = "–" if row.learning_rate is None else f"{defence.knob} {row.learning_rate:g}"
        beaten, others = controls_beaten(outcome, row.run.name)
        told = "" if defence.is_control or not row.run.grid else f"{len(beaten)} of {len(beaten) + len(others)}"
        label = f"{defence.label}, control" if defence.is_control else defence.label
        numbers = [interval(row.means[metric.name], metric) for metric in metrics]
        lines.append(entries(label, *([knob] if with_knob else []), *numbers, told))
    knob_heading = ["hyperparameter"] if with_knob else []
    head = ["defence", *knob_heading, *(metric.heading for metric in metrics), "controls beaten"]
    return Grid(head, lines, title)


def _minus(outcome: Outcome, at_distance: Mapping[str, Mean | None]) -> Grid:
    """Return safety (or refusals) and helpfulness kept of each method minus that of each control, paired by seed.

    `at_distance` is what `minus_lower_rate` found; empty: there is no such column.
    """
    (kept,) = as_measured([KEPT], outcome)
    common = _common_controls(outcome)

    def entry(name: str, control: str | None) -> TableCell:
        return TableCell("") if control is None else difference(outcome.difference(name, control)[KEPT.name], KEPT)

    own_controls = {
        run.name: next((name for name in controls_of(outcome, run.name) if name not in common), None)
        for run in _methods(outcome)
    }
    has_own = any(own_controls.values())
    lines = []
    for run in _methods(outcome):
        shown = [*common, *([own_controls[run.name]] if has_own else [])]
        line = [TableCell(run.label), *(entry(run.name, name) for name in shown)]
        if at_distance:
            found = at_distance.get(run.name)
            line.append(TableCell(FURTHER) if found is None else difference(found, KEPT))
        lines.append(line)
    head = [kept.heading, *(f"minus {outcome.labels[name]}" for name in common)]
    head += ["minus its own control"] if has_own else []
    return Grid([*head, *(["minus a lower learning rate at the same distance"] if at_distance else [])], lines)


def _hypervolumes(fronts: Sequence[Front]) -> Grid:
    """Return the hypervolume of safety (or refusals) against lost score over each knob, minus those of the controls."""
    by_name = {front.run.name: front for front in fronts}
    common = [
        front for name, front in by_name.items() if DEFENCES.get(name).is_control and name not in OWN_CONTROLS.values()
    ]

    def entry(front: Front, other: Front | None) -> TableCell:
        if other is None or other is front:
            return TableCell("")
        return difference(hypervolume_difference(front, other), PERCENT)

    lines = []
    for name, front in by_name.items():
        level, own = TableCell(interval(front.mean_hypervolume, PERCENT)), by_name.get(OWN_CONTROLS.get(name, ""))
        lines.append([TableCell(front.run.label), level, *(entry(front, other) for other in (*common, own))])
    head = ["defence", "hypervolume (%)", *(f"minus {control.run.label}" for control in common)]
    return Grid([*head, "minus its own control"], lines)
