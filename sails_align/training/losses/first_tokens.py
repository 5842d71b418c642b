"""Weight the first tokens of each response more than the others.

Qi et al. 2024 (arXiv 2406.05946) find that safety training changes little beyond the first few tokens of a response,
and these decide whether a model refuses. Here their cross-entropy counts more (or, below 1, less):

    loss = 1 / N * sum over tokens t of w(t) * -log p(t),    w(t) = weight for the first k tokens of a response, else 1

where N is TRL's count of tokens, which the weights do not change: with weight 1 it is TRL's loss bit for bit.
"""

from typing import Any

from torch import Tensor
from trl import DPOConfig, SFTConfig

from sails_align.training.losses.compose import LossStep, check_cross_entropy
from sails_align.training.losses.options import FirstTokensOptions
from sails_align.training.losses.places import places


class FirstTokens:
    """SFT's cross-entropy with another weight for the first tokens of responses."""

    def __init__(self, options: FirstTokensOptions, training: SFTConfig | DPOConfig) -> None:
        """Check that TRL's loss is the cross-entropy; raise `InputError` if it is not."""
        check_cross_entropy("first_tokens", training)
        self._options = options

    def begin(self, trainer: Any) -> None:
        """Do nothing."""

    def __call__(self, step: LossStep) -> Tensor:
        """Return the weighted loss, and log that of the first tokens."""
        is_first_BS = first_tokens(step.batch, self._options.first_tokens)
        first = -(step.outputs.log_probs * is_first_BS).sum()
        step.log("first_tokens_loss", first / is_first_BS.sum().clamp(min=1))
        return step.loss + (self._options.first_tokens_weight - 1) * first * step.per_token_scale.to(first.device)


def first_tokens(batch: dict[str, Tensor], k: int) -> Tensor:
    """Return which next tokens are among the first k trained tokens of their example. (B, S - 1)"""
    place_BS = places(batch)
    return (place_BS >= 0) & (place_BS < k)
