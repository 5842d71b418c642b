"""Define the interface of methods that find a subspace from sums over tokens.

Shape: D d_model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.basis import Subspace
from sails_align.subspace.options import DiscoveryOptions
from sails_align.subspace.statistics import Fitter, TokenStats

RANK_TOLERANCE = 1e-6
"""Lengths below this share of the largest are rounding, not directions."""


@dataclass(frozen=True)
class MethodInputs:
    """Inputs of a method for one contrast."""

    contrast: str = "response"
    side: str | None = None
    """Only features that are more active on this side; None: all."""
    stats: TokenStats | None = None
    """The sums of the method's fitter; None if it has none."""
    effects: TokenStats | None = None
    """The latents' effects on the refusal margin; None unless the score needs them."""
    saes: Mapping[int, ResidualSAE] = field(default_factory=dict)
    benign: Mapping[int, Tensor] | None = None
    """Covariances (D, D) that directions are ranked against; see `basis.principal`."""
    layers: Sequence[int] = ()
    d_model: int = 0
    options: DiscoveryOptions = field(default_factory=DiscoveryOptions)
    provenance: Mapping[str, Any] = field(default_factory=dict)


class SubspaceMethod(Protocol):
    """A method to find a subspace."""

    @property
    def name(self) -> str: ...

    def fitter(self, saes: Mapping[int, ResidualSAE], layers: Sequence[int]) -> Fitter | None:
        """Return what sums up the tokens of the contrast in these layers; None if the data is not used."""
        ...

    def build(self, inputs: MethodInputs) -> Subspace:
        """Build the subspace; `provenance["method"]` is the method's name."""
        ...


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """Return a random generator for a layer, independent of the other layers."""
    return torch.Generator().manual_seed(seed * 100_003 + layer)


def check_rank(rank: int, d_model: int) -> None:
    """Raise `InputError` if a rank is not within 1 and d_model."""
    if not 1 <= rank <= d_model:
        raise InputError(f"rank {rank} is out of range; choose 1 to d_model, {d_model}")
