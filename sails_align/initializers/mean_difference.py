"""Initialize adapters with the difference of the two sides' mean hidden states.

It is one direction (two for both contrasts); the adapter fills the other ranks with random orthogonal ones.

Shapes: D d_model, C contrasts, R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.basis import Subspace, principal
from sails_align.subspace.methods import RANK_TOLERANCE, MethodInputs
from sails_align.subspace.statistics import ActivationFitter, TokenStats, check_finite, contrasts_of


class MeanDifference:
    """Find the direction from the unaligned to the aligned side's mean.

    With "both" the basis spans the unit directions of the two contrasts: first what they share. The singular values are
    those of the unit directions side by side. Ranked against benign text, one direction is that of a linear
    discriminant.
    """

    name = "mean_diff"

    def fitter(self, saes: Mapping[int, ResidualSAE], layers: Sequence[int]) -> ActivationFitter:
        """Sum up hidden states."""
        return ActivationFitter(second_moment=False)

    def build(self, inputs: MethodInputs) -> Subspace:
        """Return one or two directions for each layer; the norms of the differences are in the provenance.

        Raises `InputError` if a side has no tokens, or both sides have the same mean.
        """
        stats, contrast = inputs.stats, inputs.contrast
        assert stats is not None
        bases, singular_values, norms = {}, {}, {}
        for layer in stats.layers:
            differences_DC = torch.stack([_difference(stats, name, layer) for name in contrasts_of(contrast)], dim=1)
            norms_C = differences_DC.norm(dim=0)
            directions_DC = differences_DC / norms_C
            if inputs.benign is None:
                left_DR, values_R, _ = torch.linalg.svd(directions_DC, full_matrices=False)
            else:
                benign_DD = inputs.benign[layer]
                left_DR, values_R, _ = principal(layer, directions_DC.T, tau=1.0, center=False, benign_DD=benign_DD)
            n_kept = int((values_R > RANK_TOLERANCE * values_R[0]).sum())
            towards_aligned_R = torch.where(left_DR.T @ directions_DC.sum(dim=1) < 0, -1.0, 1.0)
            bases[layer] = (left_DR * towards_aligned_R)[:, :n_kept].float()
            singular_values[layer] = values_R[:n_kept].float()
            norms[str(layer)] = norms_C.tolist()
        own = {"method": self.name, "contrast": contrast, "difference_norms": norms}
        return Subspace(bases, singular_values, {**inputs.provenance, **own})


def _difference(stats: TokenStats, contrast: str, layer: int) -> Tensor:
    """Return the mean of the aligned side minus the mean of the unaligned side. (D,)"""
    aligned, unaligned = stats.pair(contrast, layer)
    difference_D = aligned.sum / aligned.n_tokens - unaligned.sum / unaligned.n_tokens
    check_finite(difference_D, layer)
    if not difference_D.any():
        raise InputError(
            f"both sides of the {contrast!r} contrast have the same mean at layer {layer}: there is no direction;\n"
            "check that the two sides of the data differ"
        )
    return difference_D


METHOD = MeanDifference()
