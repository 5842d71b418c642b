"""Options of the callbacks."""

from dataclasses import dataclass

from sails_align.core.options import check_choices, check_least, check_positive, option
from sails_align.units.options import parsed


@dataclass(frozen=True)
class CladeOptions:
    """Options of the callback `clade`."""

    clade: str | None = option(
        None,
        "Train gains and biases of the norms, and no other weights: categories (some for each category of harmful "
        "requests, chosen by a probe at inference) or one (the same for all). Needs --use_peft false.",
    )
    clade_layer: int | None = option(
        None, "The block whose output tells --clade the category; deeper ones are trained. Default: a third of the way."
    )

    def __post_init__(self) -> None:
        check_choices(self, {"clade": ("categories", "one")})
        check_least(self, clade_layer=0)


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


@dataclass(frozen=True)
class FreezeUnitsOptions:
    """Options of the callback `freeze_units`."""

    freeze_units: str | None = option(
        None,
        "The folder `units` of sails units: channels of the model that stay as they are while the rest is trained.",
    )
    frozen_units: list[str] = option(
        ["scu"],
        "Sets of --freeze_units that are frozen: scu, ucu, ru, cu. A share of all units, as in cu:0.06, takes those of "
        "the set that score highest on safety data.",
    )
    trained_units: list[str] | None = option(
        None, "In place of --frozen_units: train only these sets, such as ru, and freeze all other weights."
    )

    def __post_init__(self) -> None:
        for wanted in [*self.frozen_units, *(self.trained_units or [])]:
            parsed(wanted)
