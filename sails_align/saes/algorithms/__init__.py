"""SAE training algorithms, one file each.

A module has a function `training_sae(options, common)`: it makes sae-lens' SAE for training, from our options and the
settings that all algorithms share.
"""

from sails_align.core.registry import Entry, Registry

ALGORITHMS = Registry(
    "SAE architecture",
    {
        "topk": Entry("sails_align.saes.algorithms.topk:training_sae", "Exactly k latents are active at each token."),
        "jumprelu": Entry(
            "sails_align.saes.algorithms.jumprelu:training_sae",
            "A learned threshold for each latent; k latents are active at a token on average.",
        ),
        "gba": Entry(
            "sails_align.saes.algorithms.gba:training_sae",
            "Biases that adapt until groups of latents are active at their own frequencies; k at a token on average.",
        ),
    },
)
