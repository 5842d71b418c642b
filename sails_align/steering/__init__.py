"""Hooks at inference that change the residual stream, one file each.

A hook's module has a function `edit(basis_DR, options)`, which turns the basis of a layer into a function of the
layer's hidden states. `steer(model, subspace, NAME)` applies it within a block.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from sails_align.core.errors import InputError
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

    `spec` is the model that is steered; `gate_prefix` needs its tokenizer. Raises `InputError` if there is no such
    hook, the subspace or the gate's guard is missing or damaged, the guard is of another model than `spec`, or the
    prefix has words that the model does not know.
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
    return Steering(options, subspace, guard, prefix_of(options, spec))


def prefix_of(options: SteeringOptions, spec: "ModelSpec | None") -> tuple[int, ...]:
    """Return the token ids of `gate_prefix`; none without it."""
    if options.gate_prefix is None:
        return ()
    assert spec is not None, "a prefix is given with the model that is to write it"
    from sails_align.models.load import load_spec_tokenizer

    tokenizer = load_spec_tokenizer(spec)
    ids = tokenizer.encode(options.gate_prefix, add_special_tokens=False)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise InputError(
            f"gate_prefix is {options.gate_prefix!r}, which has words that the tokenizer of {spec.name} lacks;\n"
            "choose words that the model knows"
        )
    return tuple(ids)
