"""GBA SAEs (arXiv 2506.14002, group bias adaptation): each group of latents is active at a frequency of its own.

A ReLU SAE that is trained for reconstruction alone. Latents are divided into groups at random; group g has the target
frequency p_g. The encoder's bias is not trained by gradient. After every `window` tokens, for latent m of group g,

    b_m <- max(b_m - gamma r_m, -1)    if it was active at more than p_g of them
    b_m <- min(b_m + gamma T_g, 0)     if it was active at none

with r_m its largest pre-activation, at least 0, and T_g the mean of the positive r_m of the group. Encoder directions
have norm 1, and 1 is the mean norm of the inputs, so that -1 silences a latent. The paper's Algorithm 1 has max and min
the other way round, which leaves all latents active at half of the tokens.

Shapes: T tokens, D d_model, F d_sae, G groups.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import StandardSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from sails_align.saes.options import SAETrainingOptions

SILENT = 1e-6
"""A latent that is active at a smaller share of the tokens is made active again."""


def training_sae(options: SAETrainingOptions, common: dict[str, Any]) -> "GBATrainingSAE":
    """Make an untrained GBA SAE."""
    assert options.gba_window is not None
    config = GBATrainingSAEConfig(
        frequencies=options.target_frequencies(), gamma=options.gba_gamma, window=options.gba_window, **common
    )
    return GBATrainingSAE(config)


def adapted_bias(
    bias_F: Tensor,
    frequency_F: Tensor,
    largest_F: Tensor,
    group_F: Tensor,
    target_G: Tensor,
    gamma: float,
    floor: float = -1.0,
) -> Tensor:
    """Return the biases (F,) after one adaptation.

    Args:
        bias_F: from `floor` to 0.
        frequency_F: share of the tokens at which each latent was active.
        largest_F: its largest pre-activation there, with the bias in it. No more than -`floor` of it counts: more can
            only be of a token whose norm is far above the mean.
        group_F: number of its group.
        target_G: target frequency of each group.
        gamma: size of the adaptation; 0 changes nothing.
        floor: the smallest bias, minus the mean norm of the inputs.
    """
    reach_F = largest_F.clamp(0.0, -floor)
    sums_G = torch.zeros_like(target_G).index_add(0, group_F, reach_F)
    counts_G = torch.zeros_like(target_G).index_add(0, group_F, (reach_F > 0).to(target_G))
    typical_G = sums_G / counts_G.clamp(min=1)
    lowered_F = (bias_F - gamma * reach_F).clamp(min=floor)
    raised_F = (bias_F + gamma * typical_G[group_F]).clamp(max=0.0)
    kept_F = torch.where(frequency_F < SILENT, raised_F, bias_F)
    return torch.where(frequency_F > target_G[group_F], lowered_F, kept_F)


@dataclass
class GBATrainingSAEConfig(TrainingSAEConfig):
    """What a GBA SAE is trained with; saved in the metadata of the trained one."""

    frequencies: list[float] = field(default_factory=list)
    """Target of each group."""
    gamma: float = 0.01
    window: int = 40_960
    """Tokens between two adaptations."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name in the metadata."""
        return "gba"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """Return the configuration of a ReLU SAE, which the trained SAE is."""
        return StandardSAEConfig


class GBATrainingSAE(TrainingSAE[GBATrainingSAEConfig]):
    """A ReLU SAE whose biases are adapted. What was counted since the last adaptation is part of its state."""

    b_enc: nn.Parameter
    group: Tensor
    """Number of each latent's group (F,)."""
    n_active: Tensor
    """Tokens since the last adaptation at which each latent was active (F,)."""
    largest: Tensor
    """Largest pre-activations there, at least 0 (F,)."""
    n_tokens: Tensor

    def __init__(self, cfg: GBATrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        group_F = torch.randperm(cfg.d_sae) % len(cfg.frequencies)
        self.register_buffer("group", group_F.to(self.device))
        self.register_buffer("n_active", torch.zeros(cfg.d_sae, device=self.device))
        self.register_buffer("largest", torch.zeros(cfg.d_sae, device=self.device))
        self.register_buffer("n_tokens", torch.zeros((), dtype=torch.int64, device=self.device))

    def initialize_weights(self) -> None:
        """Make the weights; biases are 0. The decoder's stays at the mean, where the trainer puts it.

        If it were trained, it would move against the biases until they silence nothing.
        """
        super().initialize_weights()
        self.b_dec.requires_grad_(False)
        bias_F = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(bias_F, requires_grad=False)

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return activations and pre-activations, both (T, F)."""
        hidden_pre_TF = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre_TF)), hidden_pre_TF

    def get_coefficients(self) -> dict[str, Any]:
        """Return none: there is no sparsity loss."""
        return {}

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """Return none: the loss is that of the reconstruction."""
        return {}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Adapt the biases if it is time, then count what is active at the tokens of this step."""
        with torch.no_grad():
            self.W_enc.div_(self.W_enc.norm(dim=0))
            if self.n_tokens >= self.cfg.window:
                self._adapt()
        output = super().training_forward_pass(step_input)
        hidden_pre_TF = output.hidden_pre.detach()
        self.n_active += (hidden_pre_TF > 0).sum(0)
        self.largest.copy_(torch.maximum(self.largest, hidden_pre_TF.amax(0)))
        self.n_tokens += len(hidden_pre_TF)
        return output

    def _adapt(self) -> None:
        target_G = torch.tensor(self.cfg.frequencies, device=self.device)
        frequency_F = self.n_active / self.n_tokens
        floor = -(self.cfg.d_in**0.5)  # the trainer scales inputs to this mean norm
        self.b_enc.copy_(
            adapted_bias(self.b_enc, frequency_F, self.largest, self.group, target_G, self.cfg.gamma, floor)
        )
        for counted in (self.n_active, self.largest, self.n_tokens):
            counted.zero_()

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Leave out what only training needs."""
        super().process_state_dict_for_saving_inference(state_dict)
        for name in ("group", "n_active", "largest", "n_tokens"):
            del state_dict[name]
