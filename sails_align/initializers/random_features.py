"""Initialize adapters as SAILS does, with random features, to measure the value of selection by score.

Shapes: F d_sae, D d_model, K chosen latents.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sails_align.initializers.sails import Sails
from sails_align.subspace.basis import Subspace, build_subspace
from sails_align.subspace.methods import MethodInputs, layer_generator
from sails_align.subspace.selection import FeatureSelection, FeatureStats, rank_features


def random_features(
    stats: FeatureStats,
    decoders: Mapping[int, Tensor],
    *,
    contrast: str,
    score: str,
    top_k: int,
    seed: int,
    tau: float,
    weighting: bool,
    center: bool,
    provenance: Mapping[str, Any],
    benign: Mapping[int, Tensor] | None = None,
) -> Subspace:
    """The paper's path, with random latents (of those that fire) in place of the ones with the highest scores.

    Args:
        stats: of the latents.
        decoders: layer -> W_dec_FD.
        contrast: as for `select_features`.
        score: as for `select_features`; here it matters only if `weighting`.
        top_k: as for `select_features`.
        seed: of the choice of latents.
        tau: as for `build_subspace`.
        weighting: as for `build_subspace`.
        center: as for `build_subspace`.
        provenance: JSON-able.
        benign: as for `build_subspace`.
    """
    ranked = rank_features(stats, contrast=contrast, score=score)
    layers = {}
    for layer, firing in ranked.layers.items():
        chosen_K = torch.randperm(len(firing.ids), generator=layer_generator(seed, layer))[:top_k]
        layers[layer] = firing.take(chosen_K.sort().values)  # best first, as in any selection
    return build_subspace(
        FeatureSelection(layers, contrast, score),
        decoders,
        tau=tau,
        weighting=weighting,
        center=center,
        provenance={**provenance, "method": "random_features", "seed": seed},
        benign=benign,
    )


class RandomFeatures(Sails):
    """Use `random_features` as a method of discovery."""

    name = "random_features"

    def build(self, inputs: MethodInputs) -> Subspace:
        """Draw and span."""
        assert isinstance(inputs.stats, FeatureStats)
        options = inputs.options
        return random_features(
            inputs.stats,
            inputs.decoders,
            contrast=inputs.contrast,
            score=options.score,
            top_k=options.top_k,
            seed=options.seed,
            tau=options.tau,
            weighting=options.weighting,
            center=options.center,
            provenance=inputs.provenance,
            benign=inputs.benign,
        )


METHOD = RandomFeatures()
