"""The commands `sails compare` and `sails report`: train and evaluate every method over seeds, and say what was found.

sails compare                                   the testbed: eight methods, five seeds, about eleven minutes
sails compare --n_seeds 20 --runs sft-lora sft-sails sft-full
sails compare --ablations true --examples 16 64 256 --worlds testbed:1 shared_harm=0 contamination=0.1
sails compare --config recipes/configs/gemma-2-9b/compare.yaml      other models
sails compare --config ... --cell validation/sft-sails/0.001/1000   one training of it, as a job of its own
sails report --output_dir runs/compare          the report again, from the results there are

<output_dir>/plan.json      what is compared
<output_dir>/cells/         a result for each training, as soon as it is there: the same command goes on from them
<output_dir>/results.json   every reported number; report.html, report.md and figures/ show them
"""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sails_align.core.artifacts import output_folder, package_versions, refuse_trained, work_folder, write_json
from sails_align.core.command_line import CommandLine
from sails_align.experiments.commands import check
from sails_align.experiments.jobs import Failure
from sails_align.experiments.launchers import Launcher, available_slots, launcher_of
from sails_align.experiments.options import ReportOptions
from sails_align.experiments.plan import Cell, Plan, option_groups
from sails_align.experiments.results import Results, cells_named, check_there, names_of, prefix_of, read_plan
from sails_align.experiments.runner import run_jobs
from sails_align.experiments.studies import Study, read_plans
from sails_align.experiments.summary import MEASURES, Row, to_json, with_numbers
from sails_align.testbed.build import resolve_testbed
from sails_align.training.record import git_commit

