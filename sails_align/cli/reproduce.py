"""`recipes/reproduce.py`, the paper's table on one model: what it takes, whether all that it needs is there, the runs.

<output_dir>/discovered/subspace/          the safety subspace, from which SFT and DPO start
<output_dir>/<run>/                        the trained models
<output_dir>/evaluated/<run>/<evaluation>/ what was measured
<output_dir>/logs/, done/                  what each step printed, and which of them are finished
<output_dir>/table.md                      the results, beside what the paper reports
"""

import os
import shlex
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sails_align.core.errors import CommandParser, InputError, without_password
from sails_align.experiments.options import LauncherOptions, ReproduceOptions

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedConfig

    from sails_align.experiments.reproduction.costs import Costs
    from sails_align.experiments.reproduction.plan import Reproduction, Step

CONFIGS = Path("recipes/configs")
FAILED = 1
"""Exit code of checks that found something missing, and of a step that failed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Show the plan, check what it needs, and unless `--dry-run` is given, run it.

    Raises:
        InputError: for options and files that cannot be used.
        SystemExit: with code 1, if a check or a step failed.
    """
    options, launching = _parse(argv)
    unreachable = None if options.skip_checks else _why_offline()
    if unreachable is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported that would try for minutes
    from rich.console import Console

    console = Console()
    planned = _planned(options)
    steps = planned.of.steps()
    if not steps:
        raise InputError(f"no step is named {' or '.join(options.steps)}; --dry-run lists them")
    costs = _show_plan(console, steps, planned, options)
    if not options.skip_checks and _check(console, planned, steps, costs, options, unreachable):
        raise SystemExit(FAILED)
    if options.dry_run:
        return
    from sails_align.core.files import work_folder, write_text
    from sails_align.experiments.launchers import launcher_of
    from sails_align.experiments.reproduction.results import table
    from sails_align.experiments.runner import run_jobs

    of = planned.of
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    launcher = launcher_of(launching, of.output_dir, max(1, of.num_gpus), of.n_gpus)
    with work_folder(of.output_dir):
        failures = run_jobs(of.jobs(), launcher, keeps_going=False, say=say)
        write_text(of.output_dir / "table.md", table(of))
    console.print(f"\n{table(of)}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"table     {of.output_dir / 'table.md'}", highlight=False, soft_wrap=True, markup=False)
    if failures:
        raise SystemExit(FAILED)


def _why_offline() -> str | None:
    """Why the hub cannot be asked; None if it can, or is not to be."""
    import httpx

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    shown = without_password(endpoint)
    try:
        httpx.head(endpoint, timeout=10.0, follow_redirects=True)
    except httpx.HTTPError as error:
        return f"{shown} cannot be asked ({error}): check the connection and HF_ENDPOINT; the rest is from the cache"
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(
            f"{shown} cannot be asked ({error});\n"
            "correct HF_ENDPOINT, or the proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY)"
        ) from error
    return None


def _parse(argv: Sequence[str] | None) -> tuple[ReproduceOptions, LauncherOptions]:
    """The options, without an import that could ask the hub."""
    parser = CommandParser(prog="reproduce.py", allow_abbrev=False, description=main.__doc__.split("\n")[0])  # pyright: ignore
    classes = (ReproduceOptions, LauncherOptions)
    for option in (option for options in classes for option in fields(options)):
        kind = str(option.type)
        if kind == str(bool):
            how: dict[str, Any] = {"action": "store_true"}
        else:
            types = (number for number in (int, float) if number.__name__ in kind)
            how = {"type": next(types, str), "nargs": "+" if "list" in kind else None}
        names = dict.fromkeys((f"--{option.name}", f"--{option.name.replace('_', '-')}"))
        required = option.default is MISSING and option.default_factory is MISSING
        parser.add_argument(*names, **how, required=required, default=SUPPRESS, help=option.metadata["help"])
    given = vars(parser.parse_args(argv))
    of_classes = ({option.name for option in fields(options)} & given.keys() for options in classes)
    reproduce, launcher = ({name: given[name] for name in names} for names in of_classes)
    return ReproduceOptions(**reproduce), LauncherOptions(**launcher)


@dataclass(frozen=True)
class _Planned:
    of: "Reproduction"
    config: "PreTrainedConfig | None"
    """Of the model; without it memory and costs are not known."""
    memory_gib: float
    """Of the machine."""
    problems: list[tuple[str, str]]
    """What, and why."""


def _planned(options: ReproduceOptions) -> _Planned:
    from sails_align.core.command_line import CommandLine
    from sails_align.experiments.reproduction.costs import fitting_engine
    from sails_align.experiments.reproduction.plan import Reproduction
    from sails_align.experiments.studies import read_plans
    from sails_align.training.dataset import load_model_config
    from sails_align.training.estimate import GIB
    from sails_align.training.memory import Engine

    file, stem = _file(options.model)
    plan = read_plans(CommandLine.read(["--config", str(file)]), None)[2][0].plans[0][1]
    if plan.protocol is None:
        raise InputError(f"{file} compares methods on the testbed; give a file with `runs` and `evaluate`")
    unknown: Engine = "single" if options.num_gpus < 2 else "zero2"
    # Replaced below, in place, where the model's shape is known: it takes the reproduction to know the options.
    engines: dict[str, Engine] = {run.name: unknown for run in plan.runs if run.trainer != "none"}
    folder, only = options.folder(stem), tuple(options.steps)
    of = Reproduction(plan.runs, plan.protocol, folder, options.num_gpus, engines, only)
    if not of.arguments:
        raise InputError(f"{file} trains nothing; give a file with a run that has `train: sft` or `train: dpo`")
    some = next(iter(of.arguments.values()))
    try:
        config = load_model_config(some)
    except InputError as error:
        return _Planned(of, None, 0.0, [("memory and costs", f"are not known: {error}")])
    problems, memory_gib = [], 0.0
    trained = {step.run for step in of.steps() if step.stage == "train"}
    for name, args in of.arguments.items() if options.num_gpus else ():
        engines[name], memory, fits = fitting_engine(args, config, options.num_gpus, options.gpu_memory_gib)
        if name in trained:
            memory_gib = max(memory_gib, memory.cpu / GIB)
        if name in trained and not fits:
            problems.append((f"train/{name}", f"fits no GPU of {options.gpu_memory_gib:g} GiB; see sails estimate"))
    return _Planned(of, config, memory_gib, problems)


def _check(
    console: "Console",
    planned: _Planned,
    steps: "Sequence[Step]",
    costs: "Sequence[Costs]",
    options: ReproduceOptions,
    unreachable: str | None,
) -> int:
    """Look at everything, and show it; how many checks failed."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from sails_align.experiments.reproduction.checks import Finding, findings, machine, repositories

    in_cache = sum(cost.disk_gb for step, cost in zip(steps, costs, strict=True) if step.stage in ("data", "discover"))
    disk_gb = {Path(HF_HUB_CACHE): in_cache, planned.of.output_dir: sum(cost.disk_gb for cost in costs) - in_cache}
    problems = list(planned.problems)
    if unreachable is not None and repositories(planned.of):
        problems.append(("hub", unreachable))
    n = n_failed = 0
    for finding in chain(
        machine(planned.of, options.gpu_memory_gib, planned.memory_gib, disk_gb),
        (Finding(what, "failed", why) for what, why in problems),
        findings(planned.of),
    ):
        style = {"ok": "green", "later": "yellow", "failed": "red"}[finding.status]
        console.print(f"{finding.status:7}", style=style, end=" ")
        console.print(f"{finding.what}: {finding.detail}", highlight=False, soft_wrap=True, markup=False)
        n, n_failed = n + 1, n_failed + (finding.status == "failed")
    console.print(f"\n{n} checks, {n_failed} failed", highlight=False)
    return n_failed


def _file(model: str) -> tuple[Path, str]:
    """The comparison's file, and what results are named by."""
    known = sorted(path.parent.name for path in CONFIGS.glob("*/compare.yaml"))
    if model in known:
        return CONFIGS / model / "compare.yaml", model
    if os.path.isfile(model):  # Path's raises on a name that is too long
        return Path(model), Path(model).stem
    where = f"one of {', '.join(known)}" if known else f"a file (there is no {CONFIGS} here: run it in the repository)"
    raise InputError(f"model is {model!r}; give {where}, or a file like their compare.yaml")


def _show_plan(
    console: "Console", steps: "Sequence[Step]", planned: _Planned, options: ReproduceOptions
) -> "Sequence[Costs]":
    """Show commands and costs; returns these."""
    from rich.table import Table

    from sails_align.experiments.reproduction.costs import Costs, costs_of

    for step in steps:
        console.print(f"# {step.name}", style="bold", highlight=False)
        console.print(shlex.join(step.argv), highlight=False, soft_wrap=True, markup=False)
    if planned.config is None:
        return [Costs()] * len(steps)
    costs = costs_of(steps, planned.of, planned.config, options.tflops)
    table = Table(title=f"expected, at {options.tflops:g} TFLOP/s (computed, not measured)")
    table.add_column("step")
    for heading in ("GPU-hours", "disk (GB)", "judge requests"):
        table.add_column(heading, justify="right")
    for step, cost in zip(steps, costs, strict=True):
        table.add_row(step.name, f"{cost.gpu_hours:.2f}", f"{cost.disk_gb:,.1f}", f"{cost.judge_requests:,}")
    total = [sum(getattr(cost, name) for cost in costs) for name in ("gpu_hours", "disk_gb", "judge_requests")]
    table.add_section()
    table.add_row("all", f"{total[0]:.1f}", f"{total[1]:,.0f}", f"{total[2]:,}")
    console.print(table)
    return costs
