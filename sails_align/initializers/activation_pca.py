"""Initialize adapters with the directions in which hidden states vary most, to measure the value of SAEs.

The hidden states are those of the contrast, with both sides pooled and centred.

Shapes: D d_model, K directions, R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.basis import Subspace, principal
from sails_align.subspace.methods import RANK_TOLERANCE, MethodInputs, check_rank
from sails_align.subspace.statistics import ActivationFitter, TokenStats, check_finite, contrasts_of


class ActivationPca:
    """Find the directions of largest variance; "both" pools the tokens of both contrasts."""

    name = "activation_pca"

    def fitter(self, saes: Mapping[int, ResidualSAE], layers: Sequence[int]) -> ActivationFitter:
        """Sum up hidden states and their outer products."""
        return ActivationFitter()

    def build(self, inputs: MethodInputs) -> Subspace:
        """Return `rank` directions for each layer; fewer where the hidden states do not vary in that many.

        Raises `InputError` if a side has no tokens, rank is not within 1 and d_model, or nothing varies.
        """
        stats, rank = inputs.stats, inputs.options.rank
        assert stats is not None
        bases, singular_values = {}, {}
        for layer in stats.layers:
            directions_DR, values_R = _varying(stats, inputs.contrast, layer, rank)
            if inputs.benign is not None:
                rows_KD, benign_DD = (directions_DR * values_R).T, inputs.benign[layer]
                directions_DR, values_R, _ = principal(layer, rows_KD, tau=1.0, center=False, benign_DD=benign_DD)
            bases[layer], singular_values[layer] = directions_DR[:, :rank].float(), values_R[:rank].float()
        own = {"method": self.name, "contrast": inputs.contrast, "rank": rank}
        return Subspace(bases, singular_values, {**inputs.provenance, **own})


def _varying(stats: TokenStats, contrast: str, layer: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the directions (D, R) with a variance above rounding, and the standard deviations (R,); descending."""
    sides = [sums for name in contrasts_of(contrast) for sums in stats.pair(name, layer)]
    pooled = sum(sides[1:], start=sides[0])
    assert pooled.second_moment.numel(), "fitted with second_moment=False"
    check_rank(rank, len(pooled.sum))
    mean_D = pooled.sum / pooled.n_tokens
    moment_DD = pooled.second_moment / pooled.n_tokens
    check_finite(moment_DD, layer)
    variances_D, directions_DD = torch.linalg.eigh(moment_DD - torch.outer(mean_D, mean_D))
    variances_D, directions_DD = variances_D.flip(0), directions_DD.flip(1)
    # Where every token is the same, rounding of the mean squares is all that is left of the covariance.
    n_varying = int((variances_D > RANK_TOLERANCE**2 * moment_DD.diagonal().max().item()).sum())
    if n_varying == 0:
        raise InputError(f"the hidden states of layer {layer} do not vary: give more than one token on each side")
    return directions_DD[:, :n_varying], variances_D[:n_varying].sqrt()


METHOD = ActivationPca()
