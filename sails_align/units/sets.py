"""Divide the units of a model into four sets, by their scores on safety data and on utility data.

SSAH ("Superficial Safety Alignment Hypothesis", arXiv 2410.10862) names them:

    SCU  safety-critical: high on safety, low on utility        UCU  utility-critical: the reverse
    RU   redundant: low on both                                 CU   complex: the rest

The paper does not publish how scores are compared. Here a unit's rank is its place among the channels of its group in
its block, from 0 (lowest score) to 1. SCU are the units with the largest difference rank_safety - rank_utility, UCU
those with the smallest, and RU those of the others with the smallest sum of both; how many is an option.

Shapes: C channels of a group, N units of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sails_align.core.artifacts import content_hash, load_artifact, save_artifact
from sails_align.core.errors import InputError
from sails_align.units.layout import GROUPS
from sails_align.units.options import SETS, UnitOptions, parsed

KIND = "units"
Scores = Mapping[str, Tensor]
"""Scores (C,) by group (`layout.key_of`)."""


@dataclass(frozen=True, eq=False)
class Units:
    """The scores of a model's units, and the set of each."""

    safety: dict[str, Tensor]
    utility: dict[str, Tensor]
    sets: dict[str, Tensor]
    "Number of the set (its place in `SETS`) of each channel (C,) by group, uint8."
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, safety: Scores, utility: Scores, options: UnitOptions) -> "Units":
        """Divide the units of some scores."""
        ranks = [torch.cat([_ranks(scores[key]) for key in safety]) for scores in (safety, utility)]
        set_N = _divided(ranks[0], ranks[1], options)
        parts = set_N.split([len(score_C) for score_C in safety.values()])
        return cls(dict(safety), dict(utility), dict(zip(safety, parts, strict=True)))

    def count(self, name: str) -> int:
        """Return the number of units in a set."""
        return int(sum((set_C == SETS.index(name)).sum() for set_C in self.sets.values()))

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def chosen(self, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return which units (C,) are in any of the wanted sets or parts of sets, by group.

        Args:
            wanted: such as `scu`, or `cu:0.06`: of that set as many units as are 6% of all, those of the highest rank
                on safety data first.

        Raises:
            InputError: if a set has fewer units.
        """
        safety_N = torch.cat([_ranks(score_C) for score_C in self.safety.values()])
        set_N, chosen_N = torch.cat(list(self.sets.values())), torch.zeros(len(self), dtype=torch.bool)
        for name, share in map(parsed, wanted):
            members = (set_N == SETS.index(name)).nonzero().squeeze(1)
            n = len(members) if share is None else round(share * len(self))
            if n > len(members):
                raise InputError(
                    f"{name}:{share:g} asks for {n} units, but {name} has {len(members)} of {len(self)};\n"
                    f"choose at most {len(members) / len(self):.3g}, or {name} for all of them"
                )
            order = safety_N[members].argsort(descending=True, stable=True)
            chosen_N[members[order[:n]]] = True
        parts = chosen_N.split([len(set_C) for set_C in self.sets.values()])
        return dict(zip(self.sets, parts, strict=True))

    def save(self, folder: Path, input_hash: str = "") -> None:
        """Write `units.safetensors` (scores and sets) and `units.json` (how they were found)."""
        parts = {"safety": self.safety, "utility": self.utility, "set": self.sets}
        tensors = {f"{key}.{part}": tensor for part, of in parts.items() for key, tensor in of.items()}
        save_artifact(folder, KIND, tensors, self.provenance, input_hash or content_hash(self.provenance))

    @classmethod
    def load(cls, folder: Path) -> "Units":
        """Load units; raise `InputError` if the folder has none, or they are damaged."""
        tensors, header = load_artifact(folder, KIND)
        parts: dict[str, dict[str, Tensor]] = {"safety": {}, "utility": {}, "set": {}}
        for name, tensor in tensors.items():
            key, _, part = name.rpartition(".")
            parts[part][key] = tensor
        keys = sorted(parts["set"], key=_place)
        ordered = ({key: parts[part][key] for key in keys} for part in ("safety", "utility", "set"))
        return cls(*ordered, provenance=header["provenance"])


def overlap(one: Units, other: Units, name: str) -> float | None:
    """Return the share of a set's units that are in the same set of another division; None of an empty set."""
    number, n = SETS.index(name), one.count(name)
    both = sum(((one.sets[key] == number) & (other.sets[key] == number)).sum().item() for key in one.sets)
    return both / n if n else None


def _place(key: str) -> tuple[int, int]:
    """Return where a group is in a model: its block, and its place there."""
    block, _, name = key.partition(".")
    return int(block), [group.name for group in GROUPS].index(name)


def _ranks(score_C: Tensor) -> Tensor:
    """Return the ranks of scores, from 0 to 1; equal scores have equal ranks, the mean of their places."""
    _, place_C, count = score_C.unique(return_inverse=True, return_counts=True)
    mean_place = count.cumsum(0) - (count + 1) / 2
    return mean_place[place_C] / max(1, len(score_C) - 1)


def _divided(safety_N: Tensor, utility_N: Tensor, options: UnitOptions) -> Tensor:
    """Return the number of each unit's set, from its ranks."""
    set_N = torch.full((len(safety_N),), SETS.index("cu"), dtype=torch.uint8)
    wanted = {
        "scu": (utility_N - safety_N, options.scu_share),
        "ucu": (safety_N - utility_N, options.ucu_share),
        "ru": (safety_N + utility_N, options.ru_share),
    }
    for name, (value_N, share) in wanted.items():
        free_N = value_N.masked_fill(set_N != SETS.index("cu"), float("inf"))  # equal ones in the order of the model
        set_N[free_N.argsort(stable=True)[: round(share * len(set_N))]] = SETS.index(name)
    return set_N
