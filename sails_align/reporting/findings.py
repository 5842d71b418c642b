"""Say in plain sentences what was found, and no more than the intervals show.

Better and worse are said only if the whole 95% interval of a difference is on one side of 0. Where there is no
interval (fewer than three seeds, or the same difference in all), the sentence says so and claims nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from sails_align.core.text import counted
from sails_align.evaluation.intervals import LEAST_SEEDS
from sails_align.evaluation.metrics import HELPFULNESS_RATES, METRICS, SAFETY_RATES, Metric
from sails_align.experiments.summary import Mean, Outcome
from sails_align.reporting.page import Section, difference, verdict

FEW_SEEDS = 10
OF_SAFETY = ("kept", "left_after_benign", "left_after_harmful", "steps_to_95")
"""Metrics that any judge's rate goes into, with labels that name safety."""
N_NAMES = 6
Differences = Mapping[str, tuple[Mean, Metric]]
"""By name: of a metric, or of what is compared."""
VERDICTS = {"better": "better than", "worse": "worse than", "open": "not shown to differ from"}


def of_metrics(means: Mapping[str, Mean], metrics: Sequence[Metric]) -> Differences:
    """Return one method's differences by metric, without those that differences are not computed of."""
    return {
        metric.label.replace(", ", " on "): (means[metric.name], metric) for metric in metrics if metric.name in means
    }


def merit_of(outcome: Outcome) -> Metric:
    """Return what methods are ranked by: the mean of safety and helpfulness, named by what was measured.

    Where no helpfulness was measured, it is the safety (or refusal) rate.
    """
    safety, helpful = _rates_of(outcome)
    return METRICS[safety] if helpful is None else as_measured([METRICS["merit"]], outcome)[0]


def mean_of_rates(outcome: Outcome, mean: str = "mean") -> str:
    """Name the mean of the safety (or refusal) rate and the helpfulness that were measured; without both, the rate."""
    safety, helpful = (name and METRICS[name].label for name in _rates_of(outcome))
    return f"{mean} of {safety} and {helpful}" if helpful else str(safety)


def judged(outcome: Outcome) -> str:
    """Return what the judge measured: `safety`, or `refusals` if it knows refusals only."""
    return "refusals" if _rates_of(outcome)[0] == "refusal_rate" else "safety"


def as_measured(metrics: Iterable[Metric], outcome: Outcome) -> list[Metric]:
    """Return the metrics with labels that say refusals where only these were judged, and no helpfulness without any."""
    word, helpful = judged(outcome), _rates_of(outcome)[1]
    named = []
    for metric in metrics:
        label = metric.label
        if metric.name == "merit" and (word == "refusals" or helpful is None):
            label = mean_of_rates(outcome)
        elif metric.name in OF_SAFETY:
            label = label.replace("safety", word)
        if metric.name == "kept" and helpful is None:
            label = label.replace(" and helpfulness", "")
        named.append(replace(metric, label=label))
    return named


def _rates_of(outcome: Outcome) -> tuple[str, str | None]:
    """Return the names of the safety (or refusal) rate and of the helpfulness that were measured."""
    measured = {name for row in outcome.rows for name, mean in row.means.items() if mean.value is not None}
    safety = next((name for name in SAFETY_RATES if name in measured), "safety_rate")
    return safety, next((name for name in HELPFULNESS_RATES if name in measured), None)


def tuning_seeds(outcome: Outcome) -> str:
    """Return the number of tuning seeds that were used: `2 to 4 tuning seeds`, as some runs got more of them."""
    used = {len(row.tuning.by_seed) for row in outcome.rows if row.tuning} or {outcome.plan.n_tuning_seeds}
    most = counted(max(used), "tuning seed")
    return most if len(used) == 1 else f"{min(used)} to {most}"


def of_learning_rates(outcome: Outcome) -> str:
    """Say how the learning rates of a plan's trainings were chosen."""
    trained = [run for run in outcome.plan.runs if not run.is_reference]
    given = [run.label for run in trained if not run.is_tuned]
    if trained and len(given) == len(trained):
        return "Learning rates are those of the recipes or of the runs' options; none was chosen here."
    others = f" (not chosen: {_listed(given)})" if given else ""
    return (
        "Each method has its own learning rate, chosen from one grid on the validation part by the "
        f"{mean_of_rates(outcome)}{others}."
    )


def by_verdict(found: Differences) -> dict[str, list[str]]:
    """Return the names by what their intervals show: `better`, `worse`, `open` (it holds 0) or `none` (there is none).

    What has no number is left out.
    """
    told: dict[str, list[str]] = {kind: [] for kind in (*VERDICTS, "none")}
    for name, (mean, metric) in found.items():
        if mean.value is not None:
            told["none" if mean.low is None else verdict(mean, metric)].append(name)
    return told


def in_metrics(ours: str, theirs: str, found: Differences) -> str:
    """Return sentences about one method's differences from another, by metric."""
    told = by_verdict(found)
    sentences = [
        f"{ours} is {kind} than {theirs} in {_with_numbers(told[kind], found)}."
        for kind in ("better", "worse")
        if told[kind]
    ]
    if told["open"]:
        sentences.append(f"No difference of {ours} from {theirs} is shown in {_with_numbers(told['open'], found)}.")
    if told["none"]:
        reason = _without_interval(told["none"], found)
        numbers = _with_numbers(told["none"], found)
        sentences.append(f"{reason[0].upper()}{reason[1:]}. {ours} minus {theirs}: {numbers}.")
    return " ".join(sentences) or f"{ours} and {theirs} have no metric in common."


