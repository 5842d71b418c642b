"""Results of cells in a comparison's folder, and cells by name, so that each can be a job of its own.

validation/sft-sails/0.001/1000     a run, its learning rate and seed, on the validation part
test/sft-sails/0                    a run and its seed on the test part, at the learning rate that was chosen
ablations/ablations/test/k-16/0     likewise in a side study
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.experiments.jobs import Job
from sails_align.experiments.plan import Cell, Measures, Plan, Protocol, Run
from sails_align.experiments.studies import Study
from sails_align.experiments.summary import Outcome


@dataclass(frozen=True)
class Results:
    """Results of cells, a file for each.

    <folder>/cells/<key>.json   a result
    <folder>/cells/<key>.log    what its process printed; kept if it failed
    <folder>/models/<key>/      of models that are no testbed: the trained model, and its evaluations
    """

    folder: Path

    def path(self, cell: Cell, suffix: str = ".json") -> Path:
        """Where a cell's result is, or its log."""
        return self.folder / "cells" / f"{cell.key}{suffix}"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """A result; None if there is none.

        Raises:
            InputError: if the file is damaged.
        """
        path = self.path(cell)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or "cell" not in result:
                raise ValueError("no numbers of a cell")
            return result
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no result of a cell ({error}); delete it to compute it again") from error

    def all(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Those of the cells that are there, by key."""
        found = {cell.key: self.get(cell) for cell in cells}
        return {key: result for key, result in found.items() if result is not None}

    def outcome(self, plan: Plan, prefix: str = "") -> Outcome:
        """What there is of a plan.

        Args:
            plan: whose cells must all be there.
            prefix: what the names of its cells begin with.

        Raises:
            InputError: if a result is missing.
        """
        tuned = self.all(plan.tuning_cells())
        check_there(plan.tuning_cells(), tuned, prefix)
        chosen = plan.choose(tuned)
        cells = plan.test_cells(chosen)
        tested = self.all(cells)
        check_there(cells, tested, prefix)
        return Outcome(plan, tuned, tested, chosen)

    def jobs(self, cells: Sequence[Cell]) -> list[Job]:
        """A job for each cell; cells of one key are one job."""
        different = {cell.key: cell for cell in cells}.values()
        return [self._job(cell) for cell in different]

    def _job(self, cell: Cell) -> Job:
        rate = "" if cell.learning_rate is None else f", learning rate {cell.learning_rate:g}"
        environment, gpus = {"TOKENIZERS_PARALLELISM": "false"}, "share"
        if cell.protocol is None:
            environment["OMP_NUM_THREADS"], gpus = "1", "one"
        elif cell.protocol.launch:
            gpus = "all"
        return Job(
            name=f"{cell.run.name}, seed {cell.seed}{rate}",
            work=partial(compute, cell, self.folder / "models" / cell.training_key),
            result=self.path(cell),
            log=self.path(cell, ".log"),
            gpus=gpus,
            environment=environment,
        )


def compute(cell: Cell, folder: Path) -> dict[str, Any]:
    """A cell's result.

    Args:
        cell: to be computed.
        folder: for its model, if that is no testbed.
    """
    if cell.protocol is None:
        from sails_align.experiments.cells import run_cell

        return run_cell(cell)
    from sails_align.experiments.commands import run_commands

    return run_commands(cell, folder)


# -- cells by name ----------------------------------------------------------------------------------------------------


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


# -- a comparison's plan.json -----------------------------------------------------------------------------------------


def read_plan(path: Path) -> tuple[list[Study], str]:
    """A comparison's plans and the command that it was started by.

    Raises:
        InputError: if there is none.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        studies = [
            Study(study["kind"], tuple((label, _plan(values)) for label, values in study["plans"]))
            for study in stored["studies"]
        ]
        if not studies or not all(study.plans for study in studies):
            raise ValueError("nothing is compared")
        return studies, str(stored["command"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no plan of a comparison ({type(error).__name__}: {error}); give the folder of `sails compare`"
        ) from error


def _plan(stored: Mapping[str, Any]) -> Plan:
    values = dict(stored)
    runs = tuple(Run(**{**run, "options": tuple(run["options"])}) for run in values.pop("runs"))
    rates, measures = tuple(values.pop("learning_rates")), Measures(**values.pop("measures"))
    protocol = values.pop("protocol", None)
    if protocol is not None:
        evaluate = tuple((part, kind, tuple(options)) for part, kind, options in protocol["evaluate"])
        protocol = Protocol(**{**protocol, "evaluate": evaluate, "launch": tuple(protocol["launch"])})
    return Plan(runs=runs, learning_rates=rates, measures=measures, protocol=protocol, **values)
