"""Options of single initializations, which the registry lists with them."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_choice, option


@dataclass(frozen=True)
class GuardSpaceOptions:
    """Options of the initialization `guardspace`."""

    guard_energy: float = option(
        0.99,
        "Share of the energy of harmful prompts, above 0 and at most 1, that --init guardspace protects in the inputs "
        "of each module. With 1, training cannot change the module's outputs for these inputs; a smaller share leaves "
        "more dimensions to train.",
    )
    guard_tokens: str = option(
        "all", "Tokens of the harmful prompts that --init guardspace protects: all, or only the last one of each."
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.guard_energy <= 1.0:
            raise InputError(f"guard_energy is {self.guard_energy}, but it is a share: choose a value in (0, 1]")
        check_choice("guard_tokens", self.guard_tokens, ("last", "all"))


@dataclass(frozen=True)
class ScLoraOptions:
    """Options of the initialization `sc_lora`."""

    sc_lora_beta: float = option(
        0.5,
        "Weight of harmful prompts for --init sc_lora, from 0 (the task alone) to 1 (harmful prompts alone): a "
        "direction counts (1 - beta) times its energy on the task minus beta times that on harmful prompts.",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.sc_lora_beta <= 1.0:
            raise InputError(f"sc_lora_beta is {self.sc_lora_beta}, but it is a weight: choose a value from 0 to 1")
