"""Initializations of adapters, one file each, and their properties.

To add one that starts in a subspace, write `initializers/NAME.py` with a `SubspaceMethod` (see `subspace.methods`) and
list it here; `--init NAME` and `sails_align.discover(init="NAME")` follow from the entry.
"""

from dataclasses import dataclass
from typing import Any

from sails_align.core.registry import Entry, Registry
from sails_align.initializers.entry_options import GuardSpaceOptions, ScLoraOptions


@dataclass(frozen=True)
class Initializer(Entry):
    """Describe an initialization: what it needs, and what it does to the model."""

    makes_subspace: bool = False
    """The object is a `SubspaceMethod`: adapters start in the subspace that it builds. Else a `PeftInitializer`."""
    needs_saes: bool = False
    needs_data: bool = False
    """Runs examples through the model once the adapter is made."""
    needs_prompts: bool = False
    """These are harmful prompts (at least): those of the safety data, or of `--harmful_prompts`."""
    needs_whole_weights: bool = False
    """Is computed from base weights that no engine may have split."""
    changes_base: bool = False
    """Subtracts the adapter's initial product from the base weights, and so changes them."""
    trains_difference: bool = False
    """Starts away from zero, and trains the difference from there (`difference`), on weights that are not rounded."""
    exact: bool = True
    """The first forward pass is the base model's bit for bit, and so it is with the adapter off."""


def _subspace(module: str, summary: str, *, needs_saes: bool = False) -> Initializer:
    return Initializer(f"{__name__}.{module}:METHOD", summary, makes_subspace=True, needs_saes=needs_saes)


def _peft(name: str, summary: str, **properties: Any) -> Initializer:
    return Initializer(f"{__name__}.peft:{name}", summary, **properties)


INITIALIZERS: Registry[Initializer] = Registry(
    "initializer",
    {
        "sails": _subspace("sails", "SAILS: the span of the SAE features with the highest scores.", needs_saes=True),
        "random_basis": _subspace("random_basis", "Random orthonormal directions."),
        "random_features": _subspace("random_features", "Random SAE features.", needs_saes=True),
        "activation_pca": _subspace("activation_pca", "The directions in which hidden states vary most."),
        "mean_diff": _subspace("mean_difference", "The difference between the two sides' mean hidden states."),
        "default": _peft("DEFAULT", "Plain LoRA: random A, zero B."),
        "gaussian": _peft("GAUSSIAN", "A from a normal distribution."),
        "orthogonal": _peft("ORTHOGONAL", "Orthogonal A and B.", exact=False),
        "pissa": _peft(
            "PISSA",
            "The weights' principal singular vectors (arXiv 2404.02948).",
            needs_whole_weights=True,
            changes_base=True,
            exact=False,
        ),
        "olora": _peft(
            "OLORA",
            "A QR decomposition of the weights (arXiv 2406.01775).",
            needs_whole_weights=True,
            changes_base=True,
            exact=False,
        ),
        "eva": _peft(
            "EVA",
            "The directions of largest variance in each module's input (arXiv 2410.07170).",
            needs_data=True,
            needs_whole_weights=True,
        ),
        "guardspace": Initializer(
            f"{__name__}.guardspace:METHOD",
            "GuardSpace: adapters that ignore most inputs from harmful prompts (arXiv 2510.14301).",
            GuardSpaceOptions,
            needs_data=True,
            needs_prompts=True,
            needs_whole_weights=True,
            trains_difference=True,
        ),
        "sc_lora": Initializer(
            f"{__name__}.sc_lora:METHOD",
            "SC-LoRA: output directions of the task that harmful prompts use little (arXiv 2505.23724).",
            ScLoraOptions,
            needs_data=True,
            needs_prompts=True,
            needs_whole_weights=True,
            trains_difference=True,
        ),
    },
)
"""PEFT's own initializations have the names that adapter_config.json has for them; `default` is True there."""


def subspace_initializers() -> tuple[str, ...]:
    """Return the names of the initializations that build a subspace."""
    return tuple(name for name, entry in INITIALIZERS.items() if entry.makes_subspace)


def leaves_base_alone(init_lora_weights: object) -> bool:
    """Return whether an adapter with this value in its configuration fits the published base model.

    Others change the base weights (pissa, olora, corda, lora_ga), train on rounded ones (loftq), or are to be
    subtracted from (guardspace and sc_lora, until the run is finished).
    """
    plain = [name for name, entry in INITIALIZERS.items() if not (entry.changes_base or entry.trains_difference)]
    return isinstance(init_lora_weights, bool) or init_lora_weights in plain
