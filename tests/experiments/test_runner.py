"""The runner of jobs: real processes, on this machine and through submitit's own executor of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import PATIENCE, is_at_work

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.experiments.jobs import Job, end_tree
from sails_align.experiments.launchers import Cluster, Launcher, Local, launcher_of
from sails_align.experiments.options import LauncherOptions
from sails_align.experiments.runner import _Queue, _Signals, run_jobs


def command(folder: Path, name: str, program: str = "print('done')", **more: Any) -> Job:
    work = ("python", "-c", program)
    made = Job(name, work, folder / f"{name}.json", folder / f"{name}.log", record={"argv": list(work)}, keeps_log=True)
    return Job(**{**vars(made), **more})


def function(folder: Path, name: str, work: Callable[[], dict[str, Any]], **more: Any) -> Job:
    return Job(name, work, folder / f"{name}.json", folder / f"{name}.log", **more)


def launchers(folder: Path) -> dict[str, Launcher]:
    options = LauncherOptions(launcher="submitit-local", slurm_time=1, slurm_gpus=0)
    none: dict[Any, int] = dict.fromkeys(("none", "one", "share", "all"), 0)
    return {"local": Local(2), "submitit": launcher_of(options, folder, 2, none)}


@pytest.fixture(params=["local", "submitit"])
def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> Launcher:
    return launchers(tmp_path)[request.param]


def test_results_are_written_once(launcher: Launcher, tmp_path: Path) -> None:
    jobs = [
        function(tmp_path, "of a function", partial(dict, pid=1)),
        command(tmp_path, "of a command", "import os; print('pid', os.getpid())"),
    ]
    said: list[str] = []
    assert run_jobs(jobs, launcher, say=said.append) == []
    assert json.loads(jobs[0].result.read_text()) == {"pid": 1}
    assert not jobs[0].log.exists()
    assert jobs[1].log.read_text().startswith("pid")
    assert sum("finished" in line for line in said) == 2
    said.clear()
    assert run_jobs(jobs, launcher, say=said.append) == []
    assert [line.rpartition(": ")[2] for line in said] == ["done before"] * 2
    jobs[0].result.write_text('{"p')  # damaged
    assert run_jobs(jobs, launcher) == []
    assert json.loads(jobs[0].result.read_text()) == {"pid": 1}


def test_progress_counts_what_was_done_before(tmp_path: Path) -> None:
    """Also jobs that come after those that are run: the bar must not stand still until they are reached."""
    jobs = [command(tmp_path, f"job {number}") for number in range(5)]
    assert run_jobs([jobs[1], jobs[3], jobs[4]], Local(1)) == []
    queue = _Queue(jobs, Local(1), True, lambda _: None, _Signals())
    counts = [queue.n_ended]
    while queue.start() or queue.started:
        queue.collect()
        counts.append(queue.n_ended)
    assert counts[0] == 3
    assert sorted(set(counts)) == [3, 4, 5]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    job = command(tmp_path, "of a command")
    job.log.mkdir()
    with pytest.raises(InputError, match=r"cannot write .*of a command.log: Is a directory"):
        run_jobs([job], Local(1))
    assert not job.result.exists()


def test_a_failure_stops_what_depends_on_it_and_nothing_else(launcher: Launcher, tmp_path: Path) -> None:
    jobs = [
        command(tmp_path, "fails", "print('this is why'); raise SystemExit(3)"),
        command(tmp_path, "after it", after=("fails",)),
        command(tmp_path, "another"),
        command(tmp_path, "after another", after=("another", "of another plan")),
    ]
    (failure,) = run_jobs(jobs, launcher)
    assert failure.job is jobs[0]
    assert "this is why" in str(failure)
    assert [job.is_done() for job in jobs] == [False, False, True, True]


def test_a_function_that_fails_says_why(launcher: Launcher, tmp_path: Path) -> None:
    (failure,) = run_jobs([function(tmp_path, "reads", partial(int, "seven"))], launcher)
    assert "invalid literal for int" in str(failure)


def test_a_failure_can_stop_all_that_has_not_started(tmp_path: Path) -> None:
    jobs = [command(tmp_path, "fails", "raise SystemExit(3)"), command(tmp_path, "later")]
    (failure,) = run_jobs(jobs, Local(1), keeps_going=False)
    assert failure.code == 3
    assert not jobs[1].log.exists()


def test_jobs_run_at_a_time_and_those_that_need_all_gpus_alone(tmp_path: Path) -> None:
    program = "import time; print(time.time(), flush=True); time.sleep(0.6); print(time.time())"
    jobs = [command(tmp_path, name, program) for name in ("a", "b")]
    jobs += [command(tmp_path, name, program, gpus="all") for name in ("c", "d")]
    assert run_jobs(jobs, Local(2)) == []
    (a0, a1), (b0, b1), (c0, c1), (d0, _) = (map(float, job.log.read_text().split()) for job in jobs)
    assert max(a0, b0) < min(a1, b1)
    assert max(a1, b1) < c0 < c1 < d0


def test_jobs_that_run_at_a_time_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    program = "import os; print(os.environ.get('OMP_NUM_THREADS'))"
    own = {"OMP_NUM_THREADS": "1"}
    jobs = [command(tmp_path, "a", program), command(tmp_path, "b", program, environment=own)]
    jobs += [command(tmp_path, "alone", program, gpus="all")]
    assert run_jobs(jobs, Local(2)) == []
    assert [job.log.read_text().strip() for job in jobs] == ["3", "1", "None"]


def test_what_is_built_on_a_job_is_out_of_date_once_it_is_done_again(tmp_path: Path) -> None:
    first, second = command(tmp_path, "first"), command(tmp_path, "second", after=("first",))
    first = Job(**{**vars(first), "outdates": (second.result,)})
    assert run_jobs([first, second], Local(1)) == []
    first.result.unlink()
    assert run_jobs([first], Local(1)) == []
    assert not second.is_done()


def test_gpus_are_named_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [command(tmp_path, str(gpus), program, gpus=gpus) for gpus in ("one", "share", "all", "none")]
    assert run_jobs(jobs, Local(2)) == []
    seen = {job.name: job.log.read_text().strip() for job in jobs}
    assert seen["one"] in ("4", "6")
    assert seen["share"] in ("4,5", "6,7")
    assert seen["all"] == seen["none"] == "4,5,6,7"


STOPPED = """
import sys
from pathlib import Path
from sails_align.experiments.jobs import Job
from sails_align.experiments.launchers import Local
from sails_align.experiments.runner import run_jobs
folder = Path(sys.argv[1])
jobs = [Job("sleeps", ("python", "-c", "import time; time.sleep(60)"), folder / "r.json", folder / "log", record={})]
run_jobs(jobs, Local(1))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_ends_its_jobs(how: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not (started := psutil.Process(process.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(60) != 0
    assert started
    assert not any(map(is_at_work, started))
    assert not (tmp_path / "r.json").exists()


def test_what_a_launcher_started_ends_with_it() -> None:
    launcher = subprocess.Popen(["sh", "-c", "sleep 3600 & echo; wait"], stdout=subprocess.PIPE)
    with launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        (worker,) = psutil.Process(launcher.pid).children()
        end_tree(launcher.pid)
        assert launcher.wait(10) == -signal.SIGTERM
    deadline = time.monotonic() + PATIENCE
    while is_at_work(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_at_work(worker)
    end_tree(launcher.pid)  # which is gone


# -- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_in_the_queue_are_limited(tmp_path: Path) -> None:
    options = LauncherOptions(launcher="submitit-local", slurm_max_jobs=1, slurm_time=1)
    launcher = Cluster(options, tmp_path / "submitit", {"one": 0})
    running = launcher.start(command(tmp_path, "first", "import time; time.sleep(60)"))
    assert running is not None
    assert launcher.start(command(tmp_path, "second")) is None
    running.end()
    deadline = time.monotonic() + PATIENCE
    while running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running.poll() not in (None, 0)
    assert launcher.start(command(tmp_path, "second")) is not None


def test_the_options_reach_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a queue of our own: `sbatch` that keeps what it is given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    copies = f"cp $1 {tmp_path}/script; echo Submitted batch job 7"
    for name, text in (("sbatch", copies), ("sacct", "exit 0"), ("srun", "")):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    options = LauncherOptions(
        launcher="slurm",
        slurm_partition="gpu",
        slurm_account="mine",
        slurm_time=90,
        slurm_cpus=8,
        slurm_mem_gb=64,
        slurm_options=["constraint=h100"],
        slurm_setup=["module load cuda"],
    )
    launcher = launcher_of(options, tmp_path, 1, {"none": 0, "one": 1, "share": 1, "all": 8})
    assert launcher.start(command(tmp_path, "one job", gpus="all")) is not None
    script = (tmp_path / "script").read_text()
    for line in ("partition=gpu", "account=mine", "time=90", "cpus-per-task=8", "mem=64GB", "constraint=h100"):
        assert f"#SBATCH --{line}" in script
    assert "#SBATCH --gpus-per-node=8" in script
    assert "\nmodule load cuda\n" in script


def test_what_is_missing_for_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no sbatch command; run this on a login node"):
        Cluster(LauncherOptions(launcher="slurm"), tmp_path, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"submitit is not installed; pip install 'sails-align\[slurm\]'"):
        Cluster(LauncherOptions(launcher="slurm"), tmp_path, {})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"launcher": "lsf"}, "launcher is 'lsf', which is not one of: local, slurm"),
        ({"slurm_time": 0}, "slurm_time is 0; choose 1 or more"),
        ({"slurm_options": ["exclusive"]}, "slurm_options has 'exclusive'; give NAME=VALUE"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        LauncherOptions(**options)


def test_a_job_that_another_machine_did_meanwhile_is_left(tmp_path: Path) -> None:
    from sails_align.experiments.jobs import perform

    job = command(tmp_path, "shared", "raise SystemExit(1)")
    write_json(job.result, job.record)
    perform(job)
    assert not job.log.exists()
