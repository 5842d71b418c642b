"""The commands `sails compare` and `sails report`: train and evaluate every method over seeds, and report.

sails compare                                   the testbed: eight methods, five seeds, about eleven minutes
sails compare --n_seeds 20 --runs sft-lora sft-sails sft-full
sails compare --study main ablations --examples 16 64 256 --worlds testbed:1 shared_harm=0 contamination=0.1
sails compare --config recipes/configs/gemma-2-9b/compare.yaml      other models
sails compare --config ... --cell validation/sft-sails/0.001/1000   one training of it, as a job of its own
sails report --output_dir runs/compare          the report again, from the results there are

<output_dir>/plan.json      what is compared
<output_dir>/cells/         a result for each finished training; the same command resumes from them
<output_dir>/results.json   every reported number; report.html, report.md and figures/ show them
"""

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.command_line import CommandLine
from sails_align.core.earlier import check_earlier, write_record
from sails_align.core.files import output_folder, refuse_trained, work_folder, write_json
from sails_align.core.log import LOG_FILE, log_file, say, show
from sails_align.core.machine import devices
from sails_align.core.options import all_but
from sails_align.experiments.commands import check
from sails_align.experiments.launchers import Launcher, available_slots, launcher_of
from sails_align.experiments.options import NOT_IN_IDENTITY, LauncherOptions, ReportOptions
from sails_align.experiments.plan import Cell, Plan, Protocol, Run, option_groups, option_words
from sails_align.experiments.results import Results, cells_named, names_of
from sails_align.experiments.runner import run_jobs
from sails_align.experiments.studies import Study, read_plans
from sails_align.testbed.build import resolve_testbed

RESULTS_FILE = "results.json"

