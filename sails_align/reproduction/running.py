"""Runs the steps: each is a process, those of one stage that need one GPU side by side, and none twice.

<output_dir>/logs/<step>.log   what it printed
<output_dir>/done/<step>.json  its command, once it succeeded
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path

from rich.console import Console

from sails_align.artifacts import write_json
from sails_align.comparison.runner import LOG_TAIL, share_of
from sails_align.reproduction.plan import Reproduction, Step

PROGRAMS = {
    "sails": ("-m", "sails_align"),
    "accelerate": ("-m", "accelerate.commands.accelerate_cli"),
    "hf": ("-m", "huggingface_hub.cli.hf"),
}
"""As modules of this Python, which need not be on the PATH."""


def run_steps(steps: Sequence[Step], of: Reproduction, console: Console) -> bool:
    """Run what is not done, in order. After a failure no further step is started; whether all are done."""
    running = _Running(of, console, len(steps))
    numbered = list(enumerate(steps, 1))
    for _, group in groupby(numbered, key=lambda item: (item[1].stage, item[1].gpus)):
        of_stage = list(group)
        n_slots = max(1, of.num_gpus) if of_stage[0][1].gpus == "one" else 1
        if not running.side_by_side(of_stage, n_slots):
            return False
    return True


class _Running:
    def __init__(self, of: Reproduction, console: Console, n_steps: int) -> None:
        self._folder, self._console, self._n_steps = of.output_dir, console, n_steps
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_over = False

    def side_by_side(self, steps: list[tuple[int, Step]], n_slots: int) -> bool:
        """Run steps, so many at a time, each with its share of the GPUs; whether all succeeded."""
        free = list(range(n_slots))

        def one(number: int, step: Step) -> bool:
            with self._lock:
                slot = free.pop(0)
            try:
                return self._run(number, step, share_of(slot, n_slots) if step.gpus == "one" else [])
            finally:
                with self._lock:
                    free.append(slot)

        with ThreadPoolExecutor(n_slots) as pool:
            futures = [pool.submit(one, number, step) for number, step in steps]
            try:
                return all([future.result() for future in as_completed(futures)])
            except BaseException:  # Ctrl-C: the commands end with this process, and go on from where they were
                self._is_over = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._processes):
                    process.terminate()
                raise

    def _run(self, number: int, step: Step, gpus: Sequence[str]) -> bool:
        file_name = step.name.replace("/", ".")
        done, log = self._folder / "done" / f"{file_name}.json", self._folder / "logs" / f"{file_name}.log"
        title = f"{number:3} of {self._n_steps}  {step.name}"
        if _is_done(done, step):
            self._say(f"{title}: done before")
            return True
        if self._is_over:
            return False
        self._say(f"{title}: {log}")
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
        command = [sys.executable, *PROGRAMS[step.argv[0]], *step.argv[1:]]
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
            self._processes.add(process)
            code = process.wait()
            self._processes.discard(process)
        minutes = (time.monotonic() - started) / 60
        if code == 0:
            write_json(done, {"argv": step.argv})
            self._say(f"{title}: finished, {minutes:.1f} minutes")
            return True
        if not self._is_over:
            tail = log.read_text(errors="replace")[-LOG_TAIL:].strip()
            self._say(f"{title}: FAILED with exit code {code}\n{tail}\nall of it is in {log}; the same command goes on")
        self._is_over = True
        return False

    def _say(self, text: str) -> None:
        with self._lock:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _is_done(path: Path, step: Step) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["argv"] == list(step.argv)
    except (OSError, ValueError, KeyError, TypeError):
        return False
