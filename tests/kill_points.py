"""Run a recipe, kill it with SIGKILL at each of some moments and resume it, until it ends by itself.

python tests/kill_points.py FOLDER MOMENTS options of the SFT recipe

Each run is a fork of this process, so that the imports are paid for once. A moment is a step and, within it, seconds.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from watched_run import Watch

from sails_align.subspace import discovery as subspaces
from sails_align.training import run as align


def start(folder: Path, options: list[str]) -> int:
    """Run the recipe in a process of its own; returns its id."""
    (folder / "step").unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    watch = Watch(folder)
    build_trainer = align.build_trainer
    align.build_trainer = lambda *given: build_trainer(*given, callbacks=[watch])
    try:
        align.main("sft", options)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def kill_at(child: int, step: int, delay: float, folder: Path) -> int:
    """Kill the process once a step has begun; returns the step it was in."""
    path = folder / "step"
    reached = -1
    while reached < step:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit(f"the run ended before step {step}")
        if path.exists():
            reached = int(path.read_text() or -1)
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return reached


def main() -> None:
    folder, moments, options = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    assert subspaces.load_truncated  # imported before forking
    resumed_at = []
    for step, delay in moments:
        kill_at(start(folder, options), step, delay, folder)
        resumed_at.append(json.loads((folder / "watched.json").read_text())["start_step"])
    status = os.waitpid(start(folder, options), 0)[1]
    resumed_at.append(json.loads((folder / "watched.json").read_text())["start_step"])
    print(json.dumps(resumed_at))
    raise SystemExit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
