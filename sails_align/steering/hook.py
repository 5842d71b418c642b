"""Steer a model by a subspace while it runs: from Python, and as the hook of an evaluation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sails_align.core.artifacts import tensors_hash
from sails_align.core.errors import InputError
from sails_align.models.hooks import edited
from sails_align.steering import HOOKS
from sails_align.steering.options import SteeringOptions
from sails_align.subspace.basis import Subspace

if TYPE_CHECKING:
    from sails_align.guards.guard import Guard


def steer(
    model: nn.Module,
    subspace: Subspace,
    how: str = "ablate",
    *,
    strength: float | None = None,
    layers: Sequence[int] | None = None,
    direction: int = 0,
) -> AbstractContextManager[None]:
    """Steer a model within the block, also its `generate`. The hooks are removed at the end.

    Args:
        model: as `hooks.decoder_layers` takes it, with or without an adapter.
        subspace: of this model, such as `Subspace.load(run / "subspace")`.
        how: a name in `HOOKS`: `add` or `ablate`.
        strength: `add`: norm of what is added, as a share of each hidden state's norm (default 0.2); `ablate`: share of
            the subspace that is removed (default 1).
        layers: of the subspace; None: all of them.
        direction: `add`: the column of each basis; 0 is the most important one.

    Raises:
        InputError: if there is no such hook, layer or direction, or the subspace is of a model of another width.

    Examples:
        >>> with sails.steer(model, subspace, "ablate"):
        ...     steered = sails.evaluate(model, tokenizer, "testbed", n_prompts=8, progress=False)
        >>> steered.compare(result).metrics["safety_rate"].n
        16
    """
    options = SteeringOptions(how, "", strength, None if layers is None else list(layers), direction)
    return Steering(options, subspace)(model)


@dataclass(frozen=True, eq=False)
class Steering:
    """A hook of an evaluation's backend (`evaluation.records.InferenceHook`)."""

    options: SteeringOptions
    subspace: Subspace
    guard: "Guard | None" = None
    """That opens the gate; None: everything is steered."""
    prefix: tuple[int, ...] = ()
    """Token ids of `gate_prefix`."""

    def identity(self) -> dict[str, Any]:
        """Return all that decides its effect on a model; the subspace by its content, not its path."""
        options = asdict(self.options)
        named = {name: value for name, value in options.items() if name != "steer_subspace" and "gate" not in name}
        if self.guard is not None:
            named |= {name: value for name, value in options.items() if name.startswith("gate_")}
            named["gate"] = self.guard.hash
        return {**named, "subspace": tensors_hash(self.subspace.tensors())}

    def __call__(self, model: Any) -> AbstractContextManager[Any]:
        """Steer a loaded model within the block."""
        bases, wanted = self.subspace.bases, self.options.steer_layers
        lacking = sorted(set(wanted or ()) - bases.keys())
        if lacking:
            raise InputError(
                f"steer_layers has {lacking[0]}, which the subspace does not; choose of {', '.join(map(str, bases))}"
            )
        d_model = model.config.get_text_config().hidden_size
        if self.subspace.d_model != d_model:
            raise InputError(
                f"the subspace has d_model {self.subspace.d_model}, but the model has d_model {d_model};\n"
                "give one that was found in this model"
            )
        make = HOOKS.get(str(self.options.steer)).load()
        layers = list(bases) if wanted is None else wanted
        edits = {layer: make(bases[layer], self.options) for layer in layers}
        if self.guard is None:
            return edited(model, edits)
        from sails_align.steering.gate import gated

        return gated(model, edits, self.guard, self.options, self.prefix)
