"""Options of the callbacks."""

from dataclasses import dataclass, field

from sails_align.core.errors import InputError


@dataclass(frozen=True)
class DecayOptions:
    """Options of the callback `decay`."""

    subspace_decay: float = field(
        default=1.0,
        metadata={"help": "Strength of --subspace_mode decay; each step pulls by the learning rate times this."},
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.subspace_decay < float("inf"):
            raise InputError(
                f"subspace_decay is {self.subspace_decay}, but it must be positive; choose a value above 0"
            )
