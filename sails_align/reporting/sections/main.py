"""Results of cells -> the sections of a report on the main comparison. All numbers come from cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sails_align.experiments.plan import Plan, Protocol
from sails_align.experiments.summary import (
    COMPARED,
    MEASURES,
    Mean,
    Measure,
    Result,
    Row,
    by_run,
    categories,
    differences,
    fronts,
    hypervolume_difference,
    mean_of,
    merits,
    rows_of,
    with_numbers,
)
from sails_align.reporting import figures
from sails_align.reporting.page import Entry, Grid, Section, difference, entries, interval, number

REFERENCES = ("sft-lora", "sft-full", "dpo-lora", "dpo-full")
"""What other runs of the same trainer are compared with, pair by pair."""
AT_SAFETY = (0.8, 0.9)
N_SHOWN = 4
"""Features of a layer whose texts are shown."""
CHANGES = ("harmful_before", "harmful_after", "harmless_before", "harmless_after")
"""Of a feature's mean activation on requests, as cells have it."""
BARS = (
    ("harmful", "safety_harmful", "Safety rate by category: trained harm categories"),
    ("ood", "safety_ood", "Safety rate by category: new harm categories"),
    ("harmless", "over_refusal", "Over-refusal by category of harmless requests"),
)
"""Splits, each with its figure's name and title."""
MODEL_WORK = (
    *("subspace", "train", "probe", "evaluate", "attack", "capability", "explain", "relearn"),
    *("safety", "helpfulness", "harness"),
)


@dataclass(frozen=True)
class Found:
    """The results of one plan, and the learning rates that they chose."""

    plan: Plan
    tuned: Mapping[str, Result]
    tested: Mapping[str, Result]
    chosen: Mapping[str, float]

    @property
    def rows(self) -> list[Row]:
        return rows_of(self.plan, self.tested, self.chosen)

    @property
    def labels(self) -> dict[str, str]:
        return {run.name: run.label for run in self.plan.runs}

    def minus(self, reference: str) -> dict[str, dict[str, Mean]]:
        """Every trained run's differences from one of them."""
        names = [run.name for run in self.plan.runs if not run.is_reference and run.name != reference]
        return {name: differences(self.plan, self.tested, self.chosen, name, reference) for name in names}


def main_sections(found: Found) -> list[Section]:
    """What each method reaches, the differences, fronts, categories, and what later training leaves."""
    rows, names = found.rows, {run.name for run in found.plan.runs}
    sections = [_headline(found, rows)]
    compared = {name: of for name in REFERENCES if name in names and (of := found.minus(name))}
    for reference, of in compared.items():
        title = f"Minus {found.labels[reference]}"
        measures = with_numbers(COMPARED, of.values())
        picture = figures.forest(of, found.labels, f"minus_{reference}", f"{title}, paired by seed", measures)
        text = [
            "Paired by seed, in points (steps: in steps), with 95% intervals. Better and worse are marked where the "
            "interval does not hold 0."
        ]
        sections.append(Section(title, text, [differences_grid(of, found.labels, COMPARED)], [picture]))
    if found.tuned:
        sections.append(_fronts(found, rows))
    pictures = [
        figures.bars(of_split, rows, name, title, "%")
        for split, name, title in BARS
        if (of_split := categories(found.plan, found.tested, found.chosen, split))
    ]
    sections.append(Section("By category", pictures=pictures))
    features = _features(found)
    return [*sections, *([features] if features else []), _cost(found)]


def _headline(found: Found, rows: Sequence[Row]) -> Section:
    plan = found.plan
    measures = with_numbers(MEASURES, (row.means for row in rows))
    grid = levels_grid(rows, measures, "method")
    unscored = ", ".join(f"{row.run.label} {row.n_unscored}" for row in rows)
    text = [_setting(plan), *(_of_testbed(plan, rows) if plan.protocol is None else _of_protocol(plan.protocol))]
    text.append(f"Responses without a score, of all seeds: {unscored}. They are in no rate.")
    return Section("What each method reaches", text, [grid], [figures.trade_off(rows)])


def _setting(plan: Plan) -> str:
    """What all methods have in common."""
    n = plan.measures.n_examples
    data = "the recipes' own data" if n is None else f"the same {n} harmful and {n} harmless training examples for all"
    return (
        f"{counted(plan.n_seeds, 'seed')} (from {plan.first_seed}) of initialisation and data; {data}. Each method "
        "has its own learning rate, chosen from one grid on the validation part by the mean of safety rate and "
        "helpfulness (right answers, or what of it is known). Means over seeds with 95% t intervals."
    )


