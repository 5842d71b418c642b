"""What each method reaches, and what all have in common."""

from collections.abc import Iterator, Sequence

from sails_align.core.text import counted
from sails_align.experiments.plan import Plan, Protocol
from sails_align.experiments.summary import REPORTED, Row, with_numbers
from sails_align.reporting import figures
from sails_align.reporting.page import Section
from sails_align.reporting.report import ReportData
from sails_align.reporting.tables import levels_grid


def make(data: ReportData) -> Iterator[Section]:
    """Show a table of all metrics, and safety against helpfulness as a figure."""
    plan, rows = data.main.plan, data.main.rows
    unscored = ", ".join(f"{row.run.label} {row.n_unscored}" for row in rows)
    text = [
        _setting(plan),
        *(_of_testbed(plan, rows) if plan.protocol is None else _of_protocol(plan.protocol)),
        f"Responses without a score, of all seeds: {unscored}. They are excluded from all rates.",
        *(f"Doubt: {doubt}" for row in rows for doubt in row.doubts),
        *_of_tuning(plan, rows),
    ]
    grid = levels_grid(rows, with_numbers(REPORTED, (row.means for row in rows)), "method")
    yield Section("What each method reaches", text, [grid], [figures.trade_off(rows)])


def _setting(plan: Plan) -> str:
    """Describe what all methods have in common."""
    n = plan.measures.n_examples
    data = "the recipes' own data" if n is None else f"the same {n} harmful and {n} harmless training examples for all"
    return (
        f"{counted(plan.n_seeds, 'seed')} (from {plan.first_seed}) of initialization and data; {data}. Each method "
        "has its own learning rate, chosen from one grid on the validation part by the mean of safety rate and "
        "helpfulness (right answers, or what of it is known). Means over seeds with 95% intervals (none below three "
        "seeds)."
    )


def _of_tuning(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """Say how sure the choice of learning rates is."""
    tuned = [row for row in rows if row.tuning is not None]
    if not tuned or len(plan.learning_rates) < 2:
        return []
    if plan.n_tuning_seeds == 1:
        return ["Learning rates were chosen with one tuning seed; whether others would choose the same is not known."]
    spreads = ", ".join(f"{row.run.label} {100 * row.tuning.spread:.1f}" for row in tuned if row.tuning)
    return [
        f"Learning rates were chosen with {plan.n_tuning_seeds} tuning seeds. Their highest and lowest mean of safety "
        f"and helpfulness at the chosen rate differ by (points): {spreads}."
    ]


def _of_testbed(plan: Plan, rows: Sequence[Row]) -> list[str]:
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
