"""The commands `sails compare` and `sails report`: train and evaluate every method over seeds, and say what was found.

sails compare                                   the testbed: eight methods, five seeds, about a quarter of an hour
sails compare --n_seeds 20 --runs sft-lora sft-sails sft-full
sails report --output_dir runs/compare          the report again, from the results there are

<output_dir>/plan.json      what is compared
<output_dir>/cells/         a result for each training, as soon as it is there: the same command goes on from them
<output_dir>/results.json   every reported number; report.html, report.md and figures/ show them
"""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sails_align.artifacts import one_at_a_time, output_folder, package_versions, refuse_trained, write_json
from sails_align.comparison.plan import LEARNING_RATES, RUNS, Cell, Measures, Plan, Run, runs_named
from sails_align.comparison.runner import Failure, Results, n_slots, run_cells
from sails_align.comparison.summary import (
    MEASURES,
    Row,
    categories,
    differences,
    merits,
    rows_of,
    to_json,
)
from sails_align.errors import InputError
from sails_align.eval_options import check_least
from sails_align.testbed.build import is_testbed, resolve_testbed
from sails_align.training.parsing import CommandLine
from sails_align.training.record import git_commit

REFERENCES = ("sft-lora", "sft-full", "dpo-lora", "dpo-full")
"""What other runs of the same trainer are compared with, pair by pair."""
SHOWN = ("safety_rate_in_distribution", "safety_rate_out_of_distribution", "over_refusal_rate", "correct_answer_rate")


@dataclass
class CompareArguments:
    """What is compared, and on what."""

    runs: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(RUNS)}; default: all."})
    n_seeds: int = field(default=5, metadata={"help": "Seeds of initialisation and data that are reported."})
    first_seed: int = field(default=0, metadata={"help": "The first of them."})
    n_tuning_seeds: int = field(default=1, metadata={"help": "Other seeds, that learning rates are chosen with."})
    learning_rates: list[float] = field(
        default_factory=lambda: list(LEARNING_RATES), metadata={"help": "The grid, the same for all methods."}
    )
    world: str = field(default="testbed", metadata={"help": "testbed, testbed:N, or a testbed's folder."})
    n_examples: int = field(default=128, metadata={"help": "Harmful training examples, and as many harmless ones."})
    n_prompts: int = field(default=256, metadata={"help": "Test prompts in each of the four sets."})
    n_attacked: int = field(default=8, metadata={"help": "Harmful prompts that GCG is tried on; 0: none."})
    n_capability: int = field(default=50, metadata={"help": "Items of each lm-eval task of the testbed; 0: none."})
    processes: int | None = field(
        default=None, metadata={"help": "Trainings at a time; default: one for each GPU, or for each core."}
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "Results, and the report."})
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    def __post_init__(self) -> None:
        check_least(self, n_examples=1, n_prompts=1, n_attacked=0, n_capability=0, processes=1)
        if not is_testbed(self.world):
            raise InputError(f"world is {self.world!r}; give testbed, testbed:N or a testbed's folder")

    def plan(self) -> Plan:
        """The comparison that the options name."""
        return Plan(
            runs=tuple(RUNS.values() if self.runs is None else runs_named(self.runs)),
            learning_rates=tuple(self.learning_rates),
            n_seeds=self.n_seeds,
            n_tuning_seeds=self.n_tuning_seeds,
            first_seed=self.first_seed,
            world=self.world,
            measures=Measures(self.n_examples, self.n_prompts, self.n_attacked, self.n_capability),
        )


@dataclass
class ReportArguments:
    """Of which comparison."""

    output_dir: str = field(default="runs/compare", metadata={"help": "Of `sails compare`."})


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Parse, compute what is missing, report. Returns what is in `results.json`.

    Raises:
        InputError: for options that cannot be used.
        SystemExit: with code 1 if cells failed; the others' results stay, and the same command tries these again.
    """
    line = CommandLine.read(argv)
    (args,) = line.parse([CompareArguments], prog=prog)
    plan, folder = args.plan(), refuse_trained(Path(args.output_dir))
    command = "sails compare " + " ".join(line.options)
    with output_folder(folder), one_at_a_time(folder):
        resolve_testbed(plan.world)  # before anything is started
        write_json(folder / "plan.json", {"plan": asdict(plan), "command": command.strip()})
        results, n_processes = Results(folder), args.processes or n_slots()
        started = time.time()
        tuning = plan.tuning_cells()
        failures = run_cells(tuning, results, title="learning rates", n_processes=n_processes, progress=args.progress)
        _stop_on(failures)
        chosen = plan.choose(results.all(tuning))
        cells = plan.test_cells(chosen)
        failures = run_cells(cells, results, title="trainings", n_processes=n_processes, progress=args.progress)
        _stop_on(failures)
        about = {"seconds": round(time.time() - started), "processes": n_processes}
        return report(plan, results, folder, command.strip(), about)


def _stop_on(failures: Sequence[Failure]) -> None:
    if failures:
        print(f"{len(failures)} trainings failed; the results of the others are kept:", file=sys.stderr)
        for failure in failures:
            print(failure, file=sys.stderr)
        raise SystemExit(1)


def report_main(argv: Sequence[str] | None = None, prog: str | None = None) -> dict[str, Any]:
    """Make a comparison's report from the results there are."""
    (args,) = CommandLine.read(argv).parse([ReportArguments], prog=prog)
    folder = Path(args.output_dir)
    plan, command = read_plan(folder / "plan.json")
    results = Results(folder)
    return report(plan, results, folder, command, {})