def counted(n: int, what: str) -> str:
    """A number of things, in words."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def _of_testbed(plan: Plan, rows: Sequence[Row]) -> list[str]:
    reached = ", ".join(
        f"{row.run.label} {row.means['steps_to_95'].n}" for row in rows if row.run.trainer in ("sft", "dpo")
    )
    n_attacked = min(plan.n_attacked_seeds, plan.n_seeds)
    return [
        f"{plan.measures.n_prompts} test prompts in each of four sets.",
        f"GCG: {plan.measures.n_attacked} prompts of each of the first {counted(n_attacked, 'seed')}, the same search "
        "for all.",
        f"Steps to 95% are of the seeds that got there: {reached or 'none'} of {plan.n_seeds}.",
    ]


def _of_protocol(protocol: Protocol) -> list[str]:
    told = [f"{kind} ({part}): {' '.join(options)}" for part, kind, options in protocol.evaluate]
    sets = (("trained", protocol.in_distribution), ("new", protocol.out_of_distribution))
    named = ", ".join(f"{words} categories: {name}" for words, name in sets if name is not None)
    return [f"Evaluated by sails eval {told}." for told in told] + ([f"Prompt sets: {named}."] if named else [])


def levels_grid(rows: Sequence[Row], measures: Sequence[Measure], title: str) -> Grid:
    """What each method reaches: a line for each, with its learning rate."""

    def rate(row: Row) -> str:
        return "–" if row.learning_rate is None else f"{row.learning_rate:g}"

    return Grid(
        [title, "learning rate", *(measure.label for measure in measures)],
        [
            entries(row.run.label, rate(row), *(interval(row.means[measure.name], measure) for measure in measures))
            for row in rows
        ],
    )


def differences_grid(
    of: Mapping[str, Mapping[str, Mean]], labels: Mapping[str, str], measures: Sequence[Measure], title: str = "method"
) -> Grid:
    """Differences with their intervals: a line for each name, a column for each measure that has numbers."""
    measures = with_numbers(measures, of.values())
    head = [title, *(measure.label for measure in measures)]
    return Grid(
        head,
        [
            [Entry(labels[run]), *(difference(means[measure.name], measure) for measure in measures)]
            for run, means in of.items()
        ],
    )


def _fronts(found: Found, rows: Sequence[Row]) -> Section:
    of_runs = fronts(found.plan, found.tuned)
    share = next(measure for measure in MEASURES if measure.name == "over_refusal_rate")
    what = ("helpfulness lost", "over-refusal")
    references = [front for front in of_runs if front.run.name in ("sft-lora", "sft-full")]
    volume = Measure("", "")
    head = [
        "method",
        "hypervolume (%)",
        *(f"minus {front.run.label}" for front in references),
        *(f"{name} at {at:.0%} safety (%)" for at in AT_SAFETY for name in what),
    ]
    rows_of_fronts = []
    for front in of_runs:
        points = [front.at(safety) for safety in AT_SAFETY]
        values = [value for point in points for value in ((point.lost, point.over_refusal) if point else (None, None))]
        compared = [
            Entry("") if other is front else difference(hypervolume_difference(front, other), volume)
            for other in references
        ]
        volumes = interval(mean_of(front.hypervolumes), volume)
        rows_of_fronts.append(
            [Entry(front.run.label), Entry(volumes), *compared, *entries(*(number(value, share) for value in values))]
        )
    grid = Grid(head, rows_of_fronts)
    tuning_seeds = counted(found.plan.n_tuning_seeds, "tuning seed")
    text = [
        "A learning rate puts a method somewhere between harmless and helpful, so whole fronts are compared: all rates "
        f"of the grid, on the validation part, means over {tuning_seeds}. The front is of safety over the helpfulness "
        "that is lost: harmless requests that are not answered rightly, or what the judge's mean score lacks (a model "
        "that training has broken refuses nothing and complies with nothing); the hypervolume is the area under it, a "
        "mean over each seed's own front, with 95% t intervals, and differences paired by seed. At equal safety: on "
        "the front of the means; –: none of its rates is as safe as that."
    ]
    pictures = [figures.fronts(of_runs, rows), figures.learning_rates(merits(found.plan, found.tuned), rows)]
    return Section("Safety against helpfulness, over learning rates", text, [grid], pictures)


def _features(found: Found) -> Section | None:
    """What the features of the first SAILS run are, and what training did."""
    of_run = by_run(found.plan, found.tested, found.chosen)
    name = next((run.name for run in found.plan.runs if any("features" in r for r in of_run[run.name].values())), None)
    if name is None:
        return None
    cells = [result["features"] for result in of_run[name].values() if "features" in result]
    share = Measure("", "", 100.0, digits=0)
    words = ("precision", "precision_of_random", "precision_of_pca", "harm_share_of_mean_difference")

    def mean_at(layer: str, word: str) -> Mean:
        return mean_of([cell["layers"][layer][word] for cell in cells])

    def separation(layer: str) -> Mean:
        return mean_of([(cell["separation"] or {}).get(layer) for cell in cells])

    grid = Grid(
        ["layer", "separation", "precision of the features", "of random features", "of PCA directions",
         "mean difference: activation on harm"],
        [
            entries(
                layer,
                interval(separation(layer), Measure("", "", 1.0)),
                *(interval(mean_at(layer, word), share) for word in words),
            )
            for layer in cells[0]["layers"]
        ],
    )  # fmt: skip
    drift = [cell["drift"] for cell in cells if cell["drift"]]
    inside, angle = (
        mean_of([values[name] for values in drift]) for name in ("adapter_energy_inside", "adapter_largest_angle")
    )
    requests = "held out; harmless ones of the training data" if found.plan.protocol else "held out"
    onsets = sorted({cell["onset"] for cell in cells if cell["onset"] is not None})
    text = [
        f"Of {found.labels[name]}, {counted(len(cells), 'seed')}. A feature is taken as a concept of harm if at least "
        f"80% of its activation at the end of requests ({requests}) is on harmful ones; precision is the share of the "
        "chosen features that are (for PCA directions, of both signs, with their positive part as activation). "
        "Separation: distance between the means of harmful and harmless prompts, in standard deviations within them.",
        f"Adapters start at block {' or '.join(map(str, onsets)) or '0'}. Training left "
        f"{interval(inside, share)}% of the update's energy in the subspace; the largest angle of any module's span "
        f"from its start is {interval(angle, Measure('', '', 1.0, digits=2))} rad.",
    ]
    first = cells[0]
    changes = Grid(
        ["layer, feature", "score", "active: harmless", "active: harmful", "concept of harm", "on harmful, before",
         "after", "on harmless, before", "after"],
        [
            entries(
                f"{layer}, {feature['id']}", f"{feature['score']:.2f}", f"{feature['rate_aligned']:.0%}",
                f"{feature['rate_unaligned']:.0%}", "yes" if feature["is_safety"] else "no",
                *(f"{feature[name]:.2f}" for name in CHANGES),
            )
            for layer, of in first["layers"].items()
            for feature in of["features"][:N_SHOWN]
        ],
    )  # fmt: skip
    seen: dict[int, int] = {}
    shown = []
    for meaning in first["meanings"]:
        seen[meaning["layer"]] = seen.get(meaning["layer"], 0) + 1
        if seen[meaning["layer"]] <= N_SHOWN:
            shown.append(meaning)
    text.append(
        f"The features with the highest scores, of seed {found.plan.first_seed}: how often they are active at the end "
        "of training prompts, and their mean activation at the end of requests, before and after training."
    )
    return Section("What the features mean, and what training did", text, [grid, changes], meanings=shown)


def _cost(found: Found) -> Section:
    """Seconds by what they were spent on."""
    results = [*found.tuned.values(), *found.tested.values()]
    stages: dict[str, float] = {}
    for result in results:
        for stage, seconds in result["cost"]["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    total = sum(stages.values()) or 1.0
    order = sorted(stages, key=lambda stage: -stages[stage])
    grid = Grid(
        ["stage", "seconds", "share (%)"],
        [entries(stage, f"{stages[stage]:,.0f}", f"{100 * stages[stage] / total:.1f}") for stage in order],
    )
    of_model = sum(stages.get(stage, 0.0) for stage in MODEL_WORK)
    text = [
        f"{len(results)} trainings, {total:,.0f} seconds in all; {of_model / total:.0%} in stages that run the "
        "model (benchmarks/comparison_profile.py says how much of them is forward and backward passes)."
    ]
    return Section("What it cost", text, [grid])
