"""What tests look at of processes."""

import psutil

PATIENCE = 900
"""How long a test waits for another process, in seconds. It ends what hangs, and no slow machine reaches it."""


def is_at_work(process: psutil.Process) -> bool:
    """Whether a process has not ended; one whose parent is gone may wait for long to be forgotten."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
