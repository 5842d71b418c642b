"""Show progress of long work on standard error: bars on a terminal, else a line every minute."""

from datetime import timedelta
from threading import Event, Thread

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 60.0
SECONDS_OF_SPEED = 600.0
"""Time over which the speed is averaged: slow work takes minutes for each step."""


class _Bars(Progress):
    """Print a line for each running task now and then if there is no terminal to draw bars on."""

    def start(self) -> None:
        """Show the tasks from now on."""
        super().start()
        self._stopped = Event()
        if not (self.disable or self.console.is_terminal):
            Thread(target=self._print_lines, daemon=True).start()

    def stop(self) -> None:
        """Show the final state."""
        self._stopped.set()
        super().stop()

    def _print_lines(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_LINES):
            for task in self.tasks:
                if not task.finished:
                    self.console.print(_line(task), highlight=False, soft_wrap=True)


def _line(task: Task) -> str:
    done = f"{task.completed:,.0f}" + ("" if task.total is None else f" of {task.total:,.0f}")
    elapsed = timedelta(seconds=int(task.elapsed or 0))
    left = "" if task.time_remaining is None else f", about {timedelta(seconds=int(task.time_remaining))} left"
    return f"{task.description}: {done} after {elapsed}{left}"


def progress_bar(shown: bool) -> Progress:
    """Create a bar with a row for each task: description, share, count, elapsed time and time left."""
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
        speed_estimate_period=SECONDS_OF_SPEED,
    )
