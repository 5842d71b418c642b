"""Show progress of long work on standard error: bars on a terminal, else a line every minute."""

from threading import Event, Thread
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sails_align.core.log import CONSOLE, duration, say

FIRST_LINE = 10.0
"""Seconds of work after which the first line comes."""
SECONDS_BETWEEN_LINES = 60.0
SECONDS_OF_SPEED = 7200.0
"""Time over which the speed is averaged: slow work takes many minutes for each step."""


class _Bars(Progress):
    """Print a line for each running task now and then if there is no terminal to draw bars on."""

    def __init__(self, *columns: ProgressColumn, shown: bool) -> None:
        self._has_lines = shown and not CONSOLE.is_terminal
        super().__init__(
            *columns,
            console=CONSOLE,
            transient=True,
            disable=not shown or self._has_lines,
            speed_estimate_period=SECONDS_OF_SPEED,
        )
        self._stopped = Event()
        self._told: set[int] = set()

    def add_task(self, *args: Any, **options: Any) -> TaskID:
        """Add a task. Its speed counts from here: rich would count from the end of the first step on."""
        task = super().add_task(*args, **options)
        self.advance(task, 0)
        return task

    def start(self) -> None:
        """Show the tasks from now on."""
        super().start()
        if self._has_lines:
            Thread(target=self._print_lines, daemon=True).start()

    def stop(self) -> None:
        """Say how long the tasks have taken, if it was long."""
        self._stopped.set()
        super().stop()
        for task in self.tasks:
            if self._is_shown and task.completed and (task.elapsed or 0) >= FIRST_LINE:
                say(f"{task.description}: {_count(task)} in {duration(task.elapsed or 0)}")

    @property
    def _is_shown(self) -> bool:
        return self._has_lines or not self.disable

    def _print_lines(self) -> None:
        wait = min(FIRST_LINE, SECONDS_BETWEEN_LINES)
        while not self._stopped.wait(wait):
            wait = SECONDS_BETWEEN_LINES
            for task in self.tasks:
                if not task.finished:
                    say(_line(task))


def _count(task: Task) -> str:
    return f"{task.completed:,.0f}" + ("" if task.total is None else f" of {task.total:,.0f}")


def _line(task: Task) -> str:
    left = "" if task.time_remaining is None else f", about {duration(task.time_remaining)} left"
    return f"{task.description}: {_count(task)} after {duration(task.elapsed or 0)}{left}"


def progress_bar(shown: bool) -> Progress:
    """Create a bar with a row for each task: description, share, count, elapsed time and time left."""
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        shown=shown,
    )
