"""Do one job of an experiment: a command or a function, and the file with its result once it succeeded."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from sails_align.core.errors import InputError
from sails_align.core.files import disk_errors, exclusive, read_record, write_json

Gpus = Literal["none", "one", "share", "all"]
"""GPUs of a job: none, one, an equal share of all, or all."""
PROGRAMS = {
    "python": (),
    "sails": ("-m", "sails_align"),
    "accelerate": ("-m", "accelerate.commands.accelerate_cli"),
    "hf": ("-m", "huggingface_hub.cli.hf"),
}
"""Programs as modules of this Python, because they may not be on the PATH."""
LOG_TAIL = 1500
"""Characters of a failed job's log that are shown."""


@dataclass(frozen=True)
class Job:
    """A piece of work that is done once. It can be sent to another process or machine, where it is called."""

    name: str
    work: tuple[str, ...] | Callable[[], dict[str, Any]]
    """A command (of `PROGRAMS`), or a function without arguments that returns the result."""
    result: Path
    """JSON file, written atomically."""
    log: Path
    """File for its output."""
    record: Mapping[str, Any] | None = None
    """What decides the result of a command, stored as the result: if it changes, the job is done again."""
    folder: Path | None = None
    """Folder without which the result does not count."""
    gpus: Gpus = "one"
    after: tuple[str, ...] = ()
    """Names of jobs that must have succeeded before, if they are among those to be done."""
    outdates: tuple[Path, ...] = ()
    """Results that depend on this one. They are deleted when the job is done again."""
    environment: Mapping[str, str] = field(default_factory=dict)
    keeps_log: bool = False
    """Whether the log is kept if the job succeeds."""
    also: tuple[str, ...] = ()
    """More options of a command, which do not decide its result."""

    def __call__(self) -> None:
        """Do the job; for submitit."""
        perform(self)

    def checkpoint(self, *_: Any) -> Any:
        """Queue the job again after its time limit, for submitit: it resumes from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    @property
    def lock(self) -> Path:
        """Lock file that keeps two machines from doing the same job."""
        return self.log.with_suffix(".lock")

    def is_outdated(self) -> bool:
        """Return whether there is a result that was decided by something else."""
        return bool(self.record) and read_record(self.result) not in ({}, self.record)

    def is_done(self) -> bool:
        """Return whether there is an intact result of this very job."""
        try:
            stored = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        is_ours = isinstance(stored, dict) if self.record is None else stored == self.record
        return is_ours and (self.folder is None or self.folder.is_dir())

    def prepare(self) -> None:
        """Create the log's folder, and delete results that will be out of date."""
        with disk_errors(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.result, *self.outdates):
                path.unlink(missing_ok=True)

    def start(self, gpus: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start the command, with its output in the log."""
        assert isinstance(self.work, tuple)
        program, *words = self.work
        environment = {**os.environ, **self.variables(gpus)}
        with disk_errors(self.log), self.log.open("wb") as log:
            command = [sys.executable, *PROGRAMS[program], *words, *self.also]
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, and delete the files that are no longer needed."""
        write_json(self.result, result)
        for path in (self.lock,) if self.keeps_log else (self.lock, self.log):
            path.unlink(missing_ok=True)

    def variables(self, gpus: Sequence[str]) -> dict[str, str]:
        """Return the environment variables of the work, besides inherited ones."""
        return {**self.environment, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}


@dataclass(frozen=True)
class Failure:
    """A job that failed."""

    job: Job
    code: int

    def __str__(self) -> str:
        log = self.job.log
        tail = log.read_text(errors="replace")[-LOG_TAIL:].strip() if log.is_file() else "killed"
        return f"{self.job.name}: {tail}\n({log})"


def perform(job: Job, gpus: Sequence[str] = ()) -> None:
    """Do a job in this process, which does nothing else, unless another machine has done it meanwhile.

    Raises `InputError` if the user can correct what fails, or if the job's command fails.
    """
    with exclusive(job.lock):
        if job.is_done():
            return
        job.prepare()
        if isinstance(job.work, tuple):
            with job.start(gpus) as process:
                try:
                    code = process.wait()
                except BaseException:  # this process is to end
                    end_tree(process.pid)
                    raise
            if code != 0:
                raise InputError(f"{job.name} ended with exit code {code}; read {job.log}")
            job.finish(job.record or {})
            return
        os.environ.update(job.variables(gpus))
        with disk_errors(job.log), job.log.open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            job.finish(job.work())
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise


def perform_in_fork(job: Job, gpus: Sequence[str]) -> None:
    """Do a job in a process that was forked for it."""
    gc.freeze()  # collecting what was imported before would take a second of each job
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its commands end, too
    try:
        perform(job, gpus)
    except InputError:
        raise SystemExit(2) from None


def end_tree(pid: int, *, at_once: bool = False) -> None:
    """End a process and its descendants, which would outlive it; `at_once` does not let them clean up."""
    with suppress(psutil.NoSuchProcess):
        launched = psutil.Process(pid)
        for each in (launched, *launched.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill() if at_once else each.terminate()
