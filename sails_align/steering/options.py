"""Options of steering."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import option


@dataclass(frozen=True)
class SteeringOptions:
    """Steering of the residual stream while a model responds."""

    steer: str | None = option(None, "add (a direction of a subspace) or ablate (remove a subspace).")
    steer_subspace: str | None = option(None, "Folder of the subspace, such as `subspace` in a run's folder.")
    steer_strength: float | None = option(
        None,
        "add: norm of what is added, as a share of each hidden state's norm, negative to subtract (default 0.2); "
        "ablate: share that is removed (default 1).",
    )
    steer_layers: list[int] | None = option(None, "Layers to steer; default: all of the subspace.")
    steer_direction: int = option(0, "add: number of the direction in each basis; 0 is the most important one.")

    def __post_init__(self) -> None:
        if (self.steer is None) != (self.steer_subspace is None):
            given, lacking = ("steer", "steer_subspace") if self.steer else ("steer_subspace", "steer")
            raise InputError(f"{given} is {getattr(self, given)}, but {lacking} is not given; give both, or none")
        if self.steer_strength is not None and not abs(self.steer_strength) < float("inf"):
            raise InputError(f"steer_strength is {self.steer_strength}; choose a finite number")
        if self.steer_direction < 0:
            raise InputError(f"steer_direction is {self.steer_direction}; choose 0 or more")