if TYPE_CHECKING:
    from sails_align.reporting.report import ReportData


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Run missing trainings and report. Returns what is in `results.json`; with `--cell` or `--list_cells` nothing.

    Raises:
        InputError: for options that cannot be used.
        SystemExit: with code 1 if cells failed. Other results are kept, and the same command tries failed ones again.
    """
    line = CommandLine.read(argv)
    args, launching, studies = read_plans(line, prog)
    if args.list_cells:
        with suppress(BrokenPipeError):  # of `| head`
            print(*names_of(studies, Results(Path(args.output_dir))), sep="\n", flush=True)
        return {}
    folder = refuse_trained(Path(args.output_dir))
    results, n_processes = Results(folder), args.processes or _n_processes(studies)
    n = launching.slurm_gpus
    launcher = launcher_of(launching, folder, n_processes, {"none": 0, "one": n, "share": n, "all": n})
    plan = {"studies": [asdict(study) for study in studies], "command": _command(line)}
    opened = output_folder(folder) if args.cell else work_folder(folder)  # cells may be computed side by side
    with opened, log_file(folder, "sails compare"):
        identity = {"command": "sails compare", "options": all_but(NOT_IN_IDENTITY, args), "plan": plan["studies"]}
        check_earlier(folder, identity, RESULTS_FILE, overwrite=args.overwrite_output_dir)
        if args.cell:
            cells = cells_named(args.cell, studies, results)
            _prepare(cells, launching)
            write_json(folder / "plan.json", plan)
            _compute_all(partial(cells_named, args.cell, studies, results), results, "cells", launcher, args.progress)
            return {}
        _prepare([cell for study in studies for _, of in study.plans for cell in of.test_cells({})], launching)
        write_json(folder / "plan.json", plan)
        started = time.time()
        say(f"comparison of methods, {n_processes} trainings at a time; output: {folder}/ (all lines: {LOG_FILE})")
        for study in studies:
            plans = [plan for _, plan in study.plans]
            tuning = partial(_tuning_cells, plans, results)
            _compute_all(tuning, results, f"{study.kind}: tuning", launcher, args.progress)
            tuned = [(plan, results.all(results.tuning_cells(plan))) for plan in plans]
            cells = [cell for plan, found in tuned for cell in plan.test_cells(plan.choose(found))]
            _compute(cells, results, f"{study.kind}: trainings", launcher, args.progress)
        about = {"seconds_of_the_last_call": round(time.time() - started), "processes": n_processes}
        from sails_align.reporting.report import write_report
        from sails_align.reporting.tracking import send

        written = write_report(studies, results, str(plan["command"]), about)
        write_record(folder, identity)
        send(written[0], args.report_to, folder)
        return _show(*written)


def _prepare(cells: Sequence[Cell], launching: LauncherOptions) -> None:
    """Build missing worlds, read the options of all commands and check the evaluations, before anything is started."""
    for world in dict.fromkeys(cell.world for cell in cells if cell.protocol is None):
        resolve_testbed(world)
    for protocol in dict.fromkeys(cell.protocol for cell in cells if cell.protocol is not None):
        runs = list(dict.fromkeys(cell.run for cell in cells if not cell.run.has_bench))
        check(runs, protocol)
        _check_evaluations(runs, protocol, on_gpu=launching.launcher == "slurm" or bool(devices()["gpus"]))


def _check_evaluations(runs: Sequence[Run], protocol: Protocol, *, on_gpu: bool) -> None:
    from sails_align.experiments.limits import Limits, known_config
    from sails_align.training.run import parse

    trainings = {run.name: parse(run.trainer, list(run.options)) for run in runs if run.trainer in ("sft", "dpo")}
    Limits(protocol, trainings, known_config, on_gpu).check(runs)


def _n_processes(studies: Sequence[Study]) -> int:
    """Return how many trainings run at a time; one that is launched on several GPUs runs alone."""
    protocol = studies[0].plans[0][1].protocol
    return 1 if protocol is not None and protocol.launch else available_slots()


def _command(line: CommandLine) -> str:
    """Return the command that makes the report, once all cells are there: without options that change no result."""
    config = [] if line.path is None else ["--config", line.path]
    how = {f"--{name}" for name in NOT_IN_IDENTITY if name != "output_dir"} | {"--launcher", "--no_progress"}
    options = {
        name: values
        for name, values in option_groups(line.options).items()
        if name not in how and not name.startswith("--slurm_")
    }
    return shlex.join(["sails", "compare", *config, *option_words(options)])


def _tuning_cells(plans: Sequence[Plan], results: Results) -> list[Cell]:
    return [cell for plan in plans for cell in results.tuning_cells(plan)]


def _compute_all(
    find: Callable[[], list[Cell]], results: Results, title: str, launcher: Launcher, progress: bool
) -> None:
    """Compute the cells that are found, and those found then: results of some can call for more learning rates."""
    n_computed = 0
    while len(cells := find()) > n_computed:
        _compute(cells, results, title, launcher, progress)
        n_computed = len(cells)


def _compute(cells: Sequence[Cell], results: Results, title: str, launcher: Launcher, progress: bool) -> None:
    if failures := run_jobs(results.jobs(cells), launcher, title=title, progress=progress):
        say(f"{len(failures)} trainings failed; the results of the others are kept:")
        for failure in failures:
            say(str(failure))
        raise SystemExit(1)


def report_main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Make a comparison's report again. Returns what is in `results.json`."""
    (options,) = CommandLine.read(argv).parse([ReportOptions], prog=prog)
    from sails_align.reporting.report import rewrite_report

    return _show(*rewrite_report(Path(options.output_dir)))


def _show(data: "ReportData", values: dict[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """Print the table and the paths of the files. Returns what is in results.json."""
    from sails_align.core.tables import FittedTable
    from sails_align.experiments.summary import SHOWN, with_numbers
    from sails_align.reporting.page import interval

    (kind, outcomes), *_ = data.outcomes.items()
    for name, outcome in outcomes.items():
        plan, rows = outcome.plan, outcome.rows
        metrics = with_numbers(SHOWN, (row.means for row in rows))
        tuned = "hyperparameter" if kind in ("tampering", "methods") else "lr"
        title = plan.world if kind == "main" else f"{plan.world}, {kind}: {name}"
        table = FittedTable(
            f"{title}: means over seeds (n = {plan.n_seeds}), 95% intervals from three seeds on",
            ("", tuned, *(metric.heading for metric in metrics)),
        )
        for row in rows:
            rate = "" if row.learning_rate is None else f"{row.learning_rate:g}"
            table.add_row(row.label, rate, *(interval(row.means[metric.name], metric) for metric in metrics))
        show(table, *(f"doubt     {doubt}" for row in rows for doubt in row.doubts))
    show(*(f"{path.name.partition('.')[0]:<10}{path}" for path in paths))
    return values
