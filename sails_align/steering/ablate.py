"""Remove a subspace from the residual stream, at every token, wholly or in part.

    h <- h - strength * (h B) B'

where B is the layer's basis. With strength 1 nothing of the subspace is left; Arditi et al. 2024 (arXiv 2406.11717) do
so for one direction.
"""

from functools import partial

from torch import Tensor

from sails_align.models.hooks import HiddenEdit
from sails_align.steering.options import SteeringOptions


def edit(basis_DR: Tensor, options: SteeringOptions) -> HiddenEdit:
    """Make the function that removes the subspace."""
    return partial(remove, basis_DR, strength=1.0 if options.steer_strength is None else options.steer_strength)


def remove(basis_DR: Tensor, hidden_BSD: Tensor, strength: float = 1.0) -> Tensor:
    """Return the hidden states without a share of a subspace."""
    basis_DR = basis_DR.to(hidden_BSD)
    return hidden_BSD - strength * (hidden_BSD @ basis_DR) @ basis_DR.T
