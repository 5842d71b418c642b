"""Evaluate, kill the evaluation with SIGKILL after each of some delays, and start it again, until it ends by itself.

python tests/killed_evaluation.py '[0.1, 0.3, ...]' options of eval/safety.py

Each run is a fork of this process, so that the imports are paid for once. Delays are in seconds.
"""

import json
import os
import signal
import sys
import time

from sails_align.cli.evaluate import safety
from sails_align.evaluation import run as evaluation_run
from sails_align.evaluation.backends import openai as openai_backend


def start(options: list[str]) -> int:
    """Evaluate in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        safety(options)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main() -> None:
    delays, options = json.loads(sys.argv[1]), sys.argv[2:]
    assert openai_backend  # both are imported before forking
    assert evaluation_run
    n_killed = 0
    for delay in delays:
        child = start(options)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        n_killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    status = os.waitstatus_to_exitcode(os.waitpid(start(options), 0)[1])
    print(json.dumps({"killed": n_killed, "exit": status}))


if __name__ == "__main__":
    main()
