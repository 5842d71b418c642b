"""Initialize adapters with the directions in which hidden states vary most, to measure the value of SAEs.

Shapes: D d_model, K directions, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.subspace.basis import Subspace, principal
from sails_align.subspace.methods import RANK_TOLERANCE, MethodInputs, check_rank
from sails_align.subspace.selection import Encoder
from sails_align.subspace.statistics import ActivationFitter, ActivationStats, check_finite, contrasts_of


def activation_pca(
    stats: ActivationStats,
    *,
    contrast: str,
    rank: int,
    provenance: Mapping[str, Any],
    benign: Mapping[int, Tensor] | None = None,
) -> Subspace:
    """Return the directions of largest variance of the contrast's hidden states, both sides pooled and centred.

    Args:
        stats: of the hidden states.
        contrast: "response", "prompt" or "both" (all their tokens).
        rank: how many directions; fewer where the hidden states do not vary in that many.
        provenance: JSON-able.
        benign: as for `build_subspace`.

    Raises:
        InputError: if a side has no tokens, rank is not within 1 and d_model, or nothing varies.
    """
    bases, singular_values = {}, {}
    for layer in stats.layers:
        sides = [sums for name in contrasts_of(contrast) for sums in stats.pair(name, layer)]
        pooled = sum(sides[1:], start=sides[0])
        assert pooled.second_moment.numel(), "fitted with second_moment=False"
        check_rank(rank, len(pooled.sum))
        mean_D = pooled.sum / pooled.n_tokens
        moment_DD = pooled.second_moment / pooled.n_tokens
        check_finite(moment_DD, layer)
        # Where every token is the same, rounding of the mean squares is all that is left of the covariance.
        noise = RANK_TOLERANCE**2 * moment_DD.diagonal().max().item()
        directions_DR, values_R = _principal(moment_DD - torch.outer(mean_D, mean_D), noise)
        if len(values_R) == 0:
            raise InputError(f"the hidden states of layer {layer} do not vary: give more than one token on each side")
        if benign is not None:
            rows_KD = (directions_DR * values_R).T
            directions_DR, values_R, _ = principal(layer, rows_KD, tau=1.0, center=False, benign_DD=benign[layer])
        bases[layer], singular_values[layer] = directions_DR[:, :rank].float(), values_R[:rank].float()
    own = {"method": "activation_pca", "contrast": contrast, "rank": rank}
    return Subspace(bases, singular_values, {**provenance, **own})


def _principal(covariance_DD: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors (D, R) with a variance above the noise, and the standard deviations along them (R,); descending."""
    variances_D, directions_DD = torch.linalg.eigh(covariance_DD)
    variances_D, directions_DD = variances_D.flip(0), directions_DD.flip(1)
    n_varying = int((variances_D > noise).sum())
    return directions_DD[:, :n_varying], variances_D[:n_varying].sqrt()


class ActivationPca:
    """Use `activation_pca` as a method of discovery."""

    name = "activation_pca"

    def fitter(self, saes: Mapping[int, Encoder], layers: Sequence[int]) -> ActivationFitter:
        """The hidden states and their outer products."""
        return ActivationFitter()

    def build(self, inputs: MethodInputs) -> Subspace:
        """Of the contrast, whichever side."""
        assert isinstance(inputs.stats, ActivationStats)
        return activation_pca(
            inputs.stats,
            contrast=inputs.contrast,
            rank=inputs.options.rank,
            provenance=inputs.provenance,
            benign=inputs.benign,
        )


METHOD = ActivationPca()
