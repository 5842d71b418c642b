"""Measure the cost of a training: seconds by stage, and memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Cost:
    """Seconds by stage. Time in a nested stage is not counted for the outer one."""

    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[float] = field(default_factory=lambda: [0.0])
    """Of each open stage, the time spent in the stages within it."""

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        started = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - started
            own = whole - self._open.pop()
            self._open[-1] += whole
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + own, 2)


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MiB: of the GPU if one is used, otherwise resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
