"""Choose a learning rate on the validation part, extend a grid whose best rate is at an end, and say how sure it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from statistics import fmean
from typing import Any

Merits = Mapping[float, float]
"""Merit of each learning rate."""


def best_of(merits: Merits) -> float:
    """Return the learning rate with the highest merit."""
    return max(merits, key=lambda rate: merits[rate])


def beyond_end(merits: Merits) -> float | None:
    """Return the rate to try beyond the end of a grid, if the rate there is better than all others.

    The grid's last steps are repeated: after 0.003, 0.01, 0.03 comes 0.1.
    """
    rates = sorted(merits)
    if not is_at_end(merits):
        return None
    if best_of(merits) == rates[0]:
        rates = rates[::-1]
    last = rates[-1]
    new = float(f"{last * rates[-2] / rates[-3] if len(rates) > 2 else last * last / rates[-2]:.3g}")
    return new if 0 < new < 1 and new not in merits else None


def is_at_end(merits: Merits) -> bool:
    """Return whether the rate that is better than all others is at an end of the grid."""
    rates, best = sorted(merits), best_of(merits)
    is_unique = [*merits.values()].count(merits[best]) == 1
    return len(rates) > 1 and is_unique and best in (rates[0], rates[-1])


@dataclass(frozen=True)
class Tuning:
    """How the learning rate of a run was chosen."""

    by_seed: Mapping[int, Merits]
    """Merit of each learning rate by tuning seed."""
    n_added: int = 0
    """Rates that were added to the grid."""
    knob: bool = False
    """Whether the values are those of a method's own knob, whose grid is not extended."""

    @property
    def merits(self) -> dict[float, float]:
        """Means over the tuning seeds."""
        first = next(iter(self.by_seed.values()))
        return {rate: fmean(of[rate] for of in self.by_seed.values()) for rate in first}

    @property
    def chosen(self) -> float:
        """The rate with the highest mean."""
        return best_of(self.merits)

    @property
    def is_at_end(self) -> bool:
        """Whether the chosen rate is at an end of the grid, so that one beyond it may be better."""
        return is_at_end(self.merits)

    @property
    def equally_good(self) -> list[float]:
        """The rates whose mean is the highest; the first one that was tried is chosen."""
        merits = self.merits
        return sorted(rate for rate, merit in merits.items() if isclose(merit, merits[self.chosen], abs_tol=1e-9))

    @property
    def best_of_seeds(self) -> dict[int, float]:
        """The rate that each tuning seed would have chosen."""
        return {seed: best_of(of) for seed, of in self.by_seed.items()}

    @property
    def disagrees(self) -> bool:
        """Whether two tuning seeds would choose rates more than one step of the grid apart."""
        rates = sorted(self.merits)
        places = [rates.index(rate) for rate in self.best_of_seeds.values()]
        return max(places) - min(places) > 1

    @property
    def spread(self) -> float:
        """The difference between the tuning seeds' highest and lowest merit at the chosen rate."""
        merits = [of[self.chosen] for of in self.by_seed.values()]
        return max(merits) - min(merits)

    def to_json(self) -> dict[str, Any]:
        """Return what `results.json` says of it."""
        return {
            "chosen": self.chosen,
            "grid": sorted(self.merits),
            "n_added": self.n_added,
            "is_at_end": self.is_at_end,
            "equally_good": self.equally_good,
            "best_of_seeds": {str(seed): rate for seed, rate in self.best_of_seeds.items()},
            "disagrees": self.disagrees,
            "spread": self.spread,
        }

    def doubts(self) -> list[str]:
        """Return what makes the choice doubtful, in words."""
        found, name = [], "hyperparameter" if self.knob else "learning rate"
        if len(self.equally_good) > 1:
            found.append(
                f"several values of its {name} are equally good on validation prompts ({_told(self.equally_good)}); "
                f"{self.chosen:g} is the first of them that was tried"
            )
        if self.knob and self.is_at_end:
            found.append(f"its {name} {self.chosen:g} is at an end of its values ({_told(sorted(self.merits))})")
        if self.knob:
            return found
        if self.is_at_end:
            added = f", to which {self.n_added} were added" if self.n_added else ""
            found.append(
                f"its learning rate {self.chosen:g} is at the end of the grid ({_told(sorted(self.merits))}{added}); "
                "one beyond it may be better"
            )
        if self.disagrees:
            found.append(
                f"its {len(self.by_seed)} tuning seeds would choose {_told(list(self.best_of_seeds.values()))}; "
                "more of them (--n_tuning_seeds) would make the choice surer"
            )
        return found


def _told(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
