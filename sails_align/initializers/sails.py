"""SAILS (arXiv 2512.23260): the span of the SAE features that separate the aligned from the unaligned side.

A latent's score is the difference of its mean activation on the two sides, or another (`--score`); the decoder
directions of the latents with the highest scores go through a PCA that keeps a share tau of their variance.
"""

from collections.abc import Mapping, Sequence

from sails_align.saes.load import ResidualSAE
from sails_align.subspace.basis import Subspace, build_subspace
from sails_align.subspace.methods import MethodInputs
from sails_align.subspace.selection import FeatureFitter, FeatureSelection, select_features
from sails_align.subspace.statistics import TokenStats


class Sails:
    """Select the features with the highest scores, and span their decoder directions by PCA."""

    name = "sails"

    def fitter(self, saes: Mapping[int, ResidualSAE], layers: Sequence[int]) -> FeatureFitter:
        """Sum up the latents' activations."""
        return FeatureFitter({layer: saes[layer] for layer in layers})

    def select(self, inputs: MethodInputs, stats: TokenStats) -> FeatureSelection:
        """Select latents of each layer."""
        options = inputs.options
        return select_features(
            stats,
            contrast=inputs.contrast,
            score=options.score,
            top_k=options.top_k,
            side=inputs.side,
            effects=inputs.effects,
        )

    def build(self, inputs: MethodInputs) -> Subspace:
        """Select latents and span their directions."""
        assert inputs.stats is not None
        options = inputs.options
        return build_subspace(
            self.select(inputs, inputs.stats),
            inputs.saes,
            tau=options.tau,
            weighting=options.weighting,
            center=options.center,
            provenance={**inputs.provenance, "method": self.name},
            benign=inputs.benign,
        )


METHOD = Sails()
