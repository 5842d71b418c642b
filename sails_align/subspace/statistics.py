"""Sum hidden states over tokens for each (contrast, layer, side).

Everything is a plain sum, so the statistics of several processes or shards are added with `+`.

Shapes: T tokens, D d_model, F d_sae.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sails_align.core.distributed import gathered, summed
from sails_align.core.errors import InputError

SIDES = ("aligned", "unaligned")
CONTRASTS = ("response", "prompt")
Key = tuple[str, int, str]
"""(contrast, layer, side)"""


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class SideSums:
    """Sums over the tokens of one side, of hidden states (D) or of latents (F); float64 but for the count.

    Sums that a fitter does not add up are empty.
    """

    n_tokens: Tensor
    """(), int64"""
    sum: Tensor
    """(D,) or (F,)"""
    second_moment: Tensor = field(default_factory=_none)
    """(D, D): the outer products."""
    sumsq: Tensor = field(default_factory=_none)
    """(F,)"""
    active: Tensor = field(default_factory=_none)
    """(F,): number of tokens on which the latent is not zero."""

    @property
    def mean(self) -> Tensor:
        return self.sum / self.n_tokens

    @property
    def rate(self) -> Tensor:
        """Share, 0 to 1, of the tokens on which the latent is active."""
        return self.active / self.n_tokens

    def items(self) -> list[tuple[str, Tensor]]:
        """Return all sums by name."""
        return list(vars(self).items())

    def __add__(self, other: "SideSums") -> "SideSums":
        return SideSums(**{name: own + getattr(other, name) for name, own in self.items()})

    def copy(self) -> "SideSums":
        """Return a copy on the CPU that shares no memory."""
        return SideSums(**{name: own.detach().cpu().clone() for name, own in self.items()})


@dataclass(frozen=True)
class TokenStats:
    """The sums of every (contrast, layer, side) that had tokens."""

    sums: Mapping[Key, SideSums]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer, _ in self.sums})

    def pair(self, contrast: str, layer: int) -> tuple[SideSums, SideSums]:
        """Return the sums of the aligned and of the unaligned side; raise `InputError` if a side had no tokens."""
        for side in SIDES:
            if (contrast, layer, side) not in self.sums:
                raise InputError(
                    f"the {contrast!r} contrast has no tokens on its {side} side at layer {layer};\n"
                    f"give data that has that side, or another --contrast ({', '.join(CONTRASTS)}, both)"
                )
        aligned, unaligned = (self.sums[contrast, layer, side] for side in SIDES)
        return aligned, unaligned

    def __add__(self, other: "TokenStats") -> "TokenStats":
        merged = dict(self.sums)
        for key, sums in other.sums.items():
            merged[key] = merged[key] + sums if key in merged else sums
        return TokenStats(merged)

    def over_processes(self) -> "TokenStats":
        """Return the sums of all processes together, on every process; a process may lack keys that others have."""
        own = {key: {name: (value.shape, value.dtype) for name, value in of.items()} for key, of in self.sums.items()}
        known = {key: shapes for of_process in gathered(own) for key, shapes in of_process.items()}
        merged = {}
        for key in sorted(known):  # the same order on every process
            zeros = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in known[key].items()}
            sums = self.sums.get(key, SideSums(**zeros))
            merged[key] = SideSums(**{name: summed(value) for name, value in sums.items()})
        return TokenStats(merged)


class Fitter:
    """Sum up hidden states over tokens. Memory does not depend on the number of tokens."""

    def __init__(self) -> None:
        """Start without tokens."""
        self._sums: dict[Key, SideSums] = {}

    def update(self, contrast: str, side: str, layer: int, hidden_TD: Tensor) -> None:
        """Add hidden states (T, D) of a block's output, of any floating dtype, to a side of a contrast."""
        raise NotImplementedError

    def result(self) -> TokenStats:
        """Return what was added so far; the fitter can go on."""
        return TokenStats({key: sums.copy() for key, sums in self._sums.items()})


class ActivationFitter(Fitter):
    """Sum up the hidden states and their outer products."""

    def __init__(self, *, second_moment: bool = True) -> None:
        """Add up the outer products, too, if `second_moment`; at d_model 3584 they take 0.1 GB for each sum."""
        super().__init__()
        self._second_moment = second_moment

    @torch.no_grad()
    def update(self, contrast: str, side: str, layer: int, hidden_TD: Tensor) -> None:
        """Add tokens to a side."""
        # Some dimensions of a residual stream are hundreds of times larger than the rest: in float32 the products of
        # those would round away the others' covariance.
        hidden_TD = hidden_TD.double()
        key = (contrast, layer, side)
        if key not in self._sums:
            sum_D = hidden_TD.new_zeros(hidden_TD.shape[1])
            products_DD = torch.outer(sum_D, sum_D) if self._second_moment else _none()
            self._sums[key] = SideSums(torch.tensor(0, device=hidden_TD.device), sum_D, products_DD)
        sums = self._sums[key]
        sums.n_tokens.add_(hidden_TD.shape[0])
        sums.sum.add_(hidden_TD.sum(0))
        if self._second_moment:
            sums.second_moment.addmm_(hidden_TD.T, hidden_TD)


def contrasts_of(contrast: str) -> tuple[str, ...]:
    """Return the contrasts of an option value: one, or all of them for "both" and "split"."""
    return CONTRASTS if contrast in ("both", "split") else (contrast,)


def check_finite(values: Tensor, layer: int) -> None:
    """Raise `InputError` if sums contain NaN or infinity."""
    if not values.isfinite().all():
        raise InputError(
            f"the activations of layer {layer} are not finite (NaN or infinity);\n"
            "load the model in bfloat16 or float32: float16 overflows in some models"
        )
