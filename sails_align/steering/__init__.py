"""Hooks at inference that change the residual stream, one file each.

A hook's module has a function `edit(basis_DR, options)`, which turns the basis of a layer into a function of the
layer's hidden states. `steer(model, subspace, NAME)` applies it within a block.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sails_align.core.registry import Entry, Registry
from sails_align.steering.options import SteeringOptions

if TYPE_CHECKING:
    from sails_align.models.spec import ModelSpec
    from sails_align.steering.hook import Steering

HOOKS = Registry(
    "steering hook",
    {
        "add": Entry("sails_align.steering.add:edit", "Add a direction of the subspace."),
        "ablate": Entry("sails_align.steering.ablate:edit", "Remove the subspace."),
    },
)


def hook_of(options: SteeringOptions, spec: "ModelSpec | None" = None) -> "Steering | None":
    """Make the hook that options ask for; None if they ask for none.

    Raises `InputError` if there is no such hook, the subspace or the gate's guard is missing or damaged, or the guard
    is of another model than `spec`.
    """
    if options.steer is None:
        return None
    HOOKS.get(options.steer)
    from sails_align.steering.hook import Steering
    from sails_align.subspace.basis import Subspace

    assert options.steer_subspace is not None, "checked with the options"
    subspace = Subspace.load(Path(options.steer_subspace))
    if options.gate is None:
        return Steering(options, subspace)
    from sails_align.guards.guard import Guard

    guard = Guard.load(Path(options.gate))
    if spec is not None:
        guard.check_model(spec)
    return Steering(options, subspace, guard)
