"""Cells -> results: what is missing is computed, in processes side by side, and each result is a file once it is there.

<folder>/cells/<key>.json   a result, written whole or not at all
<folder>/cells/<key>.log    what its process printed; kept if it failed
<folder>/models/<key>/      of models that are no testbed: the trained model, and its evaluations

Processes are forked from a server that has imported everything once, so that a cell does not pay for imports, and each
has one cell, so that its memory is its own. GPUs are shared out among the processes.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sails_align.core.artifacts import turn, write_json
from sails_align.core.errors import InputError
from sails_align.core.progress import progress_bar
from sails_align.experiments.plan import Cell

PRELOADED = [
    "sails_align.experiments.cells",
    "sails_align.training.run",
    "sails_align.training.rlhf.run",
    "sails_align.evaluation.attacks.gcg",
    "lm_eval.models.huggingface",
    "peft",
    "sae_lens",
]
LOG_TAIL = 1500
"""Characters of a failed cell's log that are shown."""


@dataclass(frozen=True)
class Failure:
    """A cell without a result."""

    cell: Cell
    log: Path

    def __str__(self) -> str:
        rate = "" if self.cell.learning_rate is None else f", learning rate {self.cell.learning_rate:g}"
        tail = self.log.read_text(errors="replace")[-LOG_TAIL:].strip() if self.log.is_file() else "killed"
        return f"{self.cell.run.name}, seed {self.cell.seed}{rate}: {tail}\n({self.log})"


class Results:
    """Results of cells in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "cells"

    def path(self, cell: Cell, suffix: str = ".json") -> Path:
        """Where a cell's result is, or its log."""
        return self._folder / f"{cell.key}{suffix}"

    def model(self, cell: Cell) -> Path:
        """Where a cell's model is, and evaluations of it, if it is of no testbed."""
        return self._folder.parent / "models" / cell.training_key

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """A result; None if there is none.

        Raises:
            InputError: if the file is damaged.
        """
        path = self.path(cell)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or "cell" not in result:
                raise ValueError("no numbers of a cell")
            return result
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no result of a cell ({error}); delete it to compute it again") from error

    def all(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Those of the cells that are there, by key."""
        found = {cell.key: self.get(cell) for cell in cells}
        return {key: result for key, result in found.items() if result is not None}


def n_slots() -> int:
    """Processes at a time: one for each GPU, else for each core this process may use."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def run_cells(
    cells: Sequence[Cell], results: Results, *, title: str, n_processes: int, progress: bool = True
) -> list[Failure]:
    """Compute the results that are not there yet, several at a time. A cell that fails does not end the others.

    Args:
        cells: to be had.
        results: where they are kept.
        title: what the bar says.
        n_processes: at a time.
        progress: show a bar, with an estimate of the time left.

    Returns:
        the cells that failed.
    """
    missing = [cell for cell in cells if results.get(cell) is None]
    failures: list[Failure] = []
    if not missing:
        return failures
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    running: dict[int, Any] = {}
    free = list(range(n_processes))
    lock = threading.Lock()

    def compute(cell: Cell) -> int:
        with lock:
            slot = free.pop()
            gpus = share_of(slot, n_processes)
            process = running[slot] = context.Process(target=_work, args=(cell, results, gpus))
        process.start()
        process.join()
        with lock:
            free.append(slot)
            del running[slot]
        return process.exitcode or 0

    with progress_bar(progress) as bar, ThreadPoolExecutor(n_processes) as pool:
        task = bar.add_task(title, total=len(cells), completed=len(cells) - len(missing))
        futures = {pool.submit(compute, cell): cell for cell in missing}
        try:
            for future in as_completed(futures):
                cell = futures[future]
                if future.result():
                    failures.append(Failure(cell, results.path(cell, ".log")))
                bar.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with lock:
                for process in running.values():
                    if process.pid is not None:  # it has started
                        process.terminate()
            raise
    return failures


def share_of(slot: int, n_processes: int) -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them, of one of several processes; none without GPUs."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = visible or [str(index) for index in range(torch.cuda.device_count())]
    if not gpus:
        return []
    each = len(gpus) // n_processes
    return gpus[slot * each : (slot + 1) * each] if each else [gpus[slot % len(gpus)]]


def _work(cell: Cell, results: Results, gpus: Sequence[str]) -> None:
    """In a process of its own: compute a cell, and write its result; unless another job has done so meanwhile."""
    gc.freeze()  # what was imported before stays; looking through it would take a second of each cell
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its commands end, too
    path, log = results.path(cell), results.path(cell, ".log")
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus if cell.protocol else gpus[:1])
    if cell.protocol is None:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    lock = path.with_suffix(".lock")
    with turn(lock):
        if results.get(cell) is not None:
            return
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            write_json(path, _result(cell, results))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        for done_with in (log, lock):
            done_with.unlink(missing_ok=True)


def _result(cell: Cell, results: Results) -> dict[str, Any]:
    if cell.protocol is None:
        from sails_align.experiments.cells import run_cell

        return run_cell(cell)
    from sails_align.experiments.commands import run_commands

    return run_commands(cell, results.model(cell))
