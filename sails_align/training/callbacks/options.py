"""Options of the callbacks."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, check_choices, check_least, check_positive, option
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
        "End with an exponential moving average of the weights; the value is its half-life in steps. "
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


SIFT_ENTRIES = ("largest", "smallest", "random")


@dataclass(frozen=True)
class SiftOptions:
    """Options of the callback `sift`."""

    sift_rate: float | None = option(
        None,
        "Train only this share of the entries of each weight, those with the largest gradient at the start; all others "
        "stay as they are. Needs --use_peft false.",
    )
    sift_select_steps: int = option(4, "Batches whose summed gradient chooses the entries of --sift_rate.")
    sift_modules: list[str] | None = option(
        None, "Modules whose weights --sift_rate trains, such as q_proj v_proj. Default: all trained weights."
    )
    sift_entries: str = option(
        "largest",
        "Entries that --sift_rate trains, by their gradients: largest, or as controls smallest or random (drawn with "
        "--seed).",
        choices=SIFT_ENTRIES,
    )
    sift_safety_dataset_name: str | None = option(
        None,
        "Harmful requests with refusals (a dataset, or testbed or smollm2 for their own): --sift_rate does not choose "
        "the entries that matter most for them.",
    )
    sift_forbidden: float = option(
        0.1,
        "Share of the entries of each weight that is not chosen with --sift_safety_dataset_name: those with the "
        "largest Fisher information.",
    )

    def __post_init__(self) -> None:
        check_choice("sift_entries", self.sift_entries, SIFT_ENTRIES)
        check_least(self, sift_select_steps=1)
        if self.sift_rate is not None and not 0 < self.sift_rate <= 1:
            raise InputError(f"sift_rate is {self.sift_rate}, but it is a share: choose a value in (0, 1]")
        if not 0 <= self.sift_forbidden < 1:
            raise InputError(f"sift_forbidden is {self.sift_forbidden}, but it is a share: choose a value in [0, 1)")
        guarded = self.sift_safety_dataset_name is not None
        if guarded and self.sift_rate is not None and self.sift_rate + self.sift_forbidden > 1:
            raise InputError(
                f"sift_rate is {self.sift_rate} and sift_forbidden {self.sift_forbidden}, which leaves too few entries "
                "to choose from;\nchoose values whose sum is at most 1"
            )
