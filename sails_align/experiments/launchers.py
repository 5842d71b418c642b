"""Launch jobs: in processes on this machine, or on a cluster through submitit."""

import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sails_align.core.errors import InputError
from sails_align.core.files import write_text
from sails_align.experiments.jobs import Gpus, Job, end_tree, perform_in_fork
from sails_align.experiments.options import LauncherOptions
from sails_align.models.threads import OVERRIDE, SHARE

PRELOADED = [
    "sails_align.experiments.cells",
    "sails_align.training.run",
    "sails_align.training.rlhf.run",
    "sails_align.evaluation.attacks.gcg",
    "lm_eval.models.huggingface",
    "peft",
    "sae_lens",
]
"""Modules that the server of processes imports once for all jobs."""


class Running(Protocol):
    """A started job."""

    def poll(self) -> int | None:
        """Return the exit code; None while the job runs."""
        ...

    def end(self) -> None:
        """End the job and all that it started."""
        ...


class Launcher(Protocol):
    """Something that starts jobs."""

    poll_seconds: float
    """Seconds between two polls."""

    def start(self, job: Job) -> Running | None:
        """Start a job; return None if there is no room for it now."""
        ...


class Local:
    """Run `n_slots` jobs at a time on this machine, each with its share of the GPUs.

    Functions run in processes forked from a server that has imported everything. Commands take no lock: this process
    must be the only one in their output folder.
    """

    poll_seconds = 0.05

    def __init__(self, n_slots: int) -> None:
        self._n_slots = n_slots
        self._taken: dict[int, Running] = {}

    def start(self, job: Job) -> Running | None:
        """Start a job in a free slot; one that needs all GPUs waits until it is alone."""
        self._taken = {slot: running for slot, running in self._taken.items() if running.poll() is None}
        free = [slot for slot in range(self._n_slots) if slot not in self._taken]
        wanted = self._n_slots if job.gpus == "all" else 1
        if len(free) < wanted:
            return None
        share = share_of(free[0], self._n_slots) if job.gpus in ("one", "share") else []
        gpus = share[:1] if job.gpus == "one" else share
        job = replace(job, environment={**self._threads(wanted), **job.environment})
        running = _LocalCommand(job, gpus) if isinstance(job.work, tuple) else _LocalFunction(job, gpus)
        self._taken |= dict.fromkeys(free[:wanted], running)
        return running

    def _threads(self, n_slots: int) -> dict[str, str]:
        """Return variables for a job's share of the cores: jobs that each use all of them wait for each other."""
        if OVERRIDE in os.environ or n_slots == self._n_slots:
            return {}
        return dict.fromkeys((OVERRIDE, SHARE), str(max(1, len(os.sched_getaffinity(0)) * n_slots // self._n_slots)))


class _LocalCommand:
    def __init__(self, job: Job, gpus: Sequence[str]) -> None:
        job.prepare()
        self._job, self._process = job, job.start(gpus)
        self._is_finished = False

    def poll(self) -> int | None:
        code = self._process.poll()
        if code == 0 and not self._is_finished:
            self._job.finish(self._job.record or {})
            self._is_finished = True
        return code

    def end(self) -> None:
        end_tree(self._process.pid)


class _LocalFunction:
    def __init__(self, job: Job, gpus: Sequence[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=perform_in_fork, args=(job, gpus))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def end(self) -> None:
        if self._process.pid is not None and self._process.exitcode is None:
            end_tree(self._process.pid)


def share_of(slot: int, n_slots: int) -> list[str]:
    """Return the GPUs of one of several jobs, as CUDA_VISIBLE_DEVICES names them; none without GPUs."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = visible or [str(index) for index in range(torch.cuda.device_count())]
    if not gpus:
        return []
    each = len(gpus) // n_slots
    return gpus[slot * each : (slot + 1) * each] if each else [gpus[slot % len(gpus)]]


def available_slots() -> int:
    """Return how many jobs fit on this machine: one per GPU, or else per core."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


class Cluster:
    """Queue jobs on a cluster through submitit. A job that reaches its time limit is queued again and resumes.

    Args:
        options: of the queue.
        folder: for submitit's own files, on a disk that all machines share.
        n_gpus: GPUs of a job, by what it needs.

    Raises:
        InputError: if submitit or the queue's commands are missing.
    """

    def __init__(self, options: LauncherOptions, folder: Path, n_gpus: Mapping[Gpus, int]) -> None:
        if importlib.util.find_spec("submitit") is None:
            raise InputError(
                f"launcher is {options.launcher}, but submitit is not installed; pip install 'sails-align[slurm]'"
            )
        if options.launcher == "slurm" and shutil.which("sbatch") is None:
            raise InputError(
                "launcher is slurm, but this machine has no sbatch command; run this on a login node of the cluster, "
                "or use --launcher local"
            )
        from submitit import AutoExecutor

        self._is_local = options.launcher == "submitit-local"
        self.poll_seconds = 0.2 if self._is_local else 5.0
        self._executor = AutoExecutor(folder, cluster="local" if self._is_local else "slurm")
        self._executor.update_parameters(**options.parameters())
        self._n_gpus, self._max_jobs = n_gpus, options.slurm_max_jobs
        self._queued: list[Running] = []

    def start(self, job: Job) -> Running | None:
        """Queue a job, unless the allowed number of jobs is in the queue."""
        self._queued = [running for running in self._queued if running.poll() is None]
        if self._max_jobs is not None and len(self._queued) >= self._max_jobs:
            return None
        self._executor.update_parameters(name="sails", gpus_per_node=self._n_gpus[job.gpus])
        running = _Queued(job, self._executor.submit(job), self._is_local)
        self._queued.append(running)
        return running


class _Queued:
    def __init__(self, job: Job, submitted: Any, is_local: bool) -> None:
        self._job, self._submitted, self._is_local = job, submitted, is_local
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is not None or not self._submitted.done():
            return self._code
        error = self._submitted.exception()
        if error is not None and not self._job.log.is_file():  # it failed before
            write_text(self._job.log, str(error))
        self._code = 0 if error is None else 1  # kept, because submitit waits for a missing result each time
        return self._code

    def end(self) -> None:
        self._submitted.cancel(check=False)
        if self._is_local:  # there submitit's processes ignore SIGTERM
            end_tree(int(self._submitted.job_id), at_once=True)


def launcher_of(options: LauncherOptions, folder: Path, n_slots: int, n_gpus: Mapping[Gpus, int]) -> Launcher:
    """Return the launcher that the options name; see `Local` and `Cluster`."""
    if options.launcher == "local":
        return Local(n_slots)
    return Cluster(options, folder / "submitit", n_gpus)
