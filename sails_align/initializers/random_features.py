"""Initialize adapters as SAILS does, with random features, to measure the value of selection by score.

Shapes: K chosen latents.
"""

from dataclasses import replace

import torch

from sails_align.initializers.sails import Sails
from sails_align.subspace.basis import Subspace
from sails_align.subspace.methods import MethodInputs, layer_generator
from sails_align.subspace.selection import FeatureSelection, rank_features
from sails_align.subspace.statistics import TokenStats


class RandomFeatures(Sails):
    """Select random latents, of those that fire, in place of the ones with the highest scores."""

    name = "random_features"

    def select(self, inputs: MethodInputs, stats: TokenStats) -> FeatureSelection:
        """Draw latents of each layer; their scores matter only for `weighting`."""
        options = inputs.options
        ranked = rank_features(stats, contrast=inputs.contrast, score=options.score, effects=inputs.effects)
        layers = {}
        for layer, firing in ranked.layers.items():
            generator = layer_generator(options.seed, layer)
            chosen_K = torch.randperm(len(firing.ids), generator=generator)[: options.top_k]
            layers[layer] = firing.take(chosen_K.sort().values)  # best first, as in any selection
        return FeatureSelection(layers, inputs.contrast, options.score)

    def build(self, inputs: MethodInputs) -> Subspace:
        """Draw latents and span their directions; the provenance names the seed."""
        return super().build(replace(inputs, provenance={**inputs.provenance, "seed": inputs.options.seed}))


METHOD = RandomFeatures()
