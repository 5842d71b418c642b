"""What tests look at of processes."""

import psutil


def is_at_work(process: psutil.Process) -> bool:
    """Whether a process has not ended; one whose parent is gone may wait for long to be forgotten."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
