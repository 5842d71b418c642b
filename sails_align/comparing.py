"""The commands `sails compare` and `sails report`: train and evaluate every method over seeds, and say what was found.

sails compare                                   the testbed: eight methods, five seeds, about a quarter of an hour
sails compare --n_seeds 20 --runs sft-lora sft-sails sft-full
sails compare --ablations true --examples 16 64 256 --worlds testbed:1 testbed:2
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
from sails_align.comparison.studies import Study, ablations, examples, worlds
from sails_align.comparison.summary import MEASURES, Row, to_json
from sails_align.errors import InputError
from sails_align.eval_options import check_least
from sails_align.testbed.build import is_testbed, resolve_testbed
from sails_align.training.parsing import CommandLine
from sails_align.training.record import git_commit

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
    n_attacked_seeds: int = field(default=5, metadata={"help": "Of the seeds, that GCG is tried on."})
    n_capability: int = field(default=50, metadata={"help": "Items of each lm-eval task of the testbed; 0: none."})
    relearning: bool = field(
        default=True, metadata={"help": "Also measure what safety is left after training on harmless or harmful data."}
    )
    ablations: bool = field(default=False, metadata={"help": "Also change each part of the method, one at a time."})
    examples: list[int] = field(
        default_factory=list,
        metadata={"help": "Also train on these numbers of examples: how many does each method need?"},
    )
    worlds: list[str] = field(
        default_factory=list, metadata={"help": "Also compare in these worlds (testbed:N, or folders), over n_seeds."}
    )
    n_side_seeds: int = field(default=5, metadata={"help": "Seeds of the ablations and of --examples."})
    processes: int | None = field(
        default=None, metadata={"help": "Trainings at a time; default: one for each GPU, or for each core."}
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "Results, and the report."})
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    def __post_init__(self) -> None:
        check_least(
            self,
            n_examples=1,
            n_prompts=1,
            n_attacked=0,
            n_capability=0,
            processes=1,
            n_side_seeds=1,
            n_attacked_seeds=0,
        )
        for name in ("world", "worlds"):
            value = getattr(self, name)
            for world in [value] if name == "world" else value:
                if not is_testbed(world):
                    raise InputError(f"{name} is {world!r}; give testbed, testbed:N or a testbed's folder")
        if len(set(self.worlds)) < len(self.worlds):
            raise InputError(f"worlds names one twice: {', '.join(self.worlds)}")
        if any(number < 1 for number in self.examples):
            raise InputError(f"examples are {self.examples}; choose 1 or more")

    def studies(self) -> list[Study]:
        """The comparison that the options name, first, and what is asked besides."""
        plan = Plan(
            runs=tuple(RUNS.values() if self.runs is None else runs_named(self.runs)),
            learning_rates=tuple(self.learning_rates),
            n_seeds=self.n_seeds,
            n_tuning_seeds=self.n_tuning_seeds,
            first_seed=self.first_seed,
            n_attacked_seeds=self.n_attacked_seeds,
            world=self.world,
            measures=Measures(
                self.n_examples, self.n_prompts, self.n_attacked, self.n_capability, relearning=self.relearning
            ),
        )
        found = [Study("main", ((self.world, plan),))]
        if self.ablations:
            found.append(ablations(plan, self.n_side_seeds))
        if self.examples:
            found.append(examples(plan, self.examples, self.n_side_seeds))
        if self.worlds:
            found.append(worlds(plan, self.worlds))
        return found


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
    studies, folder = args.studies(), refuse_trained(Path(args.output_dir))
    command = ("sails compare " + " ".join(line.options)).strip()
    with output_folder(folder), one_at_a_time(folder):
        for world in dict.fromkeys(plan.world for study in studies for _, plan in study.plans):
            resolve_testbed(world)  # built, if need be, before anything is started
        write_json(folder / "plan.json", {"studies": [asdict(study) for study in studies], "command": command})
        results, n_processes = Results(folder), args.processes or n_slots()
        started = time.time()
        for study in studies:
            plans = [plan for _, plan in study.plans]
            tuning = [cell for plan in plans for cell in plan.tuning_cells()]
            _compute(tuning, results, f"{study.kind}: learning rates", n_processes, args.progress)
            cells = [cell for plan in plans for cell in plan.test_cells(plan.choose(results.all(plan.tuning_cells())))]
            _compute(cells, results, f"{study.kind}: trainings", n_processes, args.progress)
        about = {"seconds_of_the_last_call": round(time.time() - started), "processes": n_processes}
        return report(studies, results, folder, command, about)


def _compute(cells: Sequence[Cell], results: Results, title: str, n_processes: int, progress: bool) -> None:
    different = list({cell.key: cell for cell in cells}.values())
    _stop_on(run_cells(different, results, title=title, n_processes=n_processes, progress=progress))


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
    studies, command = read_plan(folder / "plan.json")
    return report(studies, Results(folder), folder, command, _told_before(folder))


def _told_before(folder: Path) -> dict[str, Any]:
    """How long the comparison took, if a report has been made of it."""
    try:
        provenance = json.loads((folder / "results.json").read_text(encoding="utf-8"))["provenance"]
        return {name: provenance[name] for name in ("seconds_of_the_last_call", "processes") if name in provenance}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
        if not studies:
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
    return Plan(runs=runs, learning_rates=rates, measures=measures, **values)


def report(
    studies: Sequence[Study], results: Results, folder: Path, command: str, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write results.json and the pages, and print the table.

    Raises:
        InputError: if results are missing.
    """
    from sails_align.reporting import sections
    from sails_align.reporting.page import Report, write_report

    found = [(study, [_found(plan, results) for _, plan in study.plans]) for study in studies]
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
        "studies": sections.to_json(found[1:]),
        "command": command,
        "provenance": {**about, **_provenance(plan)},
    }
    write_json(folder / "results.json", values)
    made = sections.main_sections(main_found)
    for study, of in found[1:]:
        labelled = [(label, one) for (label, _), one in zip(study.plans, of, strict=True)]
        if study.kind == "ablations":
            made.append(sections.ablation_section(of[0]))
        elif study.kind == "examples":
            made.append(sections.examples_section(labelled))
        else:
            made.append(sections.worlds_section(labelled))
    title = f"Comparison of alignment methods on the world {plan.world}"
    pages = write_report(Report(title, made, command, values["provenance"]), folder)
    _show(main_found.rows, plan, [folder / "results.json", *pages])
    return values


def _found(plan: Plan, results: Results) -> Any:
    """What there is of a plan.

    Raises:
        InputError: if a result is missing.
    """
    from sails_align.reporting.sections import Found

    tuned = results.all(plan.tuning_cells())
    _check_there(plan.tuning_cells(), tuned)
    chosen = plan.choose(tuned)
    cells = plan.test_cells(chosen)
    tested = results.all(cells)
    _check_there(cells, tested)
    return Found(plan, tuned, tested, chosen)


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
