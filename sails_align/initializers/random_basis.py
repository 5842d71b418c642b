"""Initialize adapters with uniformly random directions, a control without any knowledge.

Shapes: D d_model, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sails_align.core.linalg import orthonormalize
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.basis import Subspace
from sails_align.subspace.methods import MethodInputs, check_rank, layer_generator


def random_basis(
    d_model: int, layers: Sequence[int], rank: int, seed: int, *, provenance: Mapping[str, Any]
) -> Subspace:
    """Return uniformly random orthonormal directions, different in each layer.

    Raises `InputError` if rank is not within 1 and d_model.
    """
    check_rank(rank, d_model)
    bases = {}
    for layer in layers:
        random_DR = torch.randn(d_model, rank, generator=layer_generator(seed, layer), dtype=torch.float64)
        bases[layer] = orthonormalize(random_DR).float()
    ones = {layer: torch.ones(rank) for layer in layers}
    return Subspace(bases, ones, {**provenance, "method": "random_basis", "rank": rank, "seed": seed})


class RandomBasis:
    """Draw the same directions whatever the data says."""

    name = "random_basis"

    def fitter(self, saes: Mapping[int, ResidualSAE], layers: Sequence[int]) -> None:
        """Sum up nothing."""

    def build(self, inputs: MethodInputs) -> Subspace:
        """Return `rank` random directions for each layer."""
        options = inputs.options
        return random_basis(inputs.d_model, inputs.layers, options.rank, options.seed, provenance=inputs.provenance)


METHOD = RandomBasis()
