"""Make the batches of private steps as the accountant assumes them: all examples, or each with the same probability."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler


class PrivateBatches(BatchSampler):
    """Yield the indices of the examples of each step of an epoch.

    With Poisson sampling, the sizes of batches differ, and one can be empty. An epoch has so many steps that as many
    examples as there are can be expected in it.
    """

    def __init__(self, n: int, batch_size: int | None, rng: Callable[..., np.random.Generator]) -> None:
        """Take the number of examples, the expected size of a batch (None: all), and what draws by names."""
        self.n, self.batch_size, self.drop_last = n, n if batch_size is None else batch_size, False
        self._rng, self._epoch = rng, 0

    @property
    def rate(self) -> float:
        """Return the probability of an example to be in a batch."""
        return self.batch_size / self.n

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, which the next batches are of."""
        self._epoch = epoch

    def __len__(self) -> int:
        return max(round(self.n / self.batch_size), 1)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(len(self)):
            drawn = self._rng("batch", self._epoch, step).random(self.n) < self.rate  # below 1: all, if the rate is 1
            yield np.flatnonzero(drawn).tolist()


def collated(collate: Callable[[list[Any]], dict[str, Any]], rows: Sequence[Any]) -> dict[str, Any]:
    """Return a batch of rows, also of none."""
    if rows:
        return collate(list(rows))
    return {name: torch.zeros(0, 1, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
