"""Losses of a training, one file each, built on TRL's own.

A loss is a class `NAME(options, training)`, made from its options and TRL's configuration, which refuses what it cannot
work with. `begin(trainer)` is called before the training, and called with a `LossStep`, it returns the loss of a batch.
Some look into the forward pass, or read data before the training (`compose.Watching` and `compose.Prepared`).
`--loss NAME` chooses one.
"""

from dataclasses import dataclass

from sails_align.core.registry import Entry, Registry
from sails_align.training.losses.options import (
    ConstrainedOptions,
    CrispOptions,
    FirstTokensOptions,
    LossOptions,
    RedirectionOptions,
    RedundancyOptions,
    SspuOptions,
)


@dataclass(frozen=True)
class LossEntry(Entry):
    """Point to the code of a loss, and say what it needs."""

    reads_texts: bool = False
    """Whether it reads texts of the safety data, and of the harmless data, in passes of its own."""
    needs_saes: bool = False
    """Whether it needs the SAEs of `--sae_path` or `--sae_release`."""
    needs_whole_weights: bool = True
    """Whether it computes with the weights outside of the training's own forward pass."""


LOSSES: Registry[LossEntry] = Registry(
    "loss",
    {
        "first_tokens": LossEntry(
            "sails_align.training.losses.first_tokens:FirstTokens",
            "Weight the first tokens of each response more.",
            FirstTokensOptions,
            needs_whole_weights=False,
        ),
        "constrained": LossEntry(
            "sails_align.training.losses.constrained:Constrained",
            "Keep the first tokens of responses near what they were at the start.",
            ConstrainedOptions,
        ),
        "redundancy": LossEntry(
            "sails_align.training.losses.redundancy:Redundancy",
            "Keep groups of an adapter's rows from computing the same.",
            RedundancyOptions,
        ),
        "redirection": LossEntry(
            "sails_align.training.losses.redirection:Redirection",
            "Redirect harmful answers to the nearest refusal.",
            RedirectionOptions,
            reads_texts=True,
        ),
        "sspu": LossEntry(
            "sails_align.training.losses.sspu:SSPU",
            "Unlearn harmful answers within the span of the SAE features that are relevant to them.",
            SspuOptions,
            reads_texts=True,
            needs_saes=True,
        ),
        "crisp": LossEntry(
            "sails_align.training.losses.crisp:CRISP",
            "Suppress SAE features of harmful answers.",
            CrispOptions,
            reads_texts=True,
            needs_saes=True,
        ),
    },
)


def loss_entry(options: LossOptions) -> LossEntry | None:
    """Return the chosen loss; None for TRL's own."""
    return None if options.loss is None else LOSSES.get(options.loss)
