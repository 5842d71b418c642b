"""Choose the number of CPU threads by the size of the model.

Threads of one operation wait for each other. For a small model the operations are so short that waiting takes longer
than the work, and on a machine that does other work at the same time, many times as long (docs/performance.md).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL = 20_000_000
"""Parameters below which one thread is used (benchmarks/threads.py)."""
OVERRIDE = "OMP_NUM_THREADS"
"""Environment variable of OpenMP, which torch obeys: if it is set, its number of threads is used for every model."""
SHARE = "SAILS_SHARE_OF_CORES"
"""Environment variable, set with `OVERRIDE` for one of several jobs at a time: small models use one thread even so."""


def threads_for(n_parameters: int) -> int:
    """Return the number of threads to compute a model of some size with, on the CPU."""
    is_free = OVERRIDE not in os.environ or os.environ.get(SHARE) == os.environ[OVERRIDE]
    return 1 if n_parameters < SMALL and is_free else torch.get_num_threads()


@contextmanager
def fitting_threads(model: nn.Module) -> Iterator[None]:
    """Use the number of threads that suits a model within the block, then that of before; on a GPU change nothing."""
    before = torch.get_num_threads()
    parameters = list(model.parameters())
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    with n_threads(threads_for(sum(parameter.numel() for parameter in parameters)) if is_on_cpu else before):
        yield


@contextmanager
def n_threads(n: int) -> Iterator[None]:
    """Use a number of CPU threads within the block, then that of before."""
    before = torch.get_num_threads()
    if n == before:  # setting it is no matter of course in processes that were forked
        yield
        return
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
