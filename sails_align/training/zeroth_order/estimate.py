"""Estimate gradients from the losses of examples on both sides of the weights (SPSA, as in MeZO, arXiv 2305.17333).

Along a random direction z, the slope of an example's loss is

    g_i = (loss_i(theta + eps z) - loss_i(theta - eps z)) / (2 eps)

and the mean of g_i z over directions is its gradient. Only the slopes depend on the data, so privacy needs noise on
one number for each direction: the sum of the clipped slopes, plus Gaussian noise of standard deviation sigma * C.

Shapes: B examples.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def directions(parameters: Sequence[nn.Parameter], generator: torch.Generator) -> list[Tensor]:
    """Draw a direction: a standard normal tensor of the shape, type and device of each parameter."""
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in parameters]


@torch.no_grad()
def slopes(
    parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], eps: float, losses: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the slope of each example's loss along a direction, and its mean loss on both sides. (B,) each, float64

    Args:
        parameters: are moved to both sides, and then restored bit for bit.
        direction: of the parameters' shapes.
        eps: how far to move.
        losses: returns the losses of the examples (B,) with the parameters as they are.
    """
    start = [parameter.detach().clone() for parameter in parameters]
    found = []
    try:
        for sign in (1, -1):
            for parameter, at_start, z in zip(parameters, start, direction, strict=True):
                parameter.copy_(at_start + sign * eps * z)
            found.append(losses().double())
    finally:
        for parameter, at_start in zip(parameters, start, strict=True):
            parameter.copy_(at_start)
    upper_B, lower_B = found
    return (upper_B - lower_B) / (2 * eps), (upper_B + lower_B) / 2


def noisy_sum(slope_B: Tensor, clip: float, sigma: float, noise: float) -> float:
    """Return the sum of the clipped slopes, plus noise: what is released of the data.

    A slope that is not a number counts as 0, so that no example can change the sum by more than `clip`.

    Args:
        slope_B: of each example; there may be none.
        clip: largest absolute slope of an example.
        sigma: standard deviation of the noise, divided by `clip`.
        noise: a draw of a standard normal distribution.
    """
    return slope_B.nan_to_num(nan=0.0).clamp(-clip, clip).sum().item() + sigma * clip * noise
