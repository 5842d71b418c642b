"""Keep the first tokens of responses near what they were, while the model learns something else.

Qi et al. 2024 (arXiv 2406.05946, the token-wise constrained objective) fine-tune an aligned model with this loss of
token t of a response, where d = log p(t) - log p_ref(t) is the difference from the model at the start:

    loss(t) = -2 / beta_t * log sigmoid(beta_t d)

Its gradient is that of -log p(t) times a weight w = 2 (1 - sigmoid(beta_t d)). w is 1 at the start, and falls as the
token becomes more likely than it was, the faster the larger beta_t is. A larger beta on the first tokens, in which a
model decides to refuse, keeps these. Here the loss has another constant,

    loss(t) = -2 / beta_t * (log sigmoid(beta_t d) + log 2) - log p_ref(t)

so that its limit for beta_t = 0 is the cross-entropy -log p(t), and at d = 0 it is that for every beta. It is averaged
over tokens as TRL averages. With beta 0 for all tokens, it is TRL's loss bit for bit.

The reference is the same module with the trained values that it began with. They are kept in memory: those of an
adapter are small, those of all weights are a second model. Shapes: B batch, S sequence.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from trl import DPOConfig, SFTConfig

from sails_align.core.errors import InputError
from sails_align.training.losses.compose import LossStep, check_cross_entropy
from sails_align.training.losses.options import ConstrainedOptions
from sails_align.training.losses.places import places


class Constrained:
    """SFT's cross-entropy, weaker for tokens that have become more likely than they were at the start."""

    def __init__(self, options: ConstrainedOptions, training: SFTConfig | DPOConfig) -> None:
        """Check that TRL's loss is the cross-entropy; raise `InputError` if it is not."""
        check_cross_entropy("constrained", training)
        if training.torch_compile:
            raise InputError(
                "loss is constrained, but torch_compile is true, which its reference cannot do; leave it out"
            )
        self._first = options.constrained_first_betas
        self._other = options.constrained_beta
        self._start: dict[str, Tensor] | None = None

    def begin(self, trainer: Any) -> None:
        """Keep the values that training starts from, also if it is resumed: checkpoints are loaded later."""
        if any([*self._first, self._other]):
            self._start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    def __call__(self, step: LossStep) -> Tensor:
        """Return the constrained loss, and log the mean weight of a token's gradient."""
        if self._start is None:
            return step.loss
        beta_BS, log_probs_BS = self.betas(step.batch), step.outputs.log_probs
        difference_BS = log_probs_BS - self._reference(step)
        more_BS = beyond_cross_entropy(difference_BS, beta_BS)
        weight_BS = 2 * torch.sigmoid(-beta_BS * difference_BS.detach())
        learned_BS = step.outputs.label_mask
        step.log("constrained_weight", (weight_BS * learned_BS).sum() / learned_BS.sum().clamp(min=1))
        return step.loss + more_BS.sum() * step.per_token_scale.to(more_BS.device)

    def betas(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the beta of each next token; of those that are not learned, 0. (B, S - 1)"""
        place_BS = places(batch)
        by_place = torch.tensor([*self._first, self._other], device=place_BS.device)
        return torch.where(place_BS >= 0, by_place[place_BS.clamp(0, len(self._first))], 0.0)

    @torch.no_grad()
    def _reference(self, step: LossStep) -> Tensor:
        """Return the log-probabilities of the next tokens by the model at the start. (B, S - 1)"""
        assert self._start is not None
        model = step.trainer.accelerator.unwrap_model(step.model)
        model.eval()  # without dropout
        try:
            return functional_call(model, self._start, (), {**step.batch, "fused_lm_head": True}).log_probs
        finally:
            model.train()


def beyond_cross_entropy(difference: Tensor, beta: Tensor) -> Tensor:
    """Return what the loss of tokens has beyond their cross-entropy; exactly 0 for a beta of 0.

    Args:
        difference: log-probability minus the reference's.
        beta: of each token, of the same shape.
    """
    safe = torch.where(beta > 0, beta, 1.0)
    constrained = -2 / safe * (functional.logsigmoid(safe * difference) + math.log(2)) + difference
    return torch.where(beta > 0, constrained, 0.0)
