"""Draw what takes the place of an edit's choice in a control: from a seed, and the name of the tensor.

Shapes: O outputs of a linear layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sails_align.core.artifacts import content_hash


def generator_of(name: str, seed: int) -> torch.Generator:
    """Return random numbers for a tensor."""
    return torch.Generator().manual_seed(int(content_hash([seed, name])[:12], 16))


def shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many entries of a mask of any shape, anywhere in it."""
    order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
    return mask.flatten()[order].view(mask.shape)


@dataclass(frozen=True)
class Turn:
    """A permutation of output coordinates with random signs. It keeps norms and singular values."""

    order: Tensor
    """(O,), long."""
    signs: Tensor
    """(O,), -1 or 1."""

    @classmethod
    def draw(cls, n_outputs: int, name: str, seed: int) -> "Turn":
        """Draw one for a tensor."""
        generator = generator_of(name, seed)
        order = torch.randperm(n_outputs, generator=generator)
        return cls(order, torch.randint(2, (n_outputs,), generator=generator) * 2 - 1)

    @staticmethod
    def around(change: Callable[[Tensor], Tensor], values: Tensor, name: str, seed: int | None) -> Tensor:
        """Return what a linear change of the output side makes of values, as if it had been turned at random.

        A turned projector, for example, projects onto random directions. Without a seed, the change is as it is.
        """
        if seed is None:
            return change(values)
        turn = Turn.draw(len(values), name, seed)
        return turn.back(change(turn.of(values)))

    def of(self, values: Tensor) -> Tensor:
        """Turn values, whose first dimension is that of the outputs."""
        return values[self.order.to(values.device)] * self._signs(values)

    def back(self, values: Tensor) -> Tensor:
        """Turn values back."""
        return (values * self._signs(values))[self.order.argsort().to(values.device)]

    def _signs(self, values: Tensor) -> Tensor:
        return self.signs.to(values.device).view(-1, *[1] * (values.dim() - 1))
