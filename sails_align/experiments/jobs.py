"""Cells by name, so that each can be a job of its own, on another machine.

validation/sft-sails/0.001/1000     a run, its learning rate and seed, on the validation part
test/sft-sails/0                    a run and its seed on the test part, at the learning rate that was chosen
ablations/ablations/test/k-16/0     likewise in a side study
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sails_align.core.errors import InputError
from sails_align.experiments.plan import Cell, Plan
from sails_align.experiments.runner import Results
from sails_align.experiments.studies import Study


def names_of(studies: Sequence[Study]) -> Iterator[str]:
    """All cells' names; in each study those of the validation part, which must be done first, before the others."""
    for prefix, plan in _plans(studies):
        for cell in (*plan.tuning_cells(), *plan.test_cells({})):
            yield prefix + cell.name


def _plans(studies: Sequence[Study]) -> Iterator[tuple[str, Plan]]:
    for study in studies:
        for label, plan in study.plans:
            yield prefix_of(study, label), plan


def cells_named(names: Sequence[str], studies: Sequence[Study], results: Results) -> list[Cell]:
    """The cells of some names.

    Raises:
        InputError: if there is none of a name, or the learning rate of one cannot be chosen yet.
    """
    known = set(names_of(studies))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise InputError(
                f"there is no cell {name!r}{f'; did you mean {close[0]}' if close else ''}; --list_cells true lists all"
            )
    found = []
    for prefix, plan in _plans(studies):
        found += [cell for cell in plan.tuning_cells() if prefix + cell.name in names]
        asked = {cell.run.name for cell in plan.test_cells({}) if prefix + cell.name in names}
        if asked:
            of_runs = replace(plan, runs=tuple(run for run in plan.runs if run.name in asked))
            tuned = results.all(of_runs.tuning_cells())
            check_there(of_runs.tuning_cells(), tuned, prefix)
            cells = of_runs.test_cells(of_runs.choose(tuned))
            found += [cell for cell in cells if prefix + cell.name in names]
    return found


def check_there(cells: Sequence[Cell], found: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse, with an `InputError`, to go on without results of some cells; their names begin with the prefix."""
    missing = [cell for cell in cells if cell.key not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(cells)} results are missing, such as of {prefix}{missing[0].name};\n"
            "run `sails compare` with the same options and --output_dir"
        )


def prefix_of(study: Study, label: str) -> str:
    """What the names of a plan's cells begin with."""
    return "" if study.kind == "main" else f"{study.kind}/{label}/"
