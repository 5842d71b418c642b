"""JumpReLU SAEs (arXiv 2407.14435), with a quadratic sparsity loss that aims at k active latents for each token."""

from typing import Any

from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

from sails_align.saes.options import WARM_UP, SAETrainingOptions

PRE_ACT_LOSS = 3e-3
"""Anthropic's 3e-6 does nothing in 300 steps (a fifth of the latents stay dead); this leaves almost none dead, at the
same explained variance."""


def training_sae(options: SAETrainingOptions, common: dict[str, Any]) -> JumpReLUTrainingSAE:
    """Make an untrained JumpReLU SAE."""
    config = JumpReLUTrainingSAEConfig(
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=options.k,
        l0_warm_up_steps=int(WARM_UP * options.n_steps),
        pre_act_loss_coefficient=PRE_ACT_LOSS,
        **common,
    )
    return JumpReLUTrainingSAE(config)