SHOWN = (
    *("safety_rate", "safety_rate_in_distribution", "safety_rate_out_of_distribution"),
    *("over_refusal_rate", "correct_answer_rate", "helpfulness"),
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, compute what is missing, report. Returns what is in `results.json`; nothing for cells alone.

    Raises:
        InputError: for options that cannot be used.
        SystemExit: with code 1 if cells failed; the others' results stay, and the same command tries these again.
    """
    line = CommandLine.read(argv)
    args, launching, studies = read_plans(line, prog)
    if args.list_cells:
        with suppress(BrokenPipeError):  # of `| head`
            print(*names_of(studies), sep="\n", flush=True)
        return {}
    folder = refuse_trained(Path(args.output_dir))
    results, n_processes = Results(folder), args.processes or _n_processes(studies)
    n = launching.slurm_gpus
    launcher = launcher_of(launching, folder, n_processes, {"none": 0, "one": n, "share": n, "all": n})
    plan = {"studies": [asdict(study) for study in studies], "command": _command(line)}
    with output_folder(folder) if args.cell else work_folder(folder):  # cells may be computed side by side
        if args.cell:
            cells = cells_named(args.cell, studies, results)
            _prepare(cells)
            write_json(folder / "plan.json", plan)
            _compute(cells, results, "cells", launcher, args.progress)
            return {}
        _prepare([cell for study in studies for _, of in study.plans for cell in of.test_cells({})])
        write_json(folder / "plan.json", plan)
        started = time.time()
        for study in studies:
            plans = [plan for _, plan in study.plans]
            tuning = [cell for plan in plans for cell in plan.tuning_cells()]
            _compute(tuning, results, f"{study.kind}: learning rates", launcher, args.progress)
            cells = [cell for plan in plans for cell in plan.test_cells(plan.choose(results.all(plan.tuning_cells())))]
            _compute(cells, results, f"{study.kind}: trainings", launcher, args.progress)
        about = {"seconds_of_the_last_call": round(time.time() - started), "processes": n_processes}
        return report(studies, results, folder, str(plan["command"]), about)


def _prepare(cells: Sequence[Cell]) -> None:
    """Before anything is started: build the worlds that are not there yet, read the options of all commands.

    Raises:
        InputError: if something cannot be used.
    """
    for world in dict.fromkeys(cell.world for cell in cells if cell.protocol is None):
        resolve_testbed(world)
    for protocol in dict.fromkeys(cell.protocol for cell in cells if cell.protocol is not None):
        check(list(dict.fromkeys(cell.run for cell in cells)), protocol)


def _n_processes(studies: Sequence[Study]) -> int:
    """Trainings at a time: one that is launched on several GPUs has them all."""
    protocol = studies[0].plans[0][1].protocol
    return 1 if protocol is not None and protocol.launch else available_slots()


def _command(line: CommandLine) -> str:
    """What makes the report, once all cells are there."""
    config = [] if line.path is None else ["--config", line.path]
    how = ("--cell", "--launcher", "--slurm_")  # which decides nothing
    options = {name: values for name, values in option_groups(line.options).items() if not name.startswith(how)}
    words = [word for name, values in options.items() for word in (name, *values)]
    return shlex.join(["sails", "compare", *config, *words])


def _compute(cells: Sequence[Cell], results: Results, title: str, launcher: Launcher, progress: bool) -> None:
    _stop_on(run_jobs(results.jobs(cells), launcher, title=title, progress=progress))


def _stop_on(failures: Sequence[Failure]) -> None:
    if failures:
        print(f"{len(failures)} trainings failed; the results of the others are kept:", file=sys.stderr)
        for failure in failures:
            print(failure, file=sys.stderr)
        raise SystemExit(1)


def report_main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Make a comparison's report from the results there are."""
    (args,) = CommandLine.read(argv).parse([ReportOptions], prog=prog)
    folder = Path(args.output_dir)
    studies, command = read_plan(folder / "plan.json")
    return report(studies, Results(folder), folder, command, _told_before(folder))


def _told_before(folder: Path) -> dict[str, Any]:
    """How long the comparison took, if a report has been made of it."""
    try:
        provenance = json.loads((folder / "results.json").read_text(encoding="utf-8"))["provenance"]
        return {name: provenance[name] for name in ("seconds_of_the_last_call", "processes") if name in provenance}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def report(
    studies: Sequence[Study], results: Results, folder: Path, command: str, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write results.json and the pages, and print the table.

    Raises:
        InputError: if results are missing.
    """
    from sails_align.reporting.page import Report, write_report
    from sails_align.reporting.sections import main as sections
    from sails_align.reporting.sections import studies as side_sections

    found = [
        (study, [_found(plan, results, prefix_of(study, label)) for label, plan in study.plans]) for study in studies
    ]
    main_found, plan = found[0][1][0], found[0][1][0].plan
    names = main_found.labels
    values = {
        "rows": to_json(main_found.rows),
        "differences": {
            reference: {
                name: {measure: asdict(mean) for measure, mean in means.items()}
                for name, means in main_found.minus(reference).items()
            }
            for reference in sections.REFERENCES
            if reference in names
        },
        "chosen": main_found.chosen,
        "studies": side_sections.to_json(found[1:]),
        "command": command,
        "provenance": {**about, **_provenance(plan)},
    }
    write_json(folder / "results.json", values)
    made = sections.main_sections(main_found)
    for study, of in found[1:]:
        labelled = [(label, one) for (label, _), one in zip(study.plans, of, strict=True)]
        if study.kind == "ablations":
            made.append(side_sections.ablation_section(of[0]))
        elif study.kind == "examples":
            made.append(side_sections.examples_section(labelled))
        else:
            made.append(side_sections.worlds_section(labelled))
    where = plan.world if plan.protocol else f"the world {plan.world}"
    title = f"Comparison of alignment methods on {where}"
    pages = write_report(Report(title, made, command, values["provenance"]), folder)
    _show(main_found.rows, plan, [folder / "results.json", *pages])
    return values


def _found(plan: Plan, results: Results, prefix: str) -> Any:
    """What there is of a plan.

    Raises:
        InputError: if a result is missing.
    """
    from sails_align.reporting.sections.main import Found

    tuned = results.all(plan.tuning_cells())
    check_there(plan.tuning_cells(), tuned, prefix)
    chosen = plan.choose(tuned)
    cells = plan.test_cells(chosen)
    tested = results.all(cells)
    check_there(cells, tested, prefix)
    return Found(plan, tuned, tested, chosen)


def _provenance(plan: Plan) -> dict[str, Any]:
    commit = git_commit()
    versions = {name: version for name, version in package_versions().items() if version}
    return {
        "world": plan.world,
        "commit": "none" if commit is None else commit["commit"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _show(rows: Sequence[Row], plan: Plan, paths: Sequence[Path]) -> None:
    table = Table(title=f"{escape(plan.world)}: means over seeds (n = {plan.n_seeds}), 95% intervals")
    shown = with_numbers([measure for measure in MEASURES if measure.name in SHOWN], (row.means for row in rows))
    table.add_column("")
    table.add_column("lr", justify="right")
    for measure in shown:
        table.add_column(measure.label, justify="right")
    from sails_align.reporting.page import interval

    for row in rows:
        rate = "" if row.learning_rate is None else f"{row.learning_rate:g}"
        cells = [interval(row.means[measure.name], measure) for measure in shown]
        table.add_row(escape(row.run.label), rate, *cells)
    console = Console()
    console.print(table)
    for path in paths:
        console.print(f"{path.name.partition('.')[0]:<10}{path}", highlight=False, soft_wrap=True)
