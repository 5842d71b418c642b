"""Run commands one after the other, each in a fork of a process that has imported what most of them need.

Importing takes longer than most of the commands that tests start: `sails ...`, `python SCRIPT ...`, `python -c CODE`
and `accelerate launch ...`, whose processes are forks as well. What is about the start or the end of a process itself
is tested with real programs. `Warm` is the side of the tests; the file itself is the process's: a line of JSON on
standard input is a command (the arguments of `perform`), a line of standard output is its exit code.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from paths import ROOT
from processes import PATIENCE

MORE = ["deepspeed", "accelerate.commands.accelerate_cli", "torch.distributed.run"]


class Warm:
    """A process that runs commands."""

    def __init__(self, logs: Path) -> None:
        self._logs = [str(logs / name) for name in ("stdout.txt", "stderr.txt")]
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, words: Sequence[object], folder: Path = ROOT, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder, with some environment variables; return its exit code and output."""
        given, answered = self._process.stdin, self._process.stdout
        assert given is not None
        assert answered is not None
        words = [str(word) for word in words]
        print(json.dumps([words, str(folder), dict(variables or {}), *self._logs]), file=given, flush=True)
        assert select.select([answered], [], [], PATIENCE)[0], f"{words} did not end in time"
        code = int(answered.readline())
        stdout, stderr = (Path(log).read_text(encoding="utf-8", errors="replace") for log in self._logs)
        return subprocess.CompletedProcess(words, code, stdout, stderr)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def in_fork(function: Callable[[], object]) -> int:
    """Call a function in a fork of this process; return the fork's process ID."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        function()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def perform(words: list[str], folder: str, variables: dict[str, str], *logs: str) -> None:
    """Run a command of `sails`, Python or accelerate, with its output in two files."""
    for stream, log in zip((1, 2), logs, strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdin = open(os.devnull)  # noqa: SIM115 -- until the process ends
    os.chdir(folder)
    os.environ.update(variables)
    if "HF_DATASETS_CACHE" in variables:  # which is read at the import
        import datasets.config

        datasets.config.HF_DATASETS_CACHE = Path(variables["HF_DATASETS_CACHE"])
    program, *rest = words
    if Path(program).name == "accelerate":
        import torch.distributed.run
        from accelerate.commands.accelerate_cli import main as launch

        torch.distributed.run.run = run_ranks
        sys.argv = words
        launch()
    elif program == "python":
        script(*rest)
    else:
        from sails_align.cli import main

        sys.argv = words
        main()


def script(path: str, *options: str, is_module: bool = False) -> None:
    """Run a script, a module or, for the path "-c", code as Python's main program."""
    if path == "-c":
        sys.argv = ["-c", *options[1:]]
        exec(compile(options[0], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [path, *options]
    if is_module:
        runpy.run_module(path, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(path).parent))
        runpy.run_path(path, run_name="__main__")


def run_ranks(launch: Namespace) -> None:
    """Run the processes of a launch, as `torch.distributed.run.run` does; the first that fails ends the others."""
    from torch.distributed import TCPStore

    n = int(launch.nproc_per_node)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_RUN_ID": "warm", "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def rank_of(rank: int) -> None:
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        os.environ.update({name: str(value) for name, value in {**shared, **of_rank}.items()})
        script(launch.training_script, *launch.training_script_args, is_module=launch.module)

    running = {in_fork(partial(rank_of, rank)) for rank in range(n)}
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    failed = False
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if status and not failed:
            failed = True
            for process in running:
                os.kill(process, signal.SIGTERM)
    del store  # processes had it until now
    sys.exit(int(failed))


def serve() -> None:
    """Run the commands that are given on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print when they are imported
    from sails_align.experiments.launchers import PRELOADED

    for name in (*PRELOADED, *MORE):
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        child = in_fork(partial(perform, *json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
