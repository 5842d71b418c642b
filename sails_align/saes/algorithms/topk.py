"""TopK SAEs (arXiv 2406.04093): the k largest latents of each token are kept."""

from typing import Any

from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

from sails_align.saes.options import SAETrainingOptions


def training_sae(options: SAETrainingOptions, common: dict[str, Any]) -> TopKTrainingSAE:
    """Make an untrained TopK SAE."""
    return TopKTrainingSAE(TopKTrainingSAEConfig(k=options.k, **common))
