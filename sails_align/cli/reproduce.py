"""`recipes/reproduce.py`: show the plan, the costs and what is missing for the paper's table on one model, and run it.

<output_dir>/discovered/subspace/          the safety subspace, from which SFT and DPO start
<output_dir>/<run>/                        the trained models
<output_dir>/evaluated/<run>/<evaluation>/ what was measured
<output_dir>/logs/, done/                  output of each step, and a file for each finished one
<output_dir>/table.md                      the results, beside what the paper reports
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from sails_align.core.command_line import CommandLine
from sails_align.core.earlier import holds_other
from sails_align.core.errors import InputError, without_password
from sails_align.core.log import log_file, show
from sails_align.core.suggestions import did_you_mean_path, suggestion
from sails_align.core.tables import FittedTable
from sails_align.experiments.options import LauncherOptions, ReproduceOptions

if TYPE_CHECKING:
    from sails_align.experiments.jobs import Job
    from sails_align.experiments.reproduction.costs import Costs
    from sails_align.experiments.reproduction.plan import Reproduction

CONFIGS = Path("recipes/configs")
FAILED = 1
"""Exit code of a failed check or step."""


def main(argv: Sequence[str] | None = None) -> None:
    """Show the plan, check what it needs, and unless `--dry-run` is given, run it.

    Raises:
        InputError: for options and files that cannot be used.
        SystemExit: with code 1, if a check or a step failed.
    """
    options, launching = CommandLine.read(argv).parse([ReproduceOptions, LauncherOptions], prog="reproduce.py")
    problems = {} if options.skip_checks else _why_offline()
    if problems:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported that would try for minutes
    from sails_align.core.files import work_folder, write_text
    from sails_align.experiments.launchers import launcher_of
    from sails_align.experiments.reproduction.costs import costs_of
    from sails_align.experiments.reproduction.results import table
    from sails_align.experiments.runner import run_jobs

    plan, unknown = planned(options)
    jobs = plan.jobs()
    if not jobs:
        raise InputError(f"no step is named {' or '.join(options.steps)}; --dry-run lists them")
    if not options.overwrite_output_dir:
        _refuse_other(plan, jobs)
    for job in jobs:
        show(Text(f"# {job.name}", style="bold"), shlex.join(job.work) if isinstance(job.work, tuple) else "")
    costs = costs_of(jobs, plan, options.tflops)
    if plan.config is not None:
        show(_cost_table(jobs, costs, options.tflops))
    if not options.skip_checks and _check(plan, jobs, costs, problems | unknown):
        raise SystemExit(FAILED)
    if options.dry_run:
        return
    launcher = launcher_of(launching, plan.output_dir, max(1, plan.num_gpus), plan.n_gpus)
    with work_folder(plan.output_dir), log_file(plan.output_dir, "sails reproduce"):
        failures = run_jobs(jobs, launcher, keeps_going=False, say=show, title="steps", progress=True)
        write_text(plan.output_dir / "table.md", table(plan))
    show(f"\n{table(plan)}\ntable     {plan.output_dir / 'table.md'}")
    if failures:
        raise SystemExit(FAILED)


def _refuse_other(plan: "Reproduction", jobs: "Sequence[Job]") -> None:
    """Refuse a folder with results of other options or files, before a step replaces them."""
    other = [job.name for job in jobs if job.is_outdated()]
    if other:
        raise holds_other(f"{plan.output_dir} holds other results", other)


def _why_offline() -> dict[str, str]:
    """Return why the hub cannot be reached; nothing if it can, or if HF_HUB_OFFLINE is set."""
    import httpx

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {}
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    shown = without_password(endpoint)
    try:
        httpx.head(endpoint, timeout=10.0, follow_redirects=True)
    except httpx.HTTPError as error:
        return {"hub": f"{shown} cannot be reached ({error}): check the connection and HF_ENDPOINT; using the cache"}
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(
            f"{shown} cannot be reached ({error});\n"
            "correct HF_ENDPOINT, or the proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY)"
        ) from error
    return {}


def planned(options: ReproduceOptions) -> tuple["Reproduction", dict[str, str]]:
    """Return the reproduction, and what is unknown about it, with the reasons.

    Raises `InputError` if the file cannot be used.
    """
    from sails_align.experiments.reproduction.plan import Reproduction
    from sails_align.experiments.studies import read_plans
    from sails_align.training.dataset import load_model_config

    file, stem = _file(options.model)
    compared = read_plans(CommandLine.read(["--config", str(file)]), None)[2][0].plans[0][1]
    if compared.protocol is None:
        raise InputError(f"{file} compares methods on the testbed; give a file with `runs` and `evaluate`")
    plan = Reproduction(
        compared.runs,
        compared.protocol,
        Path(options.output_dir or f"runs/reproduce-{stem}"),
        options.num_gpus,
        options.gpu_memory_gib,
        only=tuple(options.steps),
        overwrite=options.overwrite_output_dir,
    )
    if not plan.arguments:
        raise InputError(f"{file} trains nothing; give a file with a run that has `train: sft` or `train: dpo`")
    some = next(iter(plan.arguments.values()))
    try:
        return replace(plan, config=load_model_config(some)), {}
    except InputError as error:
        return plan, {"memory and costs": f"are unknown: {error}"}


def _file(model: str) -> tuple[Path, str]:
    """Return the comparison's file, and the name of its results."""
    known = sorted(path.parent.name for path in CONFIGS.glob("*/compare.yaml"))
    if model in known:
        return CONFIGS / model / "compare.yaml", model
    if os.path.isfile(model):  # Path's raises on a name that is too long
        return Path(model), Path(model).stem
    where = f"one of {', '.join(known)}" if known else f"a file (there is no {CONFIGS} here: run it in the repository)"
    hint = suggestion(model, known) or did_you_mean_path(model)
    raise InputError(f"model is {model!r}{hint}\ngive {where}, or a file like their compare.yaml")


