"""Measure from hidden states how layers separate harmful from harmless prompts, and how harmless text varies.

Shape: D d_model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sails_align.subspace.statistics import SideSums, TokenStats, check_finite

BENIGN = "benign"
"""The contrast, of an aligned side alone, that holds the responses to harmless prompts."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction's: few tokens say little of the directions that hardly
vary among them."""
ONSET_SHARE = 0.8
"""Of the best layer's separation, that a layer has to reach."""


def separation(stats: TokenStats, layer: int) -> float:
    """Return the Mahalanobis distance between the means of harmful and harmless prompts."""
    aligned, unaligned = stats.pair("prompt", layer)
    difference_D = aligned.sum / aligned.n_tokens - unaligned.sum / unaligned.n_tokens
    check_finite(difference_D, layer)
    n_tokens = aligned.n_tokens + unaligned.n_tokens
    within_DD = (aligned.n_tokens * _covariance(aligned) + unaligned.n_tokens * _covariance(unaligned)) / n_tokens
    return (difference_D @ torch.linalg.solve(_shrunk(within_DD), difference_D)).sqrt().item()


def onset_of(separations: Mapping[int, float]) -> int:
    """Return the first layer whose separation is close to that of the best layer."""
    best = max(separations.values())
    return min(layer for layer, value in separations.items() if value >= ONSET_SHARE * best)


def benign_covariance(stats: TokenStats, layer: int) -> Tensor:
    """Return the covariance of hidden states over harmless conversations. (D, D) float64, positive definite."""
    aligned, _ = stats.pair("prompt", layer)
    responses = stats.sums.get((BENIGN, layer, "aligned"))
    pooled = aligned if responses is None else aligned + responses
    check_finite(pooled.sum, layer)
    return _shrunk(_covariance(pooled))


def _covariance(sums: SideSums) -> Tensor:
    assert sums.second_moment.numel(), "fitted with second_moment=False"
    mean_D = sums.sum / sums.n_tokens
    return sums.second_moment / sums.n_tokens - torch.outer(mean_D, mean_D)


def _shrunk(covariance_DD: Tensor) -> Tensor:
    mean_variance = covariance_DD.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return covariance_DD + SHRINKAGE * mean_variance * torch.eye(len(covariance_DD), dtype=covariance_DD.dtype)
