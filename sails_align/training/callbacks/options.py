"""Options of the callbacks."""

from dataclasses import dataclass

from sails_align.core.options import check_positive, option


@dataclass(frozen=True)
class DecayOptions:
    """Options of the callback `decay`."""

    subspace_decay: float = option(
        1.0, "Strength of --subspace_mode decay; each step pulls by the learning rate times this."
    )

    def __post_init__(self) -> None:
        check_positive(self, "subspace_decay")
