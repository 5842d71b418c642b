"""What each method reaches, whether SAILS beats its baselines and controls, and how it was measured."""

from collections.abc import Iterator, Mapping, Sequence

from sails_align.core.text import counted
from sails_align.experiments.plan import RUNS, Plan, Protocol
from sails_align.experiments.summary import REPORTED, Mean, Outcome, SummaryRow, with_numbers
from sails_align.reporting import figures, trade_offs
from sails_align.reporting.drawing import Picture
from sails_align.reporting.findings import (
    as_measured,
    from_others,
    in_metrics,
    merit_of,
    of_learning_rates,
    of_metrics,
    tuning_seeds,
)
from sails_align.reporting.page import Section
from sails_align.reporting.report import ReportData
from sails_align.reporting.sections import CONTROLS, REFERENCES, SAILS
from sails_align.reporting.tables import headline, levels_grid


def make(data: ReportData) -> Iterator[Section]:
    """Show tables of the headline and of all metrics, and SAILS against its baselines and controls as figures."""
    plan, rows = data.main.plan, data.main.rows
    means = [row.means for row in rows]
    grids = [
        levels_grid(rows, as_measured(headline(means), data.main), "method", rates=False),
        levels_grid(rows, as_measured(with_numbers(REPORTED, means), data.main), "method", title="All metrics"),
    ]
    pictures = [
        *_of_sails(data),
        *(trade_offs.trade_off(rows, names, f"trade_off_{of}") for of, names in trade_offs.by_trainer(plan.runs)),
    ]
    intervals = "Means over seeds with 95% intervals (none below three seeds)."
    yield Section("What each method reaches", [intervals], grids, pictures, findings=list(_findings(data)))
    unscored = ", ".join(f"{row.run.label} {row.n_unscored}" for row in rows)
    text = [
        _setting(data.main),
        *(_of_testbed(plan, rows) if plan.protocol is None else _of_protocol(plan.protocol)),
        f"Responses without a score, of all seeds: {unscored}. They are excluded from all rates.",
        *(f"Doubt: {doubt}" for row in rows for doubt in row.doubts),
        *_of_tuning(data.main),
    ]
    yield Section("How it was measured", text)


def _sails(outcome: Outcome) -> str | None:
    return next((name for name in SAILS if name in outcome.labels), None)


def _findings(data: ReportData) -> Iterator[str]:
    """Yield what SAILS does against its first baseline, and against its controls."""
    outcome, labels = data.main, {row.run.name: row.label for row in data.main.rows}
    ours = _sails(outcome)
    if ours is None:
        yield "No run of SAILS is compared here. The tables show how the methods differ."
        return
    baseline = next((name for name in (*SAILS[ours], *REFERENCES) if name in labels), None)
    if baseline is None:
        baselines = ", ".join(RUNS[name].label for name in REFERENCES)
        yield f"No baseline ({baselines}) is in this comparison, so there is no evidence of a gain by {labels[ours]}."
    else:
        means = outcome.difference(ours, baseline)
        yield in_metrics(labels[ours], labels[baseline], of_metrics(means, headline([means])))
    metric = merit_of(outcome)
    controls = {label: (means[metric.name], metric) for label, means in _controls(data).values()}
    if controls:
        yield from_others(labels[ours], controls, f"Against controls, by the {metric.label}")
    else:
        yield (
            "No control (LoRA in the same blocks, random SAE features, random directions) was run, so there is no "
            "evidence that the SAE features add anything."
        )


def _controls(data: ReportData) -> dict[str, tuple[str, Mapping[str, Mean]]]:
    """Return the label of each control, and SFT with SAILS minus it: of the main study, or else of the ablations."""
    found = {}
    for name, in_ablations in CONTROLS.items():
        for outcome, of in (
            (data.main, name),
            *((of, in_ablations) for of in data.outcomes.get("ablations", {}).values()),
        ):
            if name not in found and {of, "sft-sails"} <= outcome.labels.keys():
                row = next(row for row in outcome.rows if row.run.name == of)
                found[name] = row.label, outcome.difference("sft-sails", of)
    return found


def _of_sails(data: ReportData) -> list[Picture]:
    """Draw SAILS minus its baselines and controls; nothing if there are none."""
    outcome, ours = data.main, _sails(data.main)
    if ours is None:
        return []
    baselines = [name for name in SAILS[ours] if name in outcome.labels]
    found = {name: (outcome.labels[name], outcome.difference(ours, name)) for name in baselines}
    if ours == "sft-sails":
        found |= _controls(data)
    metrics = headline([of for _, of in found.values()])
    if not metrics:
        return []
    labels = {name: label for name, (label, _) in found.items()}
    means = {name: of for name, (_, of) in found.items()}
    title = f"{outcome.labels[ours]} minus each baseline and control, paired by seed"
    return [figures.forest(means, labels, "sails", title, metrics)]


def _setting(outcome: Outcome) -> str:
    """Describe what all methods have in common."""
    plan, n = outcome.plan, outcome.plan.measures.n_examples
    data = "the recipes' own data"
    if n is not None:
        harmless = f"{n} harmless" if plan.protocol is None else "the recipes' harmless"
        data = f"the same {n} harmful and {harmless} training examples for all"
    return (
        f"{counted(plan.n_seeds, 'seed')} (from {plan.first_seed}) of initialization and data; {data}. "
        f"{of_learning_rates(outcome)}"
    )


def _of_tuning(outcome: Outcome) -> list[str]:
    """Say how sure the choice of learning rates is."""
    plan = outcome.plan
    tuned = [row for row in outcome.rows if row.tuning is not None]
    if not tuned or len(plan.learning_rates) < 2:
        return []
    if all(row.tuning is None or len(row.tuning.by_seed) == 1 for row in tuned):
        return ["Learning rates were chosen with one tuning seed; whether others would choose the same is not known."]
    spreads = ", ".join(f"{row.run.label} {100 * row.tuning.spread:.1f}" for row in tuned if row.tuning)
    return [
        f"Learning rates were chosen with {tuning_seeds(outcome)}. At the chosen rate, the highest and the "
        f"lowest {merit_of(outcome).label} of a seed differ by (points): {spreads}."
    ]


def _of_testbed(plan: Plan, rows: Sequence[SummaryRow]) -> list[str]:
    reached = ", ".join(
        f"{row.run.label} {row.means['steps_to_95'].n}" for row in rows if row.run.trainer in ("sft", "dpo")
    )
    n_attacked = min(plan.n_attacked_seeds, plan.n_seeds)
    return [
        f"{plan.measures.n_prompts} test prompts in each of four sets.",
        f"Attacks are GCG: {plan.measures.n_attacked} prompts of each of the first {counted(n_attacked, 'seed')}, the "
        "same search for all.",
        f"Steps to 95% are of the seeds that got there: {reached or 'none'} of {plan.n_seeds}.",
    ]


def _of_protocol(protocol: Protocol) -> list[str]:
    told = [f"{kind} ({part}): {' '.join(options)}" for part, kind, options in protocol.evaluate]
    sets = (("trained", protocol.in_distribution), ("held-out", protocol.out_of_distribution))
    named = ", ".join(f"{words} categories: {name}" for words, name in sets if name is not None)
    return [f"Evaluated by sails eval {told}." for told in told] + ([f"Prompt sets: {named}."] if named else [])
