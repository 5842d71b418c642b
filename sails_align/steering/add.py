"""Add a direction of a subspace to the residual stream, at every token.

    h <- h + strength * |h| * d

where d is a column of the layer's basis. The strength is relative to the hidden state's own norm, since norms differ by
model and grow with depth.
"""

from functools import partial

from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.models.hooks import HiddenEdit
from sails_align.steering.options import SteeringOptions

STRENGTH = 0.2
"""The default."""


def edit(basis_DR: Tensor, options: SteeringOptions) -> HiddenEdit:
    """Make the function that adds the direction; raise `InputError` if the basis has no direction of that number."""
    n = basis_DR.shape[1]
    if options.steer_direction >= n:
        raise InputError(f"steer_direction is {options.steer_direction}, but a basis has {n}; choose 0 to {n - 1}")
    strength = STRENGTH if options.steer_strength is None else options.steer_strength
    return partial(_add, strength * basis_DR[:, options.steer_direction])


def _add(direction_D: Tensor, hidden_BSD: Tensor) -> Tensor:
    return hidden_BSD + hidden_BSD.norm(dim=-1, keepdim=True) * direction_D.to(hidden_BSD)
