"""Sum hidden states over tokens for each (contrast, layer, side), and save the sums.

Everything is a plain sum, so the statistics of several processes or shards are added with `+`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from sails_align.core.artifacts import load_artifact, save_artifact
from sails_align.core.distributed import gathered, summed
from sails_align.core.errors import InputError

SIDES = ("aligned", "unaligned")
CONTRASTS = ("response", "prompt")
Key = tuple[str, int, str]
"""(contrast, layer, side)"""


@dataclass(frozen=True)
class SideSums:
    """Sums over the tokens of one side. Subclasses add float64 tensors."""

    n_tokens: Tensor
    """(), int64"""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def copy(self) -> Self:
        """On the CPU, sharing no memory."""
        return type(self)(*(getattr(self, f.name).detach().cpu().clone() for f in fields(self)))


Sums = TypeVar("Sums", bound=SideSums)


@dataclass(frozen=True)
class Stats(Generic[Sums]):
    """The sums of every (contrast, layer, side) that had tokens."""

    sums: Mapping[Key, Sums]

    kind: ClassVar[str]
    """Of the artifact."""
    sums_class: ClassVar[type[SideSums]]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer, _ in self.sums})

    def pair(self, contrast: str, layer: int) -> tuple[Sums, Sums]:
        """Return the sums of the aligned and of the unaligned side.

        Raises:
            InputError: if a side had no tokens.
        """
        for side in SIDES:
            if (contrast, layer, side) not in self.sums:
                raise InputError(
                    f"the {contrast!r} contrast has no tokens on its {side} side at layer {layer};\n"
                    f"give data that has that side, or another --contrast ({', '.join(CONTRASTS)}, both)"
                )
        aligned, unaligned = (self.sums[contrast, layer, side] for side in SIDES)
        return aligned, unaligned

    def __add__(self, other: Self) -> Self:
        merged = dict(self.sums)
        for key, sums in other.sums.items():
            merged[key] = merged[key] + sums if key in merged else sums
        return type(self)(merged)

    def over_processes(self) -> Self:
        """The sums of all processes together, on every process; a process may lack keys that others have."""
        shapes = {
            key: {f.name: (tuple(value.shape), value.dtype) for f in fields(sums) for value in [getattr(sums, f.name)]}
            for key, sums in self.sums.items()
        }
        known = {key: of_key for part in gathered(shapes) for key, of_key in part.items()}
        merged = {}
        for key in sorted(known):  # the same order on every process
            own = self.sums.get(key)
            merged[key] = self.sums_class(
                **{
                    name: summed(torch.zeros(shape, dtype=dtype) if own is None else getattr(own, name))
                    for name, (shape, dtype) in known[key].items()
                }
            )
        return type(self)(merged)  # type: ignore[arg-type]

    def save(self, folder: Path, input_hash: str, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the artifact; `provenance` is JSON-able."""
        tensors = {
            ".".join([contrast, str(layer), side, f.name]): getattr(sums, f.name)
            for (contrast, layer, side), sums in self.sums.items()
            for f in fields(sums)
        }
        save_artifact(folder, self.kind, tensors, provenance or {}, input_hash)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: if the artifact is missing or damaged.
        """
        tensors, _ = load_artifact(folder, cls.kind)
        parts: dict[Key, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            contrast, layer, side, field = name.split(".")
            parts.setdefault((contrast, int(layer), side), {})[field] = tensor
        return cls({key: cls.sums_class(**named) for key, named in parts.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class ActivationSums(SideSums):
    """Sums over the tokens of one side, of the hidden states themselves. float64."""

    sum: Tensor
    """(D,)"""
    second_moment: Tensor
    """(D, D): sum of the outer products; (0, 0) if they were not asked for."""


@dataclass(frozen=True)
class ActivationStats(Stats[ActivationSums]):
    """The first two moments of the hidden states, for each (contrast, layer, side)."""

    kind = "activation_stats"
    sums_class = ActivationSums


class ActivationFitter:
    """Sum up the hidden states and their outer products. Memory does not depend on the number of tokens."""

    def __init__(self, *, second_moment: bool = True) -> None:
        """Choose what to add up.

        Args:
            second_moment: also the outer products, which a PCA needs and a difference of means does not: at d_model
                3584 they take 0.1 GB for each (contrast, layer, side).
        """
        self._second_moment = second_moment
        self._sums: dict[Key, ActivationSums] = {}

    @torch.no_grad()
    def update(self, contrast: str, side: str, layer: int, hidden_TD: Tensor) -> None:
        """Add tokens to a side; the arguments are those of `FeatureFitter.update`."""
        # Some dimensions of a residual stream are hundreds of times larger than the rest: in float32 the products of
        # those would round away the others' covariance.
        hidden_TD = hidden_TD.double()
        key = (contrast, layer, side)
        if key not in self._sums:
            sum_D = hidden_TD.new_zeros(hidden_TD.shape[1])
            products_DD = torch.outer(sum_D, sum_D) if self._second_moment else sum_D.new_zeros(0, 0)
            self._sums[key] = ActivationSums(token_count(0, hidden_TD.device), sum_D, products_DD)
        sums = self._sums[key]
        sums.n_tokens.add_(hidden_TD.shape[0])
        sums.sum.add_(hidden_TD.sum(0))
        if self._second_moment:
            sums.second_moment.addmm_(hidden_TD.T, hidden_TD)

    def result(self) -> ActivationStats:
        """What was added so far; the fitter can go on."""
        return ActivationStats({key: sums.copy() for key, sums in self._sums.items()})


def contrasts_of(contrast: str) -> tuple[str, ...]:
    """Return the contrasts of an option value: one, or all of them for "both" and "split".

    Raises:
        InputError: if there is no such contrast.
    """
    if contrast in ("both", "split"):
        return CONTRASTS
    if contrast not in CONTRASTS:
        raise InputError(f"unknown contrast {contrast!r}: choose one of {', '.join(CONTRASTS)}, both, split")
    return (contrast,)


def token_count(n_tokens: int, device: torch.device) -> Tensor:
    """A count as the fitters keep it: (), int64, on the device of the other sums."""
    return torch.tensor(n_tokens, dtype=torch.int64, device=device)


def check_finite(values: Tensor, layer: int) -> None:
    """Check that sums contain no NaN or infinity.

    Raises:
        InputError: then.
    """
    if not values.isfinite().all():
        raise InputError(
            f"the activations of layer {layer} are not finite (NaN or infinity);\n"
            "load the model in bfloat16 or float32: float16 overflows in some models"
        )
