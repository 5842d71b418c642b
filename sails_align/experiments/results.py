"""Read and write results of cells in a comparison's folder, and find cells by name.

validation/sft-sails/0.001/1000     a run, its learning rate and seed, on the validation part
test/sft-sails/0                    a run and its seed on the test part, at the chosen learning rate
ablations/ablations/test/k-16/0     likewise in a side study
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as filter_names
from functools import partial
from pathlib import Path
from typing import Any

from sails_align.core.errors import InputError
from sails_align.core.machine import machine_name
from sails_align.core.suggestions import suggestion
from sails_align.experiments.jobs import Job
from sails_align.experiments.plan import Cell, Measures, Plan, Protocol, Run, Tampering
from sails_align.experiments.studies import Study
from sails_align.experiments.summary import Outcome
from sails_align.training.record import git_commit


@dataclass(frozen=True)
class Results:
    """Results of cells, one file for each.

    <folder>/cells/<key>.json   a result
    <folder>/cells/<key>.log    output of its process; kept if it failed
    <folder>/models/<key>/      with a protocol: the trained model and its evaluations
    """

    folder: Path

    def path(self, cell: Cell, suffix: str = ".json") -> Path:
        """Return the path of a cell's result or log."""
        return self.folder / "cells" / f"{cell.key}{suffix}"

    def all(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Return the results that are there, by key; raise `InputError` if a file is damaged."""
        found = {}
        for cell in cells:
            path = self.path(cell)
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(result, dict) or "cell" not in result:
                    raise ValueError("no numbers of a cell")
                found[cell.key] = result
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise InputError(f"{path} is no result of a cell ({error}); delete it to compute it again") from error
        return found

    def tuning_cells(self, plan: Plan) -> list[Cell]:
        """Return the cells of the validation part, also those that the results there are call for."""
        cells = plan.tuning_cells()
        while len(more := plan.tuning_cells(self.all(cells))) > len(cells):
            cells = more
        return cells

    def complete(self, cells: Sequence[Cell], prefix: str = "") -> dict[str, dict[str, Any]]:
        """Return the results of all cells, by key; messages put the prefix before the name of a cell.

        Raises `InputError` if a result is missing or damaged.
        """
        found = self.all(cells)
        if missing := [cell for cell in cells if cell.key not in found]:
            raise InputError(
                f"{len(missing)} of {len(cells)} results are missing, such as of {prefix}{missing[0].name};\n"
                "run `sails compare` with the same options and --output_dir"
            )
        return found

    def outcome(self, plan: Plan, prefix: str) -> Outcome:
        """Return the results of a plan; see `complete`."""
        tuned = self.complete(self.tuning_cells(plan), prefix)
        chosen = plan.choose(tuned)
        return Outcome(plan, tuned, self.complete(plan.test_cells(chosen), prefix), chosen)

    def jobs(self, cells: Sequence[Cell]) -> list[Job]:
        """Return a job for each cell; cells with the same key share one."""
        return [self._job(cell) for cell in {cell.key: cell for cell in cells}.values()]

    def _job(self, cell: Cell) -> Job:
        knob = "hyperparameter" if cell.run.grid else "learning rate"
        rate = "" if cell.learning_rate is None else f", {knob} {cell.learning_rate:g}"
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
    """Compute a cell's result; with a protocol, its model is kept in the folder."""
    commit = git_commit()
    made_by = {"commit": None if commit is None else commit["commit"], "machine": machine_name()}
    return {**_compute(cell, folder), "made_by": made_by}


def _compute(cell: Cell, folder: Path) -> dict[str, Any]:
    if cell.run.tampering is not None:
        from sails_align.experiments.tampering.cells import run_tampered

        return run_tampered(cell, folder.parent)
    if cell.run.method:
        from sails_align.experiments.methods.cells import run_method

        return run_method(cell, folder.parent)
    if cell.protocol is None:
        from sails_align.experiments.cells import run_cell

        return run_cell(cell)
    from sails_align.experiments.commands import run_commands

    return run_commands(cell, folder)


def names_of(studies: Sequence[Study], results: Results) -> Iterator[str]:
    """Yield the names of all cells: in each plan first those of the validation part, which must be done first.

    Learning rates beyond the grid have cells once results call for them.
    """
    for study in studies:
        for prefix, plan in study.by_prefix().items():
            for cell in (*results.tuning_cells(plan), *plan.test_cells({})):
                yield prefix + cell.name


def cells_named(asked: Sequence[str], studies: Sequence[Study], results: Results) -> list[Cell]:
    """Return the cells with some names; `validation/*` is all whose names begin with that.

    Raises `InputError` if a name is unknown, or the learning rate of a cell cannot be chosen yet.
    """
    known, names = list(names_of(studies, results)), set()
    for name in asked:
        if not (matches := filter_names(known, name)):
            raise InputError(f"there is no cell {name!r}{suggestion(name, known)}\n--list_cells true lists all")
        names |= set(matches)
    found = []
    for prefix, plan in (item for study in studies for item in study.by_prefix().items()):
        found += [cell for cell in results.tuning_cells(plan) if prefix + cell.name in names]
        tested = {cell.run.name for cell in plan.test_cells({}) if prefix + cell.name in names}
        if tested:
            of_runs = replace(plan, runs=tuple(run for run in plan.runs if run.name in tested))
            chosen = of_runs.choose(results.complete(results.tuning_cells(of_runs), prefix))
            found += [cell for cell in of_runs.test_cells(chosen) if prefix + cell.name in names]
    return found


def read_plan(path: Path) -> tuple[list[Study], str]:
    """Read the plan.json of a comparison: its studies, and the command that started it.

    Raises `InputError` if it is missing or damaged.
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
            f"{path} is not a comparison's plan ({type(error).__name__}: {error}); give the folder of `sails compare`"
        ) from error


def _run(stored: Mapping[str, Any]) -> Run:
    tampering = stored["tampering"] and Tampering(**stored["tampering"])
    lists = {name: tuple(stored[name]) for name in ("options", "grid")}
    return Run(**{**stored, **lists, "tampering": tampering})


def _plan(stored: Mapping[str, Any]) -> Plan:
    values = dict(stored)
    runs = tuple(map(_run, values.pop("runs")))
    rates, measures = tuple(values.pop("learning_rates")), Measures(**values.pop("measures"))
    protocol = values.pop("protocol", None)
    if protocol is not None:
        evaluate = tuple((part, kind, tuple(options)) for part, kind, options in protocol["evaluate"])
        protocol = Protocol(**{**protocol, "evaluate": evaluate, "launch": tuple(protocol["launch"])})
    return Plan(runs=runs, learning_rates=rates, measures=measures, protocol=protocol, **values)
