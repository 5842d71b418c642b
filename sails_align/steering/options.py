"""Options of steering."""

from dataclasses import dataclass, field

from sails_align.core.errors import InputError


@dataclass(frozen=True)
class SteeringOptions:
    """Steering of the residual stream while a model responds."""

    steer: str | None = field(
        default=None, metadata={"help": "add (a direction of a subspace) or ablate (remove a subspace)."}
    )
    steer_subspace: str | None = field(
        default=None, metadata={"help": "Folder of the subspace, such as `subspace` in a run's folder."}
    )
    steer_strength: float | None = field(
        default=None,
        metadata={
            "help": "add: norm of what is added, as a share of each hidden state's norm, negative to subtract "
            "(default 0.2); ablate: share that is removed (default 1)."
        },
    )
    steer_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers to steer. Default: all of the subspace."}
    )
    steer_direction: int = field(
        default=0, metadata={"help": "add: number of the direction in each basis; 0 is the most important one."}
    )

    def __post_init__(self) -> None:
        if (self.steer is None) != (self.steer_subspace is None):
            given, lacking = ("steer", "steer_subspace") if self.steer else ("steer_subspace", "steer")
            raise InputError(f"{given} is {getattr(self, given)}, but {lacking} is not given; give both, or none")
        if self.steer_strength is not None and not abs(self.steer_strength) < float("inf"):
            raise InputError(f"steer_strength is {self.steer_strength}; choose a finite number")
        if self.steer_direction < 0:
            raise InputError(f"steer_direction is {self.steer_direction}; choose 0 or more")
