"""Keep parts of parameters at the values that they have when training begins, bit for bit.

The gradient of frozen entries is zero, so that the norm that gradients are clipped by, and the optimizer's moments, are
those of the others. Weight decay changes weights without a gradient; so after each step they are written back, too.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sails_align.training.callbacks.engines import refuse_parts


@dataclass(frozen=True, eq=False)
class FrozenPart(ABC):
    """The frozen entries of one parameter."""

    parameter: nn.Parameter

    @abstractmethod
    def count(self) -> int:
        """Return how many entries are frozen."""

    @abstractmethod
    def zero_(self, tensor: Tensor) -> Tensor:
        """Set the entries of a tensor like the parameter to zero, in place."""

    @abstractmethod
    def kept(self) -> Any:
        """Return a copy of the entries."""

    @abstractmethod
    def write_(self, kept: Any) -> None:
        """Write a copy of the entries back."""


@dataclass(frozen=True, eq=False)
class FrozenSlices(FrozenPart):
    """Frozen slices: places along each of the parameter's dimensions."""

    places: Mapping[int, Tensor]
    "Dimension -> indices of the frozen slices, on the parameter's device."

    def count(self) -> int:
        shape = self.parameter.shape
        return math.prod(shape) - math.prod(n - len(self.places.get(dim, ())) for dim, n in enumerate(shape))

    def zero_(self, tensor: Tensor) -> Tensor:
        for dim, index in self.places.items():
            tensor.index_fill_(dim, index, 0)
        return tensor

    def kept(self) -> dict[int, Tensor]:
        return {dim: self.parameter.detach().index_select(dim, index) for dim, index in self.places.items()}

    def write_(self, kept: Mapping[int, Tensor]) -> None:
        for dim, index in self.places.items():
            self.parameter.data.index_copy_(dim, index, kept[dim])


@dataclass(frozen=True, eq=False)
class FrozenEntries(FrozenPart):
    """Single frozen entries."""

    is_frozen: Tensor
    "Of the parameter's shape, on its device; boolean."

    def count(self) -> int:
        return int(self.is_frozen.sum())

    def zero_(self, tensor: Tensor) -> Tensor:
        return tensor.masked_fill_(self.is_frozen, 0)

    def kept(self) -> Tensor:
        return self.parameter.detach().clone()

    def write_(self, kept: Tensor) -> None:
        self.parameter.data.copy_(torch.where(self.is_frozen, kept, self.parameter.data))


class Frozen(TrainerCallback):
    """Keep parts of parameters at the values that they have when training begins."""

    def __init__(self, option: str, parts: Sequence[FrozenPart]) -> None:
        """Take the parts, and the option that asks for them, for messages."""
        self._option, self._parts = option, parts
        self._kept: list[Any] = []
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_parts(self._option)
        self._kept = [part.kept() for part in self._parts]
        # On the parameter, and so before DDP adds up the gradients of all processes.
        self._hooks = [
            part.parameter.register_hook(lambda gradient, part=part: part.zero_(gradient.clone()))
            for part in self._parts
            if part.parameter.requires_grad
        ]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for part, kept in zip(self._parts, self._kept, strict=True):
            part.write_(kept)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def count(self) -> int:
        """Return how many entries of parameters that train are frozen; known from the beginning of training."""
        return sum(part.count() for part in self._parts if part.parameter.requires_grad)


def count_frozen(trainer: Trainer) -> int:
    """Return how many entries of parameters that train the callbacks of a trainer freeze."""
    return sum(callback.count() for callback in trainer.callback_handler.callbacks if isinstance(callback, Frozen))