def from_others(ours: str, found: Differences, words: str) -> str:
    """Return a sentence, or several, about one method's differences from others by one metric.

    Args:
        ours: the method.
        found: differences by the other's name.
        words: what the sentence begins with.
    """
    told = by_verdict(found)
    clauses = [f"is {than} {_with_numbers(told[kind], found)}" for kind, than in VERDICTS.items() if told[kind]]
    sentences = [f"{words}, {ours} {'. It '.join(clauses)}."] if clauses else []
    if told["none"]:
        numbers = _with_numbers(told["none"], found)
        sentences.append(f"{words}, {_without_interval(told['none'], found)}. {ours} minus {numbers}.")
    if told["open"] or told["worse"]:
        n_others = len(told["open"]) + len(told["worse"])
        these = "this control" if n_others == 1 else "these controls"
        others = "the controls that it does not beat" if told["better"] else these
        sentences.append(f"There is no evidence that {ours} adds anything to {others}.")
    return " ".join(sentences)


def counts(found: Differences, what: str, better: str) -> str:
    """Return a sentence that counts verdicts, and names what is better or worse.

    Args:
        found: differences of what is counted, by name.
        what: one of them is called, such as `method`.
        better: what the better ones are: `better than SFT-LoRA by the refusal rate`.
    """
    told = by_verdict(found)
    n = sum(map(len, told.values()))
    if n and len(told["none"]) == n:
        reason = _without_interval(told["none"], found)
        which = f"whether 1 {what} is" if n == 1 else f"which of {counted(n, what)} are"
        return f"{reason[0].upper()}{reason[1:]} about {which} {better}."
    clauses = [f"{_are(told['better'])} {better}{_bracketed(told['better'])}"]
    if told["worse"]:
        clauses.append(f"{_are(told['worse'])} worse{_bracketed(told['worse'])}")
    if told["open"]:
        clauses.append(f"{_are(told['open'])} not shown to differ")
    if told["none"]:
        clauses.append(f"{_are(told['none'])} without an interval")
    *first, last = clauses
    return f"Of {counted(n, what)}, {', '.join([*first, f'and {last}']) if first else last}."


def _are(names: Sequence[str]) -> str:
    return f"{len(names) or 'none'} {'are' if len(names) > 1 else 'is'}"


def not_known(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence about what the numbers of a study's plans do not show, or what is doubtful in them."""
    plan, rows = outcomes[0].plan, [row for outcome in outcomes for row in outcome.rows]
    told = []
    if plan.n_seeds < FEW_SEEDS:
        least = ", too few for intervals" * (plan.n_seeds < LEAST_SEEDS)
        are = "is" if plan.n_seeds == 1 else "are"
        told.append(f"there {are} only {counted(plan.n_seeds, 'seed')}{least}")
    if plan.n_tuning_seeds == 1 and any(row.tuning and len(row.tuning.merits) > 1 for row in rows):
        told.append("learning rates were chosen with one tuning seed")
    if unstable := [row.run.label for row in rows if row.unstable_seeds]:
        told.append(f"seeds are unstable, so that means describe no model: {_listed(unstable)}")
    if doubted := [row.run.label for row in rows if row.tuning and row.tuning.doubts()]:
        told.append(f"the choice of the learning rate or hyperparameter is doubtful: {_listed(doubted)}")
    if n_unscored := sum(row.n_unscored for row in rows):
        told.append(f"{counted(n_unscored, 'response')} could not be scored")
    if any(row.means["refusal_rate"].n for row in rows):
        told.append("the judge knows refusals and not harm, so safety itself is not measured")
    told.append("one tiny world says nothing about large models" if plan.protocol is None else "this is one model only")
    return [f"Not known, or in doubt: {'; '.join(told)}."]


def _with_numbers(names: Sequence[str], found: Differences) -> str:
    return "; ".join(f"{name}: {difference(*found[name]).text}" for name in names)


def _without_interval(names: Sequence[str], found: Differences) -> str:
    """Say why some differences have no interval, and so nothing is claimed."""
    n = max(found[name][0].n for name in names)
    if n < LEAST_SEEDS:
        return f"with {counted(n, 'seed')} there is no interval, and no claim is made"
    return "where all seeds have the same difference there is no interval, and no claim is made"


def _bracketed(names: Sequence[str]) -> str:
    return f" ({_listed(names)})" if names else ""


def _listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = len(names) - N_NAMES
    return ", ".join([*names[:N_NAMES], *([f"{more} more"] if more > 0 else [])])


def in_doubt(title: str, outcome: Outcome) -> Iterator[Section]:
    """Yield a section on what makes the numbers of a side study doubtful, if anything does."""
    if doubts := [doubt for row in outcome.rows for doubt in row.doubts]:
        yield Section(f"{title}, what is in doubt", doubts)