def _cost_table(jobs: "Sequence[Job]", costs: "Sequence[Costs]", tflops: float) -> FittedTable:
    title = f"expected, at {tflops:g} TFLOP/s (computed, not measured)"
    table = FittedTable(title, ("step", "GPU-hours", "disk (GB)", "judge requests"))
    for job, cost in zip(jobs, costs, strict=True):
        table.add_row(job.name, f"{cost.gpu_hours:.2f}", f"{cost.disk_gb:,.1f}", f"{cost.judge_requests:,}")
    total = [sum(getattr(cost, name) for cost in costs) for name in ("gpu_hours", "disk_gb", "judge_requests")]
    table.add_section()
    table.add_row("all", f"{total[0]:.1f}", f"{total[1]:,.0f}", f"{total[2]:,}")
    return table


def _check(plan: "Reproduction", jobs: "Sequence[Job]", costs: "Sequence[Costs]", problems: dict[str, str]) -> int:
    """Check everything and print it. Returns how many checks failed."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from sails_align.experiments.reproduction.checks import Finding, findings, machine, other_models, repositories
    from sails_align.experiments.reproduction.costs import evaluations_download_gb

    if "hub" in problems and not repositories(plan):  # nothing of it is needed
        del problems["hub"]
    disk_gb = {Path(HF_HUB_CACHE): 0.0, plan.output_dir: 0.0}
    for job, cost in zip(jobs, costs, strict=True):
        is_cached = job.name.startswith(("data", "discover"))
        disk_gb[Path(HF_HUB_CACHE) if is_cached else plan.output_dir] += cost.disk_gb
    if any(job.name.startswith(("evaluate", "attack")) for job in jobs):
        disk_gb[Path(HF_HUB_CACHE)] += evaluations_download_gb(other_models(plan))
    told = [Finding(what, "failed", why) for what, why in problems.items()]
    statuses = []
    for finding in chain(machine(plan, disk_gb), told, findings(plan)):
        style = {"ok": "green", "later": "yellow", "failed": "red"}[finding.status]
        show(Text.assemble((f"{finding.status:7}", style), f" {finding.what}: {finding.detail}"))
        statuses.append(finding.status)
    show(f"\n{len(statuses)} checks, {statuses.count('failed')} failed")
    return statuses.count("failed")
