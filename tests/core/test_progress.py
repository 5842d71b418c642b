"""Long work shows how far it is, with a terminal and without one."""

import re
import subprocess
import sys

import pytest

from sails_align.core.progress import progress_bar

WORK = """
import time
from sails_align.core import progress

progress.SECONDS_BETWEEN_LINES = progress.FIRST_LINE = 0.2
with progress.progress_bar({shown}) as bar:
    task = bar.add_task("slow work", total=1000)
    for _ in range(10):
        time.sleep(0.1)
        bar.advance(task, 100)
"""


def output(shown: bool) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", WORK.format(shown=shown)], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_without_a_terminal_lines_tell_the_time_left() -> None:
    out, err = output(shown=True)
    assert out == ""
    *lines, last = err.splitlines()
    first, *others = (re.fullmatch(r"slow work: (\d+) of 1,000 after 0:00:0\d(, .*)?", line) for line in lines)
    assert first is not None
    assert others
    assert all(match is not None and re.fullmatch(r", about 0:00:0\d left", match[2]) for match in others)
    done = [int(line.split()[2]) for line in lines]
    assert sorted(done) == done
    assert re.fullmatch(r"slow work: 1,000 of 1,000 in 0:00:0\d", last), "the final state"


def test_silent_work_says_nothing() -> None:
    assert output(shown=False) == ("", "")


def test_two_steps_that_end_together_after_a_long_time_are_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    with progress_bar(shown=False) as bar:
        monkeypatch.setattr(bar, "get_time", lambda: now[0])
        task = bar.add_task("trainings", total=57, completed=7)
        for now[0] in (799.0, 800.0):
            bar.advance(task)
        assert bar.tasks[0].time_remaining == 48 * 400, "two of them took 800 seconds"
