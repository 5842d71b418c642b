"""Losses of a training, one file each, built on TRL's own.

A loss is a class `NAME(options, training)`, made from its options and TRL's configuration, which refuses what it cannot
work with. `begin(trainer)` is called before the training, and called with a `LossStep`, it returns the loss of a batch.
Some look into the forward pass, or read data before the training (`compose.Watching` and `compose.Prepared`).
`--loss NAME` chooses one.
"""

from sails_align.core.registry import Entry, Registry
from sails_align.training.losses.options import (
    ConstrainedOptions,
    CrispOptions,
    FirstTokensOptions,
    RedirectionOptions,
    RedundancyOptions,
    SspuOptions,
)

LOSSES = Registry(
    "loss",
    {
        "first_tokens": Entry(
            "sails_align.training.losses.first_tokens:FirstTokens",
            "Weight the first tokens of each response more.",
            FirstTokensOptions,
        ),
        "constrained": Entry(
            "sails_align.training.losses.constrained:Constrained",
            "Keep the first tokens of responses near what they were at the start.",
            ConstrainedOptions,
        ),
        "redundancy": Entry(
            "sails_align.training.losses.redundancy:Redundancy",
            "Keep groups of an adapter's rows from computing the same.",
            RedundancyOptions,
        ),
        "redirection": Entry(
            "sails_align.training.losses.redirection:Redirection",
            "Redirect harmful answers to the nearest refusal.",
            RedirectionOptions,
        ),
        "sspu": Entry(
            "sails_align.training.losses.sspu:SSPU",
            "Unlearn harmful answers within the span of the SAE features that are relevant to them.",
            SspuOptions,
        ),
        "crisp": Entry(
            "sails_align.training.losses.crisp:CRISP",
            "Suppress SAE features of harmful answers.",
            CrispOptions,
        ),
    },
)
READ_TEXTS = ("redirection", "sspu", "crisp")
"""Losses that read texts of the safety data, and of the harmless data, in passes of their own."""
NEED_SAES = ("sspu", "crisp")
"""Losses that need the SAEs of `--sae_path` or `--sae_release`."""
