"""Run `sails` commands one after the other, each in a fork of this process, which has imported what most of them need.

Importing takes longer than most of the documents' commands. A line of JSON on standard input is a command's words and
the file for its output; a line of standard output is its exit code.
"""

import gc
import importlib
import json
import os
import sys
import traceback

from sails_align.cli import main
from sails_align.experiments.launchers import PRELOADED


def run(words: list[str], log: str) -> int:
    """Run a command; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdin = open(os.devnull)  # noqa: SIM115 -- until the process ends
    sys.argv = ["sails", *words]
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
