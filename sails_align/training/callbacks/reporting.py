"""Let a callback add what it found to a run's `metrics.json`."""

from abc import abstractmethod
from typing import Any

from transformers import Trainer, TrainerCallback


class ReportingCallback(TrainerCallback):
    """A callback that knows something of the finished training."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Return what it found, by the name that it has in `metrics.json`, as JSON values."""


def reported(trainer: Trainer) -> dict[str, Any]:
    """Return what all callbacks of a trainer found."""
    found: dict[str, Any] = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ReportingCallback):
            found |= callback.report()
    return found
