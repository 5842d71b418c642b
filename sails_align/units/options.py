"""Options of the search for units."""

from dataclasses import dataclass

from sails_align.core.errors import InputError
from sails_align.core.options import check_least, option
from sails_align.core.suggestions import did_you_mean

SETS = ("scu", "ucu", "ru", "cu")
"""Safety-critical, utility-critical, redundant and complex units."""


@dataclass(frozen=True)
class UnitOptions:
    """Units for safety and for utility."""

    calibration_examples: int = option(512, "Maximum number of conversations of each kind that units are scored on.")
    scu_share: float = option(0.013, "Share of the units that become safety-critical units (SCU).")
    ucu_share: float = option(0.133, "Share of the units that become utility-critical units (UCU).")
    ru_share: float = option(0.148, "Share of the units that become redundant units (RU); the rest are complex (CU).")

    def __post_init__(self) -> None:
        check_least(self, calibration_examples=2, scu_share=0, ucu_share=0, ru_share=0)
        if (total := self.scu_share + self.ucu_share + self.ru_share) > 1:
            raise InputError(f"scu_share, ucu_share and ru_share are {total:g} together; choose at most 1 in all")


def parsed(wanted: str) -> tuple[str, float | None]:
    """Read a set with an optional share of all units, such as `cu:0.06`; raise `InputError` if it is none."""
    name, has_share, text = wanted.partition(":")
    if name not in SETS:
        raise InputError(f"there is no set of units {name!r}{did_you_mean(name, SETS)}")
    if not has_share:
        return name, None
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{wanted} is no share of the units; write a number above 0 and up to 1, such as {name}:0.06")
    return name, share
