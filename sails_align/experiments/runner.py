"""Run the jobs that are not done, several at a time; a stopped or killed run is resumed by running it again.

Several machines can work in one folder on a shared disk: a job that another machine does is waited for.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sails_align.core.progress import progress_bar
from sails_align.experiments.jobs import Failure, Job
from sails_align.experiments.launchers import Launcher, Running

ENDS_WITHIN = 20.0
"""Seconds that jobs get to end when the run is stopped."""


def run_jobs(
    jobs: Sequence[Job],
    launcher: Launcher,
    *,
    title: str = "",
    progress: bool = False,
    keeps_going: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Failure]:
    """Run the jobs that are not done, in order as far as room and dependencies allow.

    Args:
        jobs: each after those that it depends on.
        launcher: starts them.
        title: of the progress bar.
        progress: show a bar with an estimate of the time left.
        keeps_going: whether jobs that do not depend on a failed one are still started.
        say: prints a line about each job.

    Returns:
        The jobs that failed. Those that depend on them were not started.
    """
    signals = _Signals()
    queue = _Queue(jobs, launcher, keeps_going, say, signals)
    with signals.as_exceptions(), progress_bar(progress) as bar:
        task = bar.add_task(title, total=len(jobs), completed=queue.n_ended)
        try:
            while queue.start() or queue.started:
                bar.update(task, completed=queue.n_ended)
                time.sleep(launcher.poll_seconds)
                queue.collect()
            bar.update(task, completed=queue.n_ended)
        except BaseException:
            queue.stop()
            raise
    return queue.failures


@dataclass
class _Started:
    job: Job
    running: Running
    at: float


@dataclass
class _Queue:
    """The state of one call of the runner."""

    jobs: Sequence[Job]
    launcher: Launcher
    keeps_going: bool
    say: Callable[[str], None]
    signals: "_Signals"
    started: dict[int, _Started] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting = list(enumerate(self.jobs, 1))
        self._ended = {number for number, job in self._waiting if job.is_done()}

    @property
    def n_ended(self) -> int:
        """Number of jobs that were done before, succeeded or failed."""
        return len(self._ended | self.done)

    def start(self) -> bool:
        """Start jobs while there is room. Returns whether some were done before, so that others may be ready now."""
        found_done = False
        for number, job in list(self._waiting) if self.keeps_going or not self.failures else ():
            missing = {other.name for place, other in enumerate(self.jobs, 1) if place not in self.done}
            if missing & set(job.after):
                continue
            if job.is_done():
                self._tell(number, job, "done before")
                self.done.add(number)
                found_done = True
            else:
                with self.signals.held():  # a started job that is not in the list would never be ended
                    running = self.launcher.start(job)
                    if running is not None:
                        self.started[number] = _Started(job, running, time.monotonic())
                if running is None:  # there is no room, and later jobs do not overtake this one
                    break
                self._tell(number, job, str(job.log))
            self._waiting.remove((number, job))
        return found_done

    def collect(self) -> None:
        """Collect the started jobs that have ended."""
        for number, one in list(self.started.items()):
            code = one.running.poll()
            if code is None:
                continue
            del self.started[number]
            if code == 0:
                self.done.add(number)
                minutes = (time.monotonic() - one.at) / 60
                self._tell(number, one.job, f"finished, {minutes:.1f} minutes")
            else:
                self.failures.append(Failure(one.job, code))
                self._ended.add(number)
                self._tell(number, one.job, f"FAILED with exit code {code}\n{self.failures[-1]}")

    def stop(self) -> None:
        """End the started jobs, and wait for that."""
        for one in self.started.values():
            one.running.end()
        deadline = time.monotonic() + ENDS_WITHIN
        while any(one.running.poll() is None for one in self.started.values()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _tell(self, number: int, job: Job, what: str) -> None:
        self.say(f"{number:3} of {len(self.jobs)}  {job.name}: {what}")


class _Signals:
    """Raise exceptions on SIGTERM and Ctrl-C, but not while a job is being started."""

    def __init__(self) -> None:
        self._are_held = False
        self._received: int | None = None

    @contextmanager
    def as_exceptions(self) -> Iterator[None]:
        """Handle the signals within the block. Outside the main thread, which alone receives them, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A background process of a shell ignores Ctrl-C, and must go on ignoring it.
        caught = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals until the end of the block."""
        self._are_held = True
        try:
            yield
        finally:
            self._are_held = False
        if self._received is not None:
            self._raise(self._received)

    def _receive(self, number: int, _: Any) -> None:
        if self._are_held:
            self._received = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)
