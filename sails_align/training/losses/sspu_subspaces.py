"""Find what `sspu` unlearns along: directions of SAE features that are relevant to harmful answers, and of others.

Shapes: T tokens, D d_model, F d_sae, K features of a kind, R rank, I inputs and O outputs of a module.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sails_align.core.errors import InputError
from sails_align.core.linalg import orthonormalize
from sails_align.initializers.adapter import freeze_sides
from sails_align.initializers.targets import SIDES, Target
from sails_align.models.hooks import decoder_layers
from sails_align.models.norms import norm_gain
from sails_align.subspace.selection import FeatureFitter, rank_features
from sails_align.subspace.separation import separation
from sails_align.subspace.statistics import ActivationFitter, TokenStats
from sails_align.training.losses.unlearning import UnlearningData

N_BLOCKS = 3
"""Blocks that are trained: that of the layer, and those before it. As in RMU."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal directions of the residual stream at the output of a block; the two kinds are orthogonal."""

    layer: int
    relevant: Tensor
    """(D, K) float64: span the features that are more active in harmful answers, by the difference of means."""
    irrelevant: Tensor
    """(D, K) float64: span, with the relevant ones, those whose means differ least."""
    norm: float
    """Root mean square norm of hidden states in harmful answers."""
    features: Mapping[str, Sequence[int]]
    """The latents of both kinds."""


def find_directions(
    model: nn.Module, data: UnlearningData, n_features: int, layer: int | None, control_seed: int | None = None
) -> Directions:
    """Rank the features of a layer by their mean activations in harmful and in harmless answers.

    Args:
        model: as it is before it is trained.
        data: the answers, and SAEs.
        n_features: of each kind.
        layer: None: of the layers with an SAE, the one whose hidden states tell the two kinds of texts apart best.
        control_seed: draw the features of both kinds from the active ones, as a control.

    Raises:
        InputError: if the layer has no SAE, or it has too few active features.
    """
    saes = data.saes
    if layer is not None and layer not in saes:
        raise InputError(f"sspu_layer is {layer}, but there are SAEs of layers {', '.join(map(str, saes))}; choose one")
    layers, moments = (list(saes) if layer is None else [layer]), ActivationFitter()
    data.fit(model, moments, layers)
    stats = moments.result()
    layer = max(layers, key=lambda each: separation(stats, each))
    features = FeatureFitter({layer: saes[layer]})
    data.fit(model, features, [layer])
    relevant, irrelevant = chosen_features(features.result(), layer, n_features, control_seed)
    rows_KD = normalize(features.saes[layer].W_dec_FD.cpu()[[*relevant, *irrelevant]].double(), dim=1)
    n, d_model = rows_KD.shape
    if n > d_model:
        raise InputError(f"sspu_features is {n_features}, but d_model is {d_model}; choose at most {d_model // 2}")
    basis_DK = orthonormalize(rows_KD.T)
    harmful = stats.sums["prompt", layer, "unaligned"]
    norm = (harmful.second_moment.trace() / harmful.n_tokens).sqrt().item()
    named = {"relevant": relevant, "irrelevant": irrelevant}
    return Directions(layer, basis_DK[:, :n_features], basis_DK[:, n_features:], norm, named)


def chosen_features(
    stats: TokenStats, layer: int, n: int, control_seed: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the n latents that are most more active on the unaligned side, and the n others that differ least.

    With a seed, as a control, both are drawn from all that are active.
    """

    def ranked(side: str | None) -> list[int]:
        return rank_features(stats, contrast="prompt", score="mean_diff", side=side).layers[layer].ids.tolist()

    active = ranked(None)
    relevant = ranked("unaligned")[:n]
    if control_seed is not None:
        active = random.Random(control_seed).sample(active, len(active))
        relevant = active[:n]
    irrelevant = [each for each in active if each not in relevant][-n:]
    if len(relevant) < n or len(irrelevant) < n:
        raise InputError(
            f"sspu_features is {n}, but in layer {layer} only {len(relevant)} features are more active in harmful "
            f"answers, and {len(irrelevant)} others are active at all;\nchoose fewer, or give more data"
        )
    return relevant, irrelevant


@dataclass(frozen=True, eq=False)
class AdaptedModule:
    """The adapter of a module, and what it may change."""

    name: str
    side: str
    """The factor at the residual stream: A of modules that read it, B of those that write to it."""
    module: Any
    allowed: Tensor
    """(D, K), orthonormal: the relevant directions, over the gain of the norm between module and residual stream."""

    @property
    def _factor(self) -> nn.Parameter:
        """Return the factor at the residual stream."""
        return (self.module.lora_A if self.side == "A" else self.module.lora_B).get_parameter("default.weight")

    @property
    def _other(self) -> nn.Parameter:
        return (self.module.lora_B if self.side == "A" else self.module.lora_A).get_parameter("default.weight")

    @torch.no_grad()
    def project(self) -> None:
        """Remove from the factor, and so from the update, what is outside of the allowed directions."""
        inside = self._projected(self._residual(self._factor))
        self._factor.copy_(inside.T if self.side == "A" else inside)

    def energies(self) -> tuple[Tensor, Tensor]:
        """Return the squared norms of the module's update, and of what is outside of the allowed directions. ()"""
        residual_DR, other = self._residual(self._factor).float(), self._other.float()
        gram_RR = other.T @ other if self.side == "A" else other @ other.T
        outside_DR = residual_DR - self._projected(residual_DR)
        scaling = self.module.scaling["default"] ** 2
        total, outside = (((each.T @ each) * gram_RR).sum() * scaling for each in (residual_DR, outside_DR))
        return total, outside

    def _residual(self, factor: Tensor) -> Tensor:
        return factor.T if self.side == "A" else factor

    def _projected(self, residual_DR: Tensor) -> Tensor:
        basis_DK = self.allowed.to(residual_DR)
        return basis_DK @ (basis_DK.T @ residual_DR)


def parts_of(model: nn.Module, targets: Sequence[Target], directions: Directions) -> list[AdaptedModule]:
    """Return the adapters of the trained blocks; those of other blocks are frozen, and so stay zero.

    Raises `InputError` if there is none in these blocks, or the blocks' norms are not known.
    """
    blocks, parts = decoder_layers(model), []
    first = max(0, directions.layer - N_BLOCKS + 1)
    for target in targets:
        if first <= target.block <= directions.layer:
            allowed_DK = directions.relevant
            gain_D = norm_gain(blocks[target.block], target.path)
            if gain_D is not None and allowed_DK.shape[1]:
                allowed_DK = orthonormalize(allowed_DK / gain_D.double()[:, None])
            parts.append(AdaptedModule(target.name, SIDES[target.path], target.module, allowed_DK))
        else:
            freeze_sides(target.module, ("A", "B"))
    if not parts:
        raise InputError(f"no module in blocks {first} to {directions.layer} has an adapter; choose others")
    return parts
