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


@dataclass(frozen=True)
class EmaOptions:
    """Options of the callback `ema`."""

    ema_half_life: float | None = option(
        None,
        "End with an average of the weights over the steps: after this number of steps a weight counts half as much. "
        "Default: no average, the weights of the last step.",
    )

    def __post_init__(self) -> None:
        if self.ema_half_life is not None:
            check_positive(self, "ema_half_life")
