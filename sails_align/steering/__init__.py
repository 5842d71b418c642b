"""Hooks at inference that change the residual stream, one file each.

A hook's module has a function `edit(basis_DR, options)`: it makes, of the basis of a layer, a function from the layer's
hidden states to others. `steer(model, subspace, NAME)` applies it within a block.
"""

from typing import TYPE_CHECKING

from sails_align.core.registry import Entry, Registry
from sails_align.steering.options import SteeringOptions

if TYPE_CHECKING:
    from sails_align.steering.hook import Steering

HOOKS = Registry(
    "steering hook",
    {
        "add": Entry("sails_align.steering.add:edit", "Add a direction of the subspace."),
        "ablate": Entry("sails_align.steering.ablate:edit", "Take the subspace out."),
    },
)


def hook_of(options: SteeringOptions) -> "Steering | None":
    """Make the hook that options ask for; None if they ask for none.

    Raises:
        InputError: if there is no such hook, or the subspace is missing or damaged.
    """
    if options.steer is None:
        return None
    HOOKS.get(options.steer)
    from sails_align.steering.hook import Steering

    return Steering.of(options)