def read_plan(path: Path) -> tuple[Plan, str]:
    """A comparison's plan and the command that it was started by.

    Raises:
        InputError: if there is none.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        values = dict(stored["plan"])
        runs = tuple(Run(**{**run, "options": tuple(run["options"])}) for run in values.pop("runs"))
        rates, measures = tuple(values.pop("learning_rates")), Measures(**values.pop("measures"))
        return Plan(runs=runs, learning_rates=rates, measures=measures, **values), str(stored["command"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no plan of a comparison ({type(error).__name__}: {error}); give the folder of `sails compare`"
        ) from error


def report(plan: Plan, results: Results, folder: Path, command: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json and the pages, and print the table.

    Raises:
        InputError: if results are missing.
    """
    from sails_align.reporting import figures
    from sails_align.reporting.page import Report, write_report

    tuned = results.all(plan.tuning_cells())
    _check_there(plan.tuning_cells(), tuned)
    chosen = plan.choose(tuned)
    cells = plan.test_cells(chosen)
    found = results.all(cells)
    _check_there(cells, found)
    rows = rows_of(plan, found, chosen)
    names = [run.name for run in plan.runs if run.trainer != "none"]
    compared = {
        reference: {name: differences(plan, found, chosen, name, reference) for name in names if name != reference}
        for reference in REFERENCES
        if reference in names and len(names) > 1
    }
    labels = {row.run.name: row.run.label for row in rows}
    pictures = [figures.trade_off(rows)]
    pictures += [
        figures.forest(of, labels, f"minus_{name}", f"Differences from {labels[name]}, paired by seed")
        for name, of in compared.items()
    ]
    for split, words in (("harmful", "trained harm categories"), ("ood", "new harm categories")):
        of_split = categories(plan, found, chosen, split)
        pictures.append(figures.bars(of_split, rows, f"safety_{split}", f"Safety rate by category: {words}", "%"))
    of_split = categories(plan, found, chosen, "harmless")
    pictures.append(figures.bars(of_split, rows, "over_refusal", "Over-refusal by category of harmless requests", "%"))
    if tuned:
        pictures.append(figures.learning_rates(merits(plan, tuned), rows))
    values = {
        "rows": to_json(rows),
        "differences": {
            reference: {name: {m: asdict(mean) for m, mean in means.items()} for name, means in of.items()}
            for reference, of in compared.items()
        },
        "chosen": chosen,
        "command": command,
        "provenance": {**about, **_provenance(plan)},
    }
    write_json(folder / "results.json", values)
    pages = write_report(
        Report(
            f"Comparison of alignment methods on the world {plan.world}",
            plan, rows, compared, pictures, command, values["provenance"],
        ),
        folder,
    )  # fmt: skip
    _show(rows, plan, [folder / "results.json", *pages])
    return values


def _check_there(cells: Sequence[Cell], found: Mapping[str, Any]) -> None:
    missing = [cell for cell in cells if cell.key not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(cells)} results are missing, such as of {missing[0].run.name}, "
            f"seed {missing[0].seed};\nrun `sails compare` with the same options and --output_dir"
        )


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
    table = Table(title=f"{plan.world}, {plan.n_seeds} seeds (means, 95% intervals)")
    shown = [measure for measure in MEASURES if measure.name in SHOWN]
    table.add_column("")
    table.add_column("lr", justify="right")
    for measure in shown:
        table.add_column(measure.label, justify="right")
    from sails_align.reporting.page import interval

    for row in rows:
        rate = "" if row.learning_rate is None else f"{row.learning_rate:g}"
        cells = [interval(row.means[measure.name], measure) for measure in shown]
        table.add_row(row.run.label, rate, *cells)
    console = Console()
    console.print(table)
    for path in paths:
        console.print(f"{path.name.partition('.')[0]:<10}{path}", highlight=False, soft_wrap=True)
