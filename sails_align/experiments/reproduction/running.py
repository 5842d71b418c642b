"""Runs the steps: each is a process, those of one stage that need one GPU side by side, and none twice.

<output_dir>/logs/<step>.log   what it printed
<output_dir>/done/<step>.json  its command and its options' file, once it succeeded; a step whose results are gone,
                               or before which another one is done again, is done again, too
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from sails_align.core.artifacts import disk_errors, file_hash, write_json
from sails_align.experiments.commands import OPTIONS
from sails_align.experiments.reproduction.plan import Reproduction, Step
from sails_align.experiments.runner import LOG_TAIL, share_of
from sails_align.experiments.studies import option_groups

PROGRAMS = {
    "sails": ("-m", "sails_align"),
    "accelerate": ("-m", "accelerate.commands.accelerate_cli"),
    "hf": ("-m", "huggingface_hub.cli.hf"),
}
"""As modules of this Python, which need not be on the PATH."""


def run_steps(steps: Sequence[Step], of: Reproduction, console: Console) -> bool:
    """Run what is not done, in order. After a failure no further step is started; whether all are done."""
    running = _Running(of, console, len(steps))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the commands end, too
    numbered = list(enumerate(steps, 1))
    for _, group in groupby(numbered, key=lambda item: (item[1].stage, item[1].gpus)):
        of_stage = list(group)
        n_slots = max(1, of.num_gpus) if of_stage[0][1].gpus == "one" else 1
        if not running.side_by_side(of_stage, n_slots):
            return False
    return True


class _Running:
    def __init__(self, of: Reproduction, console: Console, n_steps: int) -> None:
        self._of, self._folder, self._console, self._n_steps = of, of.output_dir, console, n_steps
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
                pool.shutdown(wait=False, cancel_futures=True)
                with self._lock:
                    self._is_over = True
                    for process in self._processes:
                        _end(process)
                raise

    def _run(self, number: int, step: Step, gpus: Sequence[str]) -> bool:
        file_name = step.name.replace("/", ".")
        done, log = self._folder / "done" / f"{file_name}.json", self._folder / "logs" / f"{file_name}.log"
        title = f"{number:3} of {self._n_steps}  {step.name}"
        if _is_done(done, step):
            self._say(f"{title}: done before")
            return True
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
        command = [sys.executable, *PROGRAMS[step.argv[0]], *step.argv[1:]]
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            for later in _built_on(step, self._of):
                (self._folder / "done" / f"{later}.json").unlink(missing_ok=True)
            file = log.open("wb")
        started = time.monotonic()
        with file:
            with self._lock:  # so that none is started after the others were ended
                if self._is_over:
                    return False
                self._console.print(f"{title}: {log}", highlight=False, soft_wrap=True, markup=False)
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
        minutes = (time.monotonic() - started) / 60
        if code == 0:
            write_json(done, _asked(step))
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


def _asked(step: Step) -> dict[str, Any]:
    """What decides a step's result: its command, and what is in the file that it reads options from."""
    (config,) = option_groups(step.argv).get("--config", ("",))
    return {"argv": list(step.argv), "config": file_hash(Path(config)) if config else None}


def _is_done(path: Path, step: Step) -> bool:
    """Whether a step succeeded as it is now asked for, and its results are still there."""
    options = option_groups(step.argv)
    (results,) = options.get("--output_dir", options.get("--local-dir", (".",)))
    try:
        return Path(results).is_dir() and json.loads(path.read_text(encoding="utf-8")) == _asked(step)
    except (OSError, ValueError):
        return False


def _built_on(step: Step, of: Reproduction) -> list[str]:
    """Markers of the steps that start from a step's results."""
    match step.stage:
        case "discover":
            runs = [name for name, args in of.arguments.items() if args.sails.uses_subspace]
        case "train":
            runs = [step.run]
        case _:
            return []
    trainings = [f"train.{run}" for run in runs if step.stage == "discover"]
    evaluations = [f"evaluate.{run}.{kind}" for run in runs for kind in OPTIONS]
    return [*trainings, *evaluations, *(f"attack.{run}.gcg" for run in runs)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started: a launcher ends without its workers."""
    with suppress(psutil.NoSuchProcess):
        launched = psutil.Process(process.pid)
        for each in (*launched.children(recursive=True), launched):
            with suppress(psutil.NoSuchProcess):
                each.terminate()
