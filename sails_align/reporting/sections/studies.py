"""Results of side studies -> sections: what each part does, how many examples it takes, and other worlds."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sails_align.experiments.studies import Study
from sails_align.experiments.summary import CORE, Mean, differences, examples_to, with_numbers
from sails_align.reporting import figures
from sails_align.reporting.page import Grid, Section, entries, interval
from sails_align.reporting.sections.main import Found, counted, differences_grid, levels_grid

WANTED_SAFETY = 0.95


def ablation_section(found: Found) -> Section:
    """One thing changed in each."""
    measures = with_numbers(CORE, (row.means for row in found.rows))
    title = "Ablations"
    text = [
        f"SAILS with one thing changed in each, and other adapters, on {found.plan.n_seeds} seeds (from "
        f"{found.plan.first_seed}); each has its own learning rate from the same grid. Differences from SAILS are "
        "paired by seed, in points; better means that the change helped."
    ]
    of = found.minus("sft-sails")
    picture = figures.forest(
        of, found.labels, "ablations", "Ablations: differences from SAILS, paired by seed", measures
    )
    grid = levels_grid(found.rows, measures, "")
    return Section(title, text, [grid, differences_grid(of, found.labels, measures)], [picture])


def examples_section(study: Sequence[tuple[str, Found]]) -> Section:
    """Learning curves over the number of training examples."""
    rows_of_all = [row.means for _, found in study for row in found.rows]
    measures = with_numbers([measure for measure in CORE if measure.scale == 100], rows_of_all)
    curves: dict[str, dict[str, list[tuple[int, Mean]]]] = {}
    for _, found in study:
        for row in found.rows:
            for measure in measures:
                of = curves.setdefault(measure.name, {}).setdefault(row.run.name, [])
                of.append((found.plan.measures.n_examples or 0, row.means[measure.name]))
    labels = study[0][1].labels
    plan = study[0][1].plan
    safety = next(curves[name] for name in ("safety_rate_in_distribution", *curves) if name in curves)
    rows = []
    for run, label in labels.items():
        curve = [(n, mean.value) for n, mean in safety[run] if mean.value is not None]
        needed = examples_to(WANTED_SAFETY, curve)
        if needed is None:
            words = f"more than {curve[-1][0]}" if curve else "–"
        else:
            words = f"at most {curve[0][0]}" if needed == curve[0][0] else f"{needed:.0f}"
        rows.append(entries(label, words))
    grids = [Grid(["method", f"harmful examples to {WANTED_SAFETY:.0%} safety, trained categories"], rows)]
    grids += [
        Grid(
            [measure.label, *(f"{n} examples" for n, _ in next(iter(curves[measure.name].values())))],
            [
                entries(labels[run], *(interval(mean, measure) for _, mean in of))
                for run, of in curves[measure.name].items()
            ],
        )
        for measure in measures
    ]
    text = [
        f"Trained on n harmful and n harmless examples; {plan.n_seeds} seeds; each with its own learning "
        "rate, chosen for each n. Between the numbers tried the curve is taken as a line over log n."
    ]
    return Section("How many examples it takes", text, grids, [figures.curves(curves, labels, measures)])


def worlds_section(study: Sequence[tuple[str, Found]]) -> Section:
    """The same comparison in other worlds: what SAILS is better and worse than there."""
    rows_of_all = [row.means for _, found in study for row in found.rows]
    measures = with_numbers(CORE, rows_of_all)
    labels = study[0][1].labels
    grids, pictures = [], []
    for rival in labels:
        if rival == "sft-sails":
            continue
        of_worlds = {
            world: differences(found.plan, found.tested, found.chosen, "sft-sails", rival) for world, found in study
        }
        names, title = {world: world for world in of_worlds}, f"{labels['sft-sails']} minus {labels[rival]}"
        grids.append(differences_grid(of_worlds, names, measures, title))
        pictures.append(
            figures.forest(of_worlds, names, f"worlds_{rival}", f"{title}, by world, paired by seed", measures)
        )
    grids += [levels_grid(found.rows, measures, world) for world, found in study]
    plan = study[0][1].plan
    text = [
        "testbed:N is the world of seed N; else the world, or its alignment data, differs from the default one in the "
        "parameter; another world has its own model and SAEs. "
        f"{counted(plan.n_seeds, 'seed')} (from {plan.first_seed}); nothing but the learning rates was chosen in "
        "them. Differences are paired by seed, in points; then what each method reaches."
    ]
    return Section("Other worlds", text, grids, pictures)


def to_json(studies: Sequence[tuple[Study, Sequence[Found]]]) -> dict[str, Any]:
    """Every number of side studies, as they stand in `results.json`."""
    return {
        study.kind: {
            label: [
                {
                    "run": row.run.name,
                    "learning_rate": row.learning_rate,
                    "means": {name: asdict(mean) for name, mean in row.means.items()},
                }
                for row in found.rows
            ]
            for (label, _), found in zip(study.plans, of, strict=True)
        }
        for study, of in studies
    }
